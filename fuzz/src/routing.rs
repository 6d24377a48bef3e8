//! `HostRouter` against the formulas in f64.

use arbitrary::{Result, Unstructured};
use fused_moe_core::{
    Arena, DType, ErrorKind, ExecCx, ExpertGroups, NO_EXPERT, Router, RouterInput, RouterOutput,
    RoutingConfig, RoutingMethod, Stream, TensorView, TensorViewMut, TopKMut,
};
use router::{HashTable, HostRouter, RoutingError, SharedSlots};

use crate::routing::reference::Reference;

mod reference;

/// Experts that rows are routed to; configurations may have any number.
const MAX_EXPERTS: usize = 1030;

/// Arbitrary configurations and logits: a typed error, or distinct ids in range in the right order with the
/// weights of the formula.
pub fn routing(bytes: &[u8]) {
    // Running out of bytes ends a case like any other: there is nothing to report.
    let _ = Case::draw(&mut Unstructured::new(bytes)).map(|case| case.run());
}

struct Case {
    config: RoutingConfig,
    shared: Option<SharedSlots>,
    zero_experts: usize,
    /// Experts of the tokens of a vocabulary, for a router that looks them up.
    table: Option<(Vec<i32>, usize)>,
    token_ids: Vec<i32>,
    logits: Vec<f32>,
}

/// A number that is usually harmless.
fn number(u: &mut Unstructured<'_>) -> Result<f32> {
    Ok(match u.int_in_range(0..=15)? {
        0 => f32::from_bits(u.arbitrary()?),
        1 => f32::NEG_INFINITY,
        2 => *u.choose(&[0.0, -0.0, f32::MIN_POSITIVE, f32::MAX, f32::MIN, 1e-40, -200.0, 90.0])?,
        // Few values, and so ties.
        3..=8 => f32::from(u.int_in_range(-3i8..=3)?),
        _ => f32::from(u.arbitrary::<i16>()?) / 1024.0,
    })
}

