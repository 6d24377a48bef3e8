//! A group of ranks, what each sends, and one round of it over a backend.
//!
//! Every row says whose it is: the first two elements of a token are its rank and its number. What stands for the
//! experts of a rank is a function of these, with all bits of a bf16 in use, so that the order of sums shows.

use std::num::NonZeroUsize;
use std::time::Duration;

use ep_transport::{Endpoint, ThreadOptions, run_ranks};
use fused_moe_core::*;
use half::bf16;
use mori_comm::MoriBackend;

/// Sizes, placement and routing of all ranks.
#[derive(Clone, Debug)]
pub struct World {
    pub nodes: usize,
    pub ranks_per_node: usize,
    pub hidden: usize,
    pub top_k: usize,
    pub max_received_rows: Option<usize>,
    /// The rank of each expert.
    pub owners: Vec<usize>,
    /// `[ranks][tokens · top_k]`.
    pub ids: Vec<Vec<i32>>,
}

/// A row as it arrived.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub source: (usize, usize),
    pub ids: Vec<i32>,
    pub weights: Vec<u32>,
    pub payload: Vec<u16>,
}

/// What a rank got in a round.
#[derive(Clone, Debug)]
pub struct Round {
    pub rows: Vec<Row>,
    /// `[tokens, hidden]`.
    pub out: Vec<f32>,
}

/// A number that follows from `parts`.
pub fn hash(parts: &[usize]) -> u64 {
    parts.iter().fold(0x9e37_79b9_7f4a_7c15, |hash: u64, &part| {
        let mixed = (hash ^ part as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^ (mixed >> 29)
    })
}

/// A bf16 of any sign and mantissa, and one of eight exponents.
fn value(parts: &[usize]) -> bf16 {
    let bits = hash(parts);
    bf16::from_bits((bits & 0x807f) as u16 | (((124 + (bits >> 32) % 8) as u16) << 7))
}

impl World {
    /// Eight ranks of two nodes, an expert on each; every token goes to all of them.
    pub fn everywhere() -> Self {
        let token = |rank: i32, token: i32| (0..8).map(move |slot| (slot * 3 + token + rank) % 8);
        let ids = (0..8).map(|rank| (0..70).flat_map(move |index| token(rank, index)));
        Self {
            nodes: 2,
            ranks_per_node: 4,
            hidden: 16,
            top_k: 8,
            max_received_rows: None,
            owners: (0..8).collect(),
            ids: ids.map(Iterator::collect).collect(),
        }
    }

    pub fn ranks(&self) -> usize {
        self.nodes * self.ranks_per_node
    }

    pub fn tokens(&self, rank: usize) -> usize {
        self.ids[rank].len() / self.top_k
    }

    pub fn ids_of(&self, (rank, token): (usize, usize)) -> &[i32] {
        &self.ids[rank][token * self.top_k..][..self.top_k]
    }

    /// The ranks that a token goes to, by the first slot that names each.
    pub fn ranks_of(&self, source: (usize, usize)) -> Vec<usize> {
        let mut ranks = Vec::new();
        for &id in self.ids_of(source).iter().filter(|&&id| id >= 0) {
            let rank = self.owners[id as usize];
            if !ranks.contains(&rank) {
                ranks.push(rank);
            }
        }
        ranks
    }

    /// The row that a token is sent as.
    pub fn row(&self, source: (usize, usize)) -> Row {
        let (rank, token) = source;
        let payload = (0..self.hidden).map(|column| match column {
            0 => bf16::from_f32(rank as f32),
            1 => bf16::from_f32(token as f32),
            _ => value(&[rank, token, column]),
        });
        let weights = (0..self.top_k).map(|slot| (hash(&[rank, token, slot]) % 1000) as f32 / 1000.0);
        Row {
            source,
            ids: self.ids_of(source).to_vec(),
            weights: weights.map(f32::to_bits).collect(),
            payload: payload.map(bf16::to_bits).collect(),
        }
    }

    /// What `rank` makes of a token. Half the time it is huge and the opposite of what the next rank makes of it: what is
    /// added in between is lost, so the sum of all depends on the order.
    pub fn output(&self, rank: usize, (of, token): (usize, usize), column: usize) -> bf16 {
        let pair = [rank / 2, of, token, column];
        if hash(&pair).is_multiple_of(2) {
            let huge = bf16::from_bits((value(&pair).to_bits() & 0x7f) | ((127 + 40) << 7));
            return if rank.is_multiple_of(2) { huge } else { -huge };
        }
        value(&[rank, of, token, column])
    }

    pub fn config(&self) -> MoeConfig {
        let most = (0..self.ranks()).map(|rank| self.tokens(rank)).max().unwrap_or(0);
        MoeConfig {
            hidden: self.hidden,
            intermediate: 8,
            top_k: self.top_k,
            max_tokens_per_rank: most.max(1),
            max_received_rows: self.max_received_rows,
            ranks_per_node: self.ranks_per_node,
            ..MoeConfig::new(ExpertPlacement::from_owners(&self.owners, self.ranks()).unwrap())
        }
    }

    /// Runs `body` on every rank, over simulated nodes.
    pub fn run<T: Send>(&self, body: impl Fn(Endpoint) -> T + Sync) -> Vec<T> {
        self.run_within(ThreadOptions::default().timeout, body)
    }

    /// The same with another deadline for every wait.
    pub fn run_within<T: Send>(&self, timeout: Duration, body: impl Fn(Endpoint) -> T + Sync) -> Vec<T> {
        let ranks_per_node = NonZeroUsize::new(self.ranks_per_node);
        run_ranks(self.ranks(), ThreadOptions { ranks_per_node, timeout }, body).unwrap()
    }

    /// A handle of one rank.
    pub fn handle(&self, backend: MoriBackend, group: &Endpoint) -> Box<dyn PrepareAndFinalizeModular> {
        let experts = ExpertsCaps::host("none", vec![WireFormat::unquantized(DType::Bf16)]);
        match maybe_make_prepare_finalize(&[&backend], &self.config(), &experts, group) {
            Ok((_, PrepareFinalize::Modular(comm))) => comm,
            other => panic!("{other:?}"),
        }
    }
}

/// A phase that another follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Phase {
    PrepareSend,
    PrepareRecv,
    FinalizeSend,
}

