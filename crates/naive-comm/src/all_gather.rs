//! Several ranks: every rank gets every row, runs its own experts on all of them, and sends each row's
//! partial sum to the row's owner.
//!
//! A round has three steps, four with an all-reduce. In each, every rank posts one [`Status`] to every rank
//! and waits for those of all:
//!
//! 1. *Announce*: how many rows each rank brings. Their prefix sums in rank order say where the rows go, so
//!    they arrive without gaps and in the same order in every run.
//! 2. *Dispatch*: each rank has put its rows to every rank.
//! 3. *Combine*: each rank has put to every owner the partial sums of the owner's rows.
//! 4. *Sums* (all-reduce): each owner has put the sums of its rows to every rank.
//!
//! # Who may touch which bytes when
//! Call a region of a rank *open* to its peers from the moment at which they have seen its Announce of round
//! r until it has seen their statuses of the step that writes the region in round r. All puts of round r lie
//! in that time, and the rank's own references lie outside:
//!
//! - A peer puts only after it has seen the Announces of all ranks, this one's included. This rank posts its
//!   Announce of round r through `&mut`, when round r − 1 is over for it and no view of its buffers is left.
//! - It makes its own references to gathered rows, partial sums and sums only after a wait for *all* statuses
//!   of the step that writes them, and each peer posts its status behind its puts. Ranges of different
//!   sources are disjoint: the source's interval of rows, or its slot.
//! - A step that fails ends the round on all ranks alike, as all see the same statuses. If the Announces hold
//!   a fault, nobody puts anything. If those of a later step do, the wait was still for all ranks, so that
//!   all puts of the step are done, and no later step of the round puts anything. A fast rank may then be in
//!   round r + 1 while a slow one still reads the statuses of round r: its Announce goes to a slot of the
//!   other parity, and it cannot come to its puts before the slow rank, too, has announced round r + 1.
//! - It cannot come to round r + 2 either, so no status is overwritten before it is read, even where rounds
//!   that failed early leave the slots of later steps unused.
//!
//! What a rank puts *from* (its own rows, the experts' outputs, its sums) is written again in the next round
//! at the earliest, and `announce` begins with a `quiet`. Lent outputs are different: a caller who drops the
//! ticket gets them back before the receive, so their puts end within the send.

use std::sync::Arc;
use std::time::Duration;

use ep_transport::{
    Deadline, Heap, HeapLayout, HeapSize, Payload, Result, Status, StatusBoard, SymOffset, Transport,
};
use fused_moe_core::{Fault, MoeConfig, Outstanding, Plan, Rank};

use crate::exchange::{Exchange, Outputs, Received, Verdict};
use crate::row::{COLUMNS, Column, columns, elements_of, elements_of_mut};
use crate::sum::Partials;

/// What becomes of the partial sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduction {
    /// Each owner sums its rows.
    ReduceScatter,
    /// Each owner sums its rows, and every rank gets all sums.
    AllReduce,
}

/// Where everything is in the heap.
#[derive(Clone, Debug)]
struct Regions {
    /// `[max_tokens]` rows of this rank, to put from.
    staged: [SymOffset; COLUMNS],
    /// `[max_rows]` rows of all ranks.
    gathered: [SymOffset; COLUMNS],
    /// `[max_rows, hidden]`, the experts' output, if it is lent to them.
    output: Option<SymOffset>,
    /// `[ranks, max_tokens, hidden]`.
    partials: SymOffset,
    announce: StatusBoard,
    dispatch: StatusBoard,
    combine: StatusBoard,
    all_reduce: Option<AllReduce>,
}

#[derive(Clone, Debug)]
struct AllReduce {
    /// `[max_rows, hidden]`: each owner's rows, at the place that they have among the gathered rows.
    sums: SymOffset,
    board: StatusBoard,
}

/// Sizes that the regions follow from.
#[derive(Clone, Debug)]
struct Shape {
    columns: [Column; COLUMNS],
    outputs: Column,
    ranks: usize,
    max_tokens: usize,
    hidden: usize,
}

impl Shape {
    fn new(config: &MoeConfig, plan: &Plan) -> Self {
        Self {
            columns: columns(config, plan),
            outputs: Column::outputs(config),
            ranks: config.ep_size(),
            max_tokens: config.max_tokens_per_rank,
            hidden: config.hidden,
        }
    }

    fn max_rows(&self) -> usize {
        self.ranks.saturating_mul(self.max_tokens)
    }

