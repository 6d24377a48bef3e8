//! The call: checks first, then all experts' work as one task list.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::activations::Activations;
use crate::aligned::{LINE, words};
use crate::driver::{SCRATCH_WORDS, Worker};
use crate::kernel::Kernel;
use crate::panel::{Columns, PackedShape};
use crate::portable::Portable;
use crate::sink::RowSink;
use crate::tasks::{Cursor, Cut};
use crate::tuning::{TuneKey, Tuning, TuningTable, WeightKind};
use crate::weights::PackedWeight;
use crate::{Epilogue, GemmError, Isa};

/// Consecutive sorted rows that share an expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Sorted rows. May be empty.
    pub rows: Range<usize>,
    /// Index into [`GroupedGemm::weights`].
    pub expert: usize,
}

/// `y[row] = epilogue(x[gather[row]] · W[expert of row]ᵀ)` for the rows of every group.
///
/// Rows are numbered in sorted order, that is expert by expert. Sums are f32.
///
/// # Order of operations
/// Each sum is one chain of additions in ascending K. With 128-wide scales (of weights, activations or
/// both) each 128 of K is summed on its own and added to the total times `activation scale * weight
/// scale`. Group scales of fp4 are part of the decoded bf16 operands. Scales per channel, per token or per
/// tensor multiply the finished sum: first the weight's, then the activation's. Then follow
/// `router_weights` and the bias before an activation, the bias and `router_weights` without one, and the
/// epilogue. A row's result therefore has the same bits whatever other rows, groups and threads take
/// part; only another [`Isa`] changes it.
#[derive(Debug)]
pub struct GroupedGemm<'a, W> {
    /// One weight per expert, all of one shape `[N, K]` and column order.
    pub weights: &'a [W],
    /// Rows `[m, K]`.
    pub activations: Activations<'a>,
    /// Activation row of each sorted row; the identity if absent.
    pub gather: Option<&'a [u32]>,
    /// Groups in ascending order of disjoint rows. Gaps are left alone.
    pub groups: &'a [Group],
    /// A factor for each sorted row. Before an activation it stands for a weight on the input, `w·(x·Wᵀ) + bias`;
    /// of plain products it is one on the output, `w·(x·Wᵀ + bias)`.
    pub router_weights: Option<&'a [f32]>,
    /// What is stored.
    pub epilogue: Epilogue,
}

impl<W: PackedWeight> GroupedGemm<'_, W> {
    /// The activation row of a sorted row.
    pub(crate) fn activation_row(&self, sorted: usize) -> usize {
        self.gather.map_or(sorted, |gather| gather[sorted] as usize)
    }

    fn check(&self, sink: &impl RowSink) -> Result<(), GemmError> {
        let rows = self.check_groups()?;
        let Some(first) = self.weights.first() else { return Ok(()) };
        let shape = first.shape();
        for (expert, weight) in self.weights.iter().enumerate() {
            if weight.shape() != shape {
                let (found, wanted) = (weight.shape().to_string(), shape.to_string());
                return Err(GemmError::ExpertShape { expert, found, wanted });
            }
        }
        match (shape.columns, self.epilogue) {
            (Columns::Plain, Epilogue::Products) | (Columns::GateUp, Epilogue::GateUp(_)) => {}
            (columns, epilogue) => {
                return Err(GemmError::Epilogue { columns: columns.name(), epilogue: epilogue.name() });
            }
        }
        if self.activations.is_f32() != (W::KIND == WeightKind::F32) {
            return Err(GemmError::Operands { weights: W::KIND, f32_activations: self.activations.is_f32() });
        }
        let activation_rows = self.activations.check(shape.k)?;
        match self.gather {
            None => check_rows("activation", activation_rows, rows)?,
            Some(gather) => {
                check_rows("gather", gather.len(), rows)?;
                self.check_gather(gather, activation_rows)?;
            }
        }
        if let Some(weights) = self.router_weights {
            check_rows("router weight", weights.len(), rows)?;
        }
        if sink.columns() != shape.result_columns() {
            return Err(GemmError::SinkColumns { found: sink.columns(), wanted: shape.result_columns() });
        }
        check_rows("sink", sink.rows(), rows)
    }

    /// Checks order and experts, and returns one past the last row of the last group that has rows.
    fn check_groups(&self) -> Result<usize, GemmError> {
        let mut previous_end = 0;
        for (group, Group { rows, expert }) in self.groups.iter().enumerate() {
            if rows.is_empty() && rows.start == rows.end {
                continue;
            }
            let &Range { start, end } = rows;
            if start < previous_end || end < start {
                return Err(GemmError::GroupOrder { group, start, end, previous_end });
            }
            if *expert >= self.weights.len() {
                let experts = self.weights.len();
                return Err(GemmError::ExpertOutOfRange { group, expert: *expert, experts });
            }
            previous_end = end;
        }
        Ok(previous_end)
    }

    fn check_gather(&self, gather: &[u32], rows: usize) -> Result<(), GemmError> {
        for row in self.groups.iter().flat_map(|group| group.rows.clone()) {
            let index = gather[row] as usize;
            if index >= rows {
                return Err(GemmError::GatherOutOfRange { row, index, rows });
            }
        }
        Ok(())
    }
}

