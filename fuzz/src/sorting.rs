//! `MoeSorting` against its definition.

use std::num::NonZeroUsize;

use aiter_experts::{AiterError, MAX_BLOCK_M, MAX_TOP_K, MoeSorting, SortMemory, SortPolicy, SortedTokenId};
use arbitrary::{Result, Unstructured};
use fused_moe_core::{DType, ExpertMask, ExpertPlacement, NO_EXPERT, Rank, TensorView, TopK};
use grouped_gemm::experts::ExpertsError;

/// Entries of a sort that are worth the memory; larger sorts are only asked for their sizes.
const MAX_ENTRIES: usize = 1 << 16;

/// One sort of a random batch, by arbitrary ids, masks and block sizes: it refuses what it must and nothing else,
/// and what it returns is the definition, entry by entry.
pub fn sorting(bytes: &[u8]) {
    // Running out of bytes ends a case like any other: there is nothing to report.
    let _ = Case::draw(&mut Unstructured::new(bytes)).map(|case| case.run());
}

struct Case {
    /// Owner of each expert, on rank 0 or 1.
    owners: Vec<usize>,
    top_k: usize,
    block_m: NonZeroUsize,
    /// Rows that count; those behind are garbage.
    num_tokens: usize,
    ids: Vec<i32>,
    weights: Vec<f32>,
    /// Whether the lent memory is one token too short.
    short: bool,
    policy: SortPolicy,
}

impl Case {
    fn draw(u: &mut Unstructured<'_>) -> Result<Self> {
        let experts = match u.ratio(1, 16)? {
            true => u.int_in_range(0..=300)?,
            false => u.int_in_range(1..=12)?,
        };
        let owners = (0..experts).map(|_| u.int_in_range(0..=1)).collect::<Result<_>>()?;
        let top_k = if u.ratio(1, 16)? { u.int_in_range(0..=260)? } else { u.int_in_range(1..=8)? };
        let block_m = match u.ratio(1, 16)? {
            true => u.arbitrary()?,
            false => NonZeroUsize::MIN.saturating_add(u.int_in_range(0..=33)?),
        };
        let short = u.ratio(1, 16)?;
        let (num_tokens, garbage) = (u.int_in_range(0..=40)?, u.int_in_range(0..=3)?);
        let far = u.ratio(1, 4)?;
        let mut ids = Vec::new();
        for slot in 0..top_k * (num_tokens + garbage) {
            // A few ids from anywhere; most from around the range, so that rows without a fault are common.
            let id = match far && u.ratio(1, 64)? {
                true => u.arbitrary()?,
                false => u.int_in_range(-1..=experts as i32 - i32::from(!far))?,
            };
            let row = &ids[slot - slot % top_k..];
            // Half of the cases have no duplicates: they would hide what comes after the check.
            ids.push(if !far && row.contains(&id) { NO_EXPERT } else { id });
        }
        let weights = (0..ids.len()).map(|slot| slot as f32 + 0.5).collect();
        let policy = *u.choose(&SortPolicy::ALL)?;
        Ok(Self { owners, top_k, block_m, num_tokens, ids, weights, short, policy })
    }

    fn run(&self) {
        let placement = ExpertPlacement::from_owners(&self.owners, 2).expect("two ranks, owners 0 and 1");
        let sorting = match MoeSorting::new(&ExpertMask::new(&placement, Rank(0)), self.top_k, self.block_m) {
            Ok(sorting) => sorting.with_policy(self.policy),
            Err(AiterError::TopK { top_k }) => return assert!(top_k > MAX_TOP_K),
            Err(AiterError::BlockSize { block_m }) => return assert!(block_m > MAX_BLOCK_M),
            Err(error) => panic!("{error}"),
        };
        let sizes = sorting.sizes(self.num_tokens);
        if sizes.entries > MAX_ENTRIES {
            return;
        }
        let mut memory = SortMemory::new(match self.short {
            true => sorting.sizes(self.num_tokens.saturating_sub(1)),
            false => sizes,
        });
        let buffers = memory.buffers();
        buffers.token_ids.fill(SortedTokenId::new(7, 77));
        buffers.weights.fill(f32::NAN);
        for ids in [buffers.expert_ids, buffers.positions, buffers.cursors] {
            ids.fill(i32::MAX);
        }
        let rows = self.ids.len().checked_div(self.top_k).unwrap_or(self.num_tokens);
        let dims = [rows, self.top_k];
        let topk = TopK {
            ids: TensorView::from_slice(&self.ids, DType::I32, &dims).expect("the slice has the shape"),
            weights: TensorView::from_slice(&self.weights, DType::F32, &dims)
                .expect("the slice has the shape"),
        };
        let sorted = match sorting.sort(topk, self.num_tokens, memory.buffers()) {
            Ok(sorted) => sorted,
            Err(error) => return self.check_refusal(&error),
        };
        assert_eq!(self.first_bad_row(), None, "a bad row was accepted");

        let (mut token_ids, mut weights, mut expert_ids, mut experts) = (vec![], vec![], vec![], vec![]);
        let mut positions = vec![-1; self.num_tokens * self.top_k];
        let (block_m, counted) = (self.block_m.get(), &self.ids[..positions.len()]);
        let local = (0..self.owners.len()).filter(|&expert| self.owners[expert] == 0);
        for (local_id, expert) in local.enumerate() {
            let first = token_ids.len();
            for slot in (0..counted.len()).filter(|&slot| counted[slot] == expert as i32) {
                positions[slot] = token_ids.len() as i32;
                token_ids.push(SortedTokenId::new(slot / self.top_k, (slot % self.top_k) as u8));
                weights.push(self.weights[slot]);
            }
            if first < token_ids.len() {
                experts.push((local_id as u32, first..token_ids.len()));
            }
            let padding = SortedTokenId::new(self.num_tokens, self.top_k as u8);
            token_ids.resize(token_ids.len().next_multiple_of(block_m), padding);
            weights.resize(token_ids.len(), 0.0);
            expert_ids.resize(token_ids.len() / block_m, local_id as i32);
        }
        assert_eq!(sorted.token_ids, token_ids);
        assert_eq!(sorted.weights, weights);
        assert_eq!(sorted.expert_ids, expert_ids);
        assert_eq!(sorted.positions, positions);
        assert_eq!(sorted.num_tokens, self.num_tokens);
        assert!(sorted.experts().map(|(expert, rows)| (expert.0, rows)).eq(experts));
    }

    /// The first row with an id that names nothing, or a local expert twice.
    fn first_bad_row(&self) -> Option<usize> {
        (0..self.num_tokens).find(|row| {
            let ids = &self.ids[row * self.top_k..(row + 1) * self.top_k];
            ids.iter().enumerate().any(|(slot, &id)| match usize::try_from(id) {
                Ok(id) => match self.owners.get(id) {
                    Some(owner) => *owner == 0 && ids[..slot].contains(&(id as i32)),
                    None => true,
                },
                Err(_) => id != NO_EXPERT,
            })
        })
    }

    fn check_refusal(&self, error: &AiterError) {
        let rightly = match *error {
            AiterError::Experts(
                ExpertsError::ExpertId { row, .. } | ExpertsError::DuplicateExpertId { row, .. },
            ) => self.first_bad_row() == Some(row),
            AiterError::SortBuffer { wanted, found, .. } => self.short && found < wanted,
            _ => false,
        };
        assert!(rightly, "{error}");
    }
}