    fn regions(&self, plan: &Plan, reduction: Reduction) -> (Regions, HeapSize) {
        let mut heap = HeapLayout::default();
        let outputs = self.outputs.bytes(self.max_rows());
        let regions = Regions {
            staged: self.columns.map(|column| heap.region(column.bytes(self.max_tokens))),
            gathered: self.columns.map(|column| heap.region(column.bytes(self.max_rows()))),
            output: plan.in_place_output().then(|| heap.region(outputs)),
            partials: heap.region(outputs),
            announce: StatusBoard::reserve(&mut heap, self.ranks),
            dispatch: StatusBoard::reserve(&mut heap, self.ranks),
            combine: StatusBoard::reserve(&mut heap, self.ranks),
            all_reduce: (reduction == Reduction::AllReduce).then(|| AllReduce {
                sums: heap.region(outputs),
                board: StatusBoard::reserve(&mut heap, self.ranks),
            }),
        };
        (regions, heap.size())
    }
}

/// The exchange of a group with a transport.
pub(crate) struct AllGather {
    heap: Arc<dyn Heap>,
    timeout: Duration,
    shape: Shape,
    regions: Regions,
    /// Where the rows of each rank begin among the gathered ones, and behind them their number.
    starts: Box<[usize]>,
}

impl AllGather {
    /// Bytes that [`AllGather::new`] allocates on each rank.
    pub(crate) fn required_bytes(config: &MoeConfig, plan: &Plan, reduction: Reduction) -> usize {
        Shape::new(config, plan).regions(plan, reduction).1.required_bytes()
    }

    /// Collective.
    pub(crate) fn new(
        config: &MoeConfig,
        plan: &Plan,
        reduction: Reduction,
        transport: &dyn Transport,
    ) -> Result<Self> {
        let shape = Shape::new(config, plan);
        let (regions, size) = shape.regions(plan, reduction);
        Ok(Self {
            heap: transport.allocate(size, transport.deadline())?,
            timeout: transport.timeout(),
            starts: vec![0; shape.ranks + 1].into(),
            shape,
            regions,
        })
    }

    fn deadline(&self) -> Deadline {
        Deadline::after(self.timeout)
    }

    /// All ranks, this one last: the others start early, and not all with the same one.
    fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        let (me, ranks) = (self.heap.rank().index(), self.shape.ranks);
        (1..=ranks).map(move |distance| Rank(((me + distance) % ranks) as u32))
    }

    fn post_to_all(&self, board: StatusBoard, round: u64, status: Status) -> Result<()> {
        board.post_all(&*self.heap, round, status)
    }

    /// First row and number of rows of `rank` in this round.
    fn rows_of(&self, rank: Rank) -> (usize, usize) {
        let (start, end) = (self.starts[rank.index()], self.starts[rank.index() + 1]);
        (start, end - start)
    }

    /// Waits for the row counts of all ranks and notes where their rows begin.
    fn learn_counts(&mut self, round: u64, deadline: Deadline) -> Result<Verdict<usize>> {
        let (starts, max) = (&mut self.starts, self.shape.max_tokens as u64);
        let mut too_many = None;
        let failed = self.regions.announce.wait_all(&*self.heap, round, deadline, |rank, status| {
            if status.count > max {
                // No sound rank says so. Its rows would not fit, so every rank refuses them.
                let fault = Fault::TooManyTokens { tokens: status.count as u32, max: max as u32 };
                too_many = too_many.or(Some((rank, fault)));
            }
            starts[rank.index() + 1] = starts[rank.index()] + status.count.min(max) as usize;
        })?;
        let rows = starts[self.shape.ranks];
        Ok(failed.or(too_many).map_or(Ok(rows), Err))
    }

    /// Sums this rank's rows, rounds the sums to the configuration's element type, and gives them to all.
    fn all_reduce(&self, all: &AllReduce, partials: Partials<'_>, round: u64) -> Result<Verdict<()>> {
        let me = self.heap.rank();
        let (start, rows) = self.rows_of(me);
        let offset = all.sums + self.shape.outputs.bytes(start);
        // SAFETY: the rows of this rank are put to by no other.
        let sums = unsafe { self.heap.local_mut(offset, self.shape.outputs.bytes(rows))? };
        for (row, sums) in elements_of_mut(sums).chunks_exact_mut(self.shape.hidden).enumerate() {
            partials.sum_row(row, sums);
        }
        for to in self.ranks() {
            if to != me {
                // SAFETY: the range is this rank's own on every rank, and open; it is written again, here, in
                // the next round.
                unsafe { self.heap.put_nbi(to, Payload { offset, bytes: sums })? };
            }
            all.board.post(&*self.heap, to, round, Status::done(rows as u64))?;
        }
        let failed = all.board.wait_all(&*self.heap, round, self.deadline(), |_, _| {})?;
        Ok(failed.map_or(Ok(()), Err))
    }
}

impl Exchange for AllGather {
    fn allocated_bytes(&self) -> usize {
        self.heap.size().required_bytes()
    }