fn check_rows(what: &'static str, found: usize, wanted: usize) -> Result<(), GemmError> {
    if found < wanted { Err(GemmError::TooFewRows { what, found, wanted }) } else { Ok(()) }
}

/// An instruction set and a number of threads to run calls with.
///
/// Threads are those of rayon's global pool and the caller's own, which works as one of them. Calls
/// from several threads may overlap. A call allocates nothing itself; rayon boxes one job per thread.
#[derive(Clone, Copy, Debug)]
pub struct Executor {
    isa: Isa,
    threads: NonZeroUsize,
    tuning: Option<&'static TuningTable>,
}

impl Executor {
    /// The machine's fastest instruction set, and as many threads as rayon's global pool has.
    pub fn detect() -> Self {
        let threads = NonZeroUsize::new(rayon::current_num_threads()).unwrap_or(NonZeroUsize::MIN);
        Executor { isa: Isa::detect(), threads, tuning: None }
    }

    /// A forced instruction set, and at most `threads` threads for a call, the caller's included.
    ///
    /// # Errors
    /// The machine lacks the instruction set.
    pub fn new(isa: Isa, threads: NonZeroUsize) -> Result<Self, GemmError> {
        if isa.is_available() {
            Ok(Executor { isa, threads, tuning: None })
        } else {
            Err(GemmError::IsaUnavailable(isa))
        }
    }

    /// The same with block sizes and task grain from `table`, which lives as long as the program: `Box::leak` one that
    /// was read from a file.
    pub fn with_tuning(self, table: &'static TuningTable) -> Self {
        Executor { tuning: Some(table), ..self }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Most threads of a call.
    pub fn threads(&self) -> NonZeroUsize {
        self.threads
    }

    /// Bytes of scratch that every call needs, about 0.3 MiB a thread whatever the shapes. Any
    /// alignment will do.
    pub fn scratch_bytes(&self) -> usize {
        self.threads.get() * SCRATCH_WORDS * size_of::<u32>() + LINE
    }

    /// Computes all groups and stores their rows in `sink`. The contents of `scratch` do not matter
    /// before and mean nothing after.
    ///
    /// # Errors
    /// Shapes, sizes, groups or gather entries that do not fit, or too little scratch. Nothing is
    /// stored then.
    pub fn run<W: PackedWeight>(
        &self,
        gemm: &GroupedGemm<'_, W>,
        scratch: &mut [u8],
        sink: &impl RowSink,
    ) -> Result<(), GemmError> {
        gemm.check(sink)?;
        let (found, wanted) = (scratch.len(), self.scratch_bytes());
        if found < wanted {
            return Err(GemmError::ScratchTooSmall { found, wanted });
        }
        let scratch = words(scratch);
        #[cfg(target_arch = "x86_64")]
        match self.isa {
            Isa::Avx512Bf16 => {
                if let Some(kernel) = crate::avx512::Avx512::new() {
                    self.drive(kernel, gemm, scratch, sink);
                    return Ok(());
                }
            }
            Isa::Avx2Fma => {
                if let Some(kernel) = crate::avx2::Avx2::new() {
                    self.drive(kernel, gemm, scratch, sink);
                    return Ok(());
                }
            }
            Isa::Portable => {}
        }
        self.drive(Portable, gemm, scratch, sink);
        Ok(())
    }

    /// What the tuning table is asked for.
    fn key<W: PackedWeight>(&self, gemm: &GroupedGemm<'_, W>, weight: &W) -> TuneKey {
        let groups = gemm.groups.iter().filter(|group| !group.rows.is_empty());
        let (experts, rows) =
            groups.fold((0, 0), |(experts, rows), group| (experts + 1, rows + group.rows.len()));
        let &PackedShape { n, k, .. } = weight.shape();
        let (rows, threads) = (TuneKey::rows_per_expert(rows, experts), self.threads.get());
        TuneKey { weights: W::KIND, n, k, rows, threads }
    }

    fn drive<K: Kernel, W: PackedWeight>(
        &self,
        kernel: K,
        gemm: &GroupedGemm<'_, W>,
        scratch: &mut [u32],
        sink: &impl RowSink,
    ) {
        let Some(weight) = gemm.weights.first() else { return };
        let shape = weight.shape();
        let tuning = self.tuning.map_or(Tuning::HEURISTIC, |table| table.tuning(self.key(gemm, weight)));
        let (panels, threads) = (shape.panels(), self.threads.get());
        let cut = Cut::new(&tuning, gemm.groups, panels, weight.bytes() / panels, threads);
        let workers = self.threads.get().min(cut.count(gemm.groups));
        let next = AtomicUsize::new(0);
        let work = |scratch: &mut [u32]| {
            let mut worker = Worker::new(kernel, tuning.fp8_tile_rows, scratch);
            let mut cursor = Cursor::new(cut, gemm.groups);
            while let Some(task) = cursor.seek(next.fetch_add(1, Ordering::Relaxed)) {
                worker.run(gemm, task, sink);
            }
        };
        let mut shares = scratch.chunks_exact_mut(SCRATCH_WORDS).take(workers);
        let Some(own) = shares.next() else { return };
        if workers == 1 {
            return work(own);
        }
        rayon::in_place_scope(|scope| {
            for share in shares {
                scope.spawn(|_| work(share));
            }
            work(own);
        });
    }
}