/// A rank's end, and the tensors that it lends.
pub struct Rank<'w> {
    pub world: &'w World,
    pub rank: usize,
    pub comm: Box<dyn PrepareAndFinalizeModular>,
    hidden: Vec<bf16>,
    weights: Vec<f32>,
}

impl<'w> Rank<'w> {
    pub fn new(world: &'w World, backend: MoriBackend, group: &Endpoint) -> Self {
        let (rank, comm) = (group.rank().index(), world.handle(backend, group));
        let mut this = Self { world, rank, comm, hidden: Vec::new(), weights: Vec::new() };
        this.bring(world);
        this
    }

    /// Goes on with the tokens of `world`, of which there are no more than the handle was built for.
    pub fn bring(&mut self, world: &'w World) {
        let rank = self.rank;
        let rows = || (0..world.tokens(rank)).map(|token| world.row((rank, token)));
        self.world = world;
        self.hidden = rows().flat_map(|row| row.payload).map(bf16::from_bits).collect();
        self.weights = rows().flat_map(|row| row.weights).map(f32::from_bits).collect();
    }

    pub fn prepare_send<'a>(&'a mut self) -> Result<Sent<'a, phase::Prepare>> {
        let World { hidden, top_k, .. } = *self.world;
        let tokens = self.world.tokens(self.rank);
        let ids = &self.world.ids[self.rank];
        let topk = TopK {
            ids: TensorView::from_slice(ids, DType::I32, &[tokens, top_k]).unwrap(),
            weights: TensorView::from_slice(&self.weights, DType::F32, &[tokens, top_k]).unwrap(),
        };
        let hidden = TensorView::from_slice(&self.hidden, DType::Bf16, &[tokens, hidden]).unwrap();
        let input = PrepareInput { hidden, topk, input_scale: None, fault: None };
        with_cx(|cx| self.comm.prepare_send(cx, input))
    }

    /// A whole round. Outputs are NaN before they are written.
    pub fn round(&mut self) -> Result<Round> {
        Ok(self.round_until(None)?.expect("no phase was the last"))
    }

    /// A round up to a phase, behind which this rank does nothing any more.
    pub fn round_until(&mut self, last: Option<Phase>) -> Result<Option<Round>> {
        let (world, rank) = (self.world, self.rank);
        let (top_k, tokens) = (world.top_k, world.tokens(rank));
        let Self { comm, hidden, weights, .. } = self;
        let topk = TopK {
            ids: TensorView::from_slice(&world.ids[rank], DType::I32, &[tokens, top_k]).unwrap(),
            weights: TensorView::from_slice(weights, DType::F32, &[tokens, top_k]).unwrap(),
        };
        let hidden = TensorView::from_slice(hidden, DType::Bf16, &[tokens, world.hidden]).unwrap();
        let input = PrepareInput { hidden, topk, input_scale: None, fault: None };
        with_cx(|cx| {
            let sent = comm.prepare_send(cx, input)?;
            if last == Some(Phase::PrepareSend) {
                return Ok(None);
            }
            let (mut dispatched, routed) = comm.prepare_recv(cx, sent)?;
            let mut output = dispatched.output.take().unwrap();
            let rows = received(&dispatched);
            output.as_mut_slice::<bf16>().unwrap().fill(bf16::NAN);
            for (index, row) in rows.iter().enumerate() {
                let out = output.row_mut::<bf16>(index).unwrap();
                (0..).zip(out).for_each(|(column, out)| *out = world.output(rank, row.source, column));
            }
            if last == Some(Phase::PrepareRecv) {
                return Ok(None);
            }
            let sent = comm.finalize_send(cx, routed, ExpertOut::InPlace)?;
            if last == Some(Phase::FinalizeSend) {
                return Ok(None);
            }
            let mut out = vec![f32::NAN; tokens * world.hidden];
            let view = TensorViewMut::from_slice(&mut out, DType::F32, &[tokens, world.hidden]).unwrap();
            comm.finalize_recv(cx, sent, view)?;
            Ok(Some(Round { rows, out }))
        })
    }
}

fn with_cx<T>(body: impl FnOnce(&mut ExecCx<'_>) -> T) -> T {
    let mut workspace = Workspace::new(DeviceKind::Host, 0).unwrap();
    body(&mut ExecCx { stream: Stream::Host, workspace: workspace.arena() })
}

fn received(dispatched: &Dispatched<'_>) -> Vec<Row> {
    let Arrived::Standard { topk, rows } = dispatched.arrived else { panic!("not the standard format") };
    let row = |row| {
        let payload = dispatched.hidden.row::<bf16>(row).unwrap();
        Row {
            source: (payload[0].to_f32() as usize, payload[1].to_f32() as usize),
            ids: topk.ids.row::<i32>(row).unwrap().to_vec(),
            weights: topk.weights.row::<f32>(row).unwrap().iter().map(|w| w.to_bits()).collect(),
            payload: payload.iter().map(|x| x.to_bits()).collect(),
        }
    };
    (0..rows.on_host().unwrap()).map(row).collect()
}