    fn announce(&mut self, round: u64, own: Status) -> Result<()> {
        self.heap.quiet(self.deadline())?;
        self.post_to_all(self.regions.announce, round, own)
    }

    fn staging(&mut self) -> Result<[&mut [u8]; COLUMNS]> {
        let mut columns: [&mut [u8]; COLUMNS] = Default::default();
        for (index, column) in columns.iter_mut().enumerate() {
            let bytes = self.shape.columns[index].bytes(self.shape.max_tokens);
            // SAFETY: no peer puts here, `self` is borrowed exclusively, and the columns are disjoint; the
            // puts from it have ended since `announce`.
            *column = unsafe { self.heap.local_mut(self.regions.staged[index], bytes)? };
        }
        Ok(columns)
    }

    fn gather(&mut self, round: u64, late: Option<Fault>) -> Result<Verdict<usize>> {
        let deadline = self.deadline();
        let rows = match self.learn_counts(round, deadline)? {
            Ok(rows) => rows,
            Err(failure) => return Ok(Err(failure)),
        };
        let (start, own) = self.rows_of(self.heap.rank());
        let status = late.map_or(Status::done(own as u64), Status::failed);
        for to in self.ranks() {
            for (index, column) in self.shape.columns.iter().enumerate().filter(|_| late.is_none()) {
                // SAFETY: `staging` is not borrowed any more and nothing is put to it.
                let bytes = unsafe { self.heap.local(self.regions.staged[index], column.bytes(own))? };
                let offset = self.regions.gathered[index] + column.bytes(start);
                // SAFETY: the range is that of this rank's rows, and open; the staged rows stay as they are
                // until the next round.
                unsafe { self.heap.put_nbi(to, Payload { offset, bytes })? };
            }
            self.regions.dispatch.post(&*self.heap, to, round, status)?;
        }
        let failed = self.regions.dispatch.wait_all(&*self.heap, round, deadline, |_, _| {})?;
        Ok(failed.map_or(Ok(rows), Err))
    }

    fn received(&mut self) -> Result<Received<'_>> {
        let max_rows = self.shape.max_rows();
        let mut columns = [[].as_slice(); COLUMNS];
        for (index, column) in columns.iter_mut().enumerate() {
            let bytes = self.shape.columns[index].bytes(max_rows);
            // SAFETY: the statuses of all ranks have been seen, so the region is not open until the next
            // `announce`, which `self` being borrowed rules out.
            *column = unsafe { self.heap.local(self.regions.gathered[index], bytes)? };
        }
        let bytes = self.shape.outputs.bytes(max_rows);
        // SAFETY: no peer puts here, and `self` is borrowed exclusively. The puts from it have ended since
        // `announce`.
        let output = self.regions.output.map(|output| unsafe { self.heap.local_mut(output, bytes) });
        Ok(Received { columns, output: output.transpose()? })
    }

    fn scatter(&mut self, round: u64, outputs: Outputs<'_>) -> Result<()> {
        let combine = self.regions.combine;
        let rows = match (outputs, self.regions.output) {
            (Outputs::Failed(fault), _) => {
                return self.post_to_all(combine, round, Status::failed(fault));
            }
            (Outputs::Lent(rows), _) => rows,
            (Outputs::InPlace, Some(output)) => {
                let bytes = self.shape.outputs.bytes(self.shape.max_rows());
                // SAFETY: no peer puts here, and the experts' view is gone.
                unsafe { self.heap.local(output, bytes)? }
            }
            (Outputs::InPlace, None) => {
                return self.post_to_all(combine, round, Status::failed(Fault::BadTensor));
            }
        };
        let me = self.heap.rank();
        let slot = self.regions.partials + self.shape.outputs.bytes(me.index() * self.shape.max_tokens);
        for to in self.ranks() {
            let (start, count) = self.rows_of(to);
            let bytes = &rows[self.shape.outputs.bytes(start)..][..self.shape.outputs.bytes(count)];
            // SAFETY: the slot is this rank's own on every rank, and open. The outputs stay as they are:
            // those in place until the next round, those that are lent until the `quiet` below.
            unsafe { self.heap.put_nbi(to, Payload { offset: slot, bytes })? };
            combine.post(&*self.heap, to, round, Status::done(count as u64))?;
        }
        if matches!(outputs, Outputs::Lent(_)) {
            self.heap.quiet(self.deadline())?;
        }
        Ok(())
    }

    fn collect(&mut self, round: u64) -> Result<Verdict<Partials<'_>>> {
        let failed = self.regions.combine.wait_all(&*self.heap, round, self.deadline(), |_, _| {})?;
        if let Some(failure) = failed {
            return Ok(Err(failure));
        }
        let bytes = self.shape.outputs.bytes(self.shape.max_rows());
        // SAFETY: the statuses of all ranks have been seen, so the region is not open until the next
        // `announce`, which `self` being borrowed rules out.
        let elements = elements_of(unsafe { self.heap.local(self.regions.partials, bytes)? });
        let Shape { max_tokens, hidden, .. } = self.shape;
        let partials = Partials { elements, max_tokens, hidden };
        let reduced = match &self.regions.all_reduce {
            Some(all) => self.all_reduce(all, partials, round)?,
            None => Ok(()),
        };
        Ok(reduced.map(|()| partials))
    }

    fn abandon(&mut self, round: u64, outstanding: Outstanding) -> Result<()> {
        let board = match outstanding {
            Outstanding::PrepareSent(_) => Some(self.regions.dispatch),
            Outstanding::Dispatched(_) => Some(self.regions.combine),
            // After its partial sums, the peers miss nothing of this rank unless they wait for its sums.
            Outstanding::FinalizeSent(_) => self.regions.all_reduce.as_ref().map(|all| all.board),
        };
        board.map_or(Ok(()), |board| self.post_to_all(board, round, Status::failed(Fault::Abandoned)))
    }
}