impl Case {
    fn draw(u: &mut Unstructured<'_>) -> Result<Self> {
        let num_experts = match u.int_in_range(0..=31)? {
            0 => u.arbitrary()?,
            // Past what a call keeps on the stack.
            1 => u.int_in_range(1023..=MAX_EXPERTS)?,
            _ => u.int_in_range(0..=24)?,
        };
        let small = |u: &mut Unstructured<'_>| match u.ratio(1, 16)? {
            true => u.arbitrary::<usize>(),
            false => u.int_in_range(0..=8),
        };
        let method = *u.choose(&RoutingMethod::ALL)?;
        let groups = match u.ratio(1, 3)? {
            true => Some(ExpertGroups { n_group: small(u)?, topk_group: small(u)? }),
            false => None,
        };
        let config = RoutingConfig {
            method,
            num_experts,
            top_k: if method == RoutingMethod::Llama4 { 1 } else { small(u)? },
            groups,
            renormalize: u.arbitrary()?,
            routed_scaling_factor: if u.arbitrary()? { 1.0 } else { number(u)? },
            correction_bias: match u.ratio(1, 3)? {
                true => {
                    let len = if num_experts > MAX_EXPERTS { 1 } else { num_experts };
                    let len = len + usize::from(u.ratio(1, 16)?);
                    Some((0..len).map(|_| number(u)).collect::<Result<_>>()?)
                }
                false => None,
            },
        };
        let shared = match u.ratio(1, 8)? {
            true => Some(SharedSlots { count: small(u)?, weight: number(u)? }),
            false => None,
        };
        let zero_experts = if u.ratio(1, 8)? { small(u)? } else { 0 };
        let table = match u.ratio(1, 8)? {
            true => {
                let ids = (0..config.top_k.min(8) * 3).map(|_| u.int_in_range(-1..=24));
                Some((ids.collect::<Result<_>>()?, small(u)?))
            }
            false => None,
        };
        // One long row is as good as three, and no row is longer than `MAX_EXPERTS`.
        let tokens = match num_experts {
            0..=24 => u.int_in_range(0..=3)?,
            _ => u.int_in_range(0..=1)?,
        };
        let token_ids = (0..tokens).map(|_| u.int_in_range(-1..=4)).collect::<Result<_>>()?;
        let logits = (0..tokens * num_experts.min(MAX_EXPERTS)).map(|_| number(u)).collect::<Result<_>>()?;
        Ok(Self { config, shared, zero_experts, table, token_ids, logits })
    }

    fn router(&self) -> Result<HostRouter, RoutingError> {
        let mut router = HostRouter::new(self.config.clone())?;
        if let Some((ids, top_k)) = &self.table {
            router = router.with_hash_table(HashTable::new(ids.clone(), *top_k)?)?;
        }
        if self.zero_experts > 0 {
            router = router.with_zero_experts(self.zero_experts)?;
        }
        match self.shared {
            Some(shared) => router.with_shared_slots(shared),
            None => Ok(router),
        }
    }

    fn run(&self) {
        let Ok(router) = self.router() else { return };
        let (experts, tokens, slots) = (self.config.num_experts, self.token_ids.len(), router.slots());
        if experts > MAX_EXPERTS || slots > 2 * MAX_EXPERTS {
            return;
        }
        let (mut ids, mut weights) = (vec![-99; tokens * slots], vec![f32::NAN; tokens * slots]);
        let mut identity = vec![f32::NAN; tokens];
        let fits = "the slice has the shape";
        let out = RouterOutput {
            topk: TopKMut {
                ids: TensorViewMut::from_slice(&mut ids, DType::I32, &[tokens, slots]).expect(fits),
                weights: TensorViewMut::from_slice(&mut weights, DType::F32, &[tokens, slots]).expect(fits),
            },
            identity: (self.zero_experts > 0)
                .then(|| TensorViewMut::from_slice(&mut identity, DType::F32, &[tokens]).expect(fits)),
        };
        let input = RouterInput {
            logits: TensorView::from_slice(&self.logits, DType::F32, &[tokens, experts]).expect(fits),
            token_ids: Some(TensorView::from_slice(&self.token_ids, DType::I32, &[tokens]).expect(fits)),
        };
        let workspace = Arena::new(TensorViewMut::from_slice(&mut [0u8; 0], DType::U8, &[0]).expect(fits));
        let mut cx = ExecCx { stream: Stream::Host, workspace };
        if let Err(error) = router.route_all(&mut cx, input, out) {
            let bad_logit = self.logits.iter().any(|l| l.is_nan() || *l == f32::INFINITY);
            let unknown =
                |id: &i32| self.table.as_ref().is_some_and(|(t, k)| *id < 0 || *id as usize >= t.len() / k);
            match error.kind {
                ErrorKind::BadInput(_) => assert!(bad_logit, "{error}"),
                _ => assert!(self.token_ids.iter().any(unknown), "{error}"),
            }
            assert!(ids.iter().all(|&id| id == -99), "an error left output behind");
            return;
        }
        for token in 0..tokens {
            let span = token * slots..(token + 1) * slots;
            self.check_row(token, &ids[span.clone()], &weights[span], identity[token]);
        }
    }

    fn check_row(&self, token: usize, ids: &[i32], weights: &[f32], identity: f32) {
        let (experts, top_k) = (self.config.num_experts, self.config.top_k);
        let logits = &self.logits[token * experts..(token + 1) * experts];
        let real = experts - self.zero_experts;
        let (ids, shared_ids) = ids.split_at(top_k);
        let (weights, shared_weights) = weights.split_at(top_k);
        for (slot, (&id, &weight)) in shared_ids.iter().zip(shared_weights).enumerate() {
            assert_eq!(Some(weight), self.shared.map(|shared| shared.weight));
            assert_eq!(id as usize, real + slot);
        }
        let reference = Reference::new(&self.config, logits);
        let chosen = match &self.table {
            Some((table, k)) => {
                let first = self.token_ids[token] as usize * k;
                table[first..first + k].to_vec()
            }
            None if self.zero_experts == 0 => ids.to_vec(),
            // The router forgets which zero-experts it chose, so that only an exact reference can tell.
            None => match reference.exact_choice() {
                Some(chosen) => chosen,
                None => return,
            },
        };
        for (slot, &id) in chosen.iter().enumerate() {
            assert!(usize::try_from(id).is_ok_and(|id| id < experts), "id {id} of {experts} experts");
            assert!(!chosen[..slot].contains(&id), "expert {id} twice in {chosen:?}");
            assert_eq!(ids[slot], if (id as usize) < real { id } else { NO_EXPERT });
        }
        if self.table.is_none() {
            reference.check_choice(&chosen);
        }
        let Some(wanted) = reference.weights(&chosen) else { return };
        let mut kept = 0.0;
        for ((&id, &got), want) in chosen.iter().zip(weights).zip(wanted) {
            if (id as usize) < real {
                assert!(reference::is_close(got, want), "weight {got} is not {want}: {:?}", self.config);
            } else {
                assert_eq!(got, 0.0);
                kept += want;
            }
        }
        if self.zero_experts > 0 && kept.abs() < 1e30 {
            let scale = f64::from(self.config.routed_scaling_factor.abs()).max(1.0);
            let near = (f64::from(identity) - kept).abs() <= 1e-3 * (kept.abs() + scale);
            assert!(near || self.config.method == RoutingMethod::TopK, "identity {identity} is not {kept}");
        }
    }
}