#[cfg(test)]
mod tests {
    use ep_transport::{ThreadOptions, run_ranks, transport_of};
    use fused_moe_core::{
        Activation, DType, DeviceKind, ExpertPlacement, ExpertsCaps, KernelKind, PrepareFinalizeProvider,
        QuantScheme, Support, WireFormat, negotiate,
    };
    use half::bf16;

    use super::*;
    use crate::Naive;

    const RANKS: usize = 3;

    /// Runs `body` on every rank with an exchange of an all-reduce: rows of two elements, four per rank.
    fn run<T: Send>(body: impl Fn(AllGather) -> Result<T> + Sync) -> Vec<T> {
        let config = MoeConfig {
            hidden: 2,
            intermediate: 2,
            top_k: 1,
            max_tokens_per_rank: 4,
            in_dtype: DType::Bf16,
            quant: QuantScheme::Unquantized,
            activation: Activation::Silu,
            apply_router_weight_on_input: false,
            expert_bias: false,
            padding: Default::default(),
            redundant_experts: 0,
            max_received_rows: None,
            combine_wire: Default::default(),
            routing: None,
            placement: ExpertPlacement::linear(RANKS, RANKS).expect("a group"),
            ranks_per_node: RANKS,
            device: DeviceKind::Host,
        };
        let Support::Supported(caps) = Naive.supports(&config, KernelKind::Modular) else {
            panic!("a plain layer is refused");
        };
        let experts = ExpertsCaps::host("none", vec![WireFormat::unquantized(DType::Bf16)]);
        let plan = negotiate(&config, &caps, &experts).expect("a pair that fits");
        let outcomes = run_ranks(RANKS, ThreadOptions::default(), |group| {
            let transport = transport_of(&group).expect("an endpoint has a transport");
            body(AllGather::new(&config, &plan, Reduction::AllReduce, &*transport)?)
        });
        let values: Result<Vec<T>> = outcomes.expect("threads").into_iter().collect();
        values.expect("no peer is lost")
    }

    #[test]
    fn an_all_reduce_gives_every_rank_the_sums_of_all_rows() {
        let all = run(|mut exchange| {
            let me = exchange.heap.rank().0;
            // Rank r brings r rows. Its experts contribute 10 · row + r to each row.
            exchange.announce(1, Status::done(u64::from(me)))?;
            assert_eq!(exchange.gather(1, None)?, Ok(3));
            let output = elements_of_mut(exchange.received()?.output.expect("in place"));
            let rows = output.chunks_mut(2).enumerate();
            rows.for_each(|(row, x)| x.fill(bf16::from_f32((10 * row) as f32 + me as f32)));
            exchange.scatter(1, Outputs::InPlace)?;
            assert!(exchange.collect(1)?.is_ok());
            let sums = exchange.regions.all_reduce.as_ref().expect("an all-reduce").sums;
            // SAFETY: all statuses of the step were seen in `collect`.
            Ok(elements_of(unsafe { exchange.heap.local(sums, 3 * 2 * 2)? }).to_vec())
        });
        let want = [3.0, 3.0, 33.0, 33.0, 63.0, 63.0].map(bf16::from_f32);
        assert_eq!(all, vec![want.to_vec(); RANKS]);
    }

    #[test]
    fn rows_that_do_not_fit_are_refused_by_all() {
        let verdicts = run(|mut exchange| {
            let count = if exchange.heap.rank() == Rank(1) { 5 } else { 4 };
            exchange.announce(1, Status::done(count))?;
            exchange.gather(1, None)
        });
        assert_eq!(verdicts, vec![Err((Rank(1), Fault::TooManyTokens { tokens: 5, max: 4 })); RANKS]);
    }
}
