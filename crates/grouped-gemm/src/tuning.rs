//! Block sizes and task grain: a table that is data, and a heuristic where it has no row.
//!
//! Results never depend on them, only time does.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::GemmError;
use crate::kernel::TILE_ROWS;
use crate::tasks::CHUNK_ROWS;

/// How a call is cut into tasks and tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tuning {
    /// Most rows of a task: a multiple of 6, at most 96.
    pub chunk_rows: usize,
    /// Tasks for each thread below which tasks are made smaller.
    pub tasks_per_thread: usize,
    /// Bytes of weights that a run of tasks shares between its chunks of rows, so that they are still in the shared cache.
    pub span_bytes: usize,
    /// Most rows of a tile whose fp8 codes are widened in registers; from the next row on a panel is widened once for
    /// all tiles. 0 to 4, and 0 where the instruction set cannot.
    pub fp8_tile_rows: usize,
}

impl Tuning {
    /// What is used for a key without a row.
    pub const HEURISTIC: Tuning =
        Tuning { chunk_rows: CHUNK_ROWS, tasks_per_thread: 16, span_bytes: 4 << 20, fp8_tile_rows: 4 };

    fn check(&self) -> Result<(), GemmError> {
        let &Tuning { chunk_rows, tasks_per_thread, span_bytes, fp8_tile_rows } = self;
        let wrong = |name, value, wanted| Err(GemmError::Tuning { name, value, wanted });
        if chunk_rows == 0 || chunk_rows > CHUNK_ROWS || !chunk_rows.is_multiple_of(TILE_ROWS) {
            return wrong("chunk_rows", chunk_rows, "a multiple of 6, 6 to 96");
        }
        if tasks_per_thread == 0 || tasks_per_thread > 1 << 16 {
            return wrong("tasks_per_thread", tasks_per_thread, "1 to 65536");
        }
        if span_bytes == 0 {
            return wrong("span_bytes", span_bytes, "at least 1");
        }
        if fp8_tile_rows > 4 {
            return wrong("fp8_tile_rows", fp8_tile_rows, "0 to 4");
        }
        Ok(())
    }
}

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightKind {
    /// [`PackedBf16`](crate::PackedBf16).
    Bf16,
    /// [`PackedFp8`](crate::PackedFp8).
    Fp8,
    /// [`PackedFp4`](crate::PackedFp4).
    Fp4,
    /// [`PackedF32`](crate::PackedF32).
    F32,
}

/// What a row of the table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TuneKey {
    /// How the weights are stored.
    pub weights: WeightKind,
    /// Rows of a weight.
    pub n: usize,
    /// Inner size.
    pub k: usize,
    /// Rows per expert that has any, on average and rounded up to a power of two, at most 512.
    pub rows: usize,
    /// Threads of the call.
    pub threads: usize,
}

impl TuneKey {
    /// The bucket that `rows` rows on `experts` experts fall into.
    pub fn rows_per_expert(rows: usize, experts: usize) -> usize {
        rows.div_ceil(experts.max(1)).next_power_of_two().min(512)
    }
}

impl fmt::Display for TuneKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TuneKey { weights, n, k, rows, threads } = self;
        write!(f, "{weights:?} [{n}, {k}], {rows} rows per expert, {threads} threads")
    }
}

/// One row of the table, as in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TuneRow {
    /// For what.
    #[serde(flatten)]
    pub key: TuneKey,
    /// What.
    #[serde(flatten)]
    pub tuning: Tuning,
}

/// The file of a table: the processor it was measured on, and its rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TuneFile {
    /// Processor, as [`cpu_model`] names it.
    pub cpu: String,
    /// The rows.
    #[serde(rename = "row", default)]
    pub rows: Vec<TuneRow>,
}

/// The rows for one processor.
#[derive(Debug, Default)]
pub struct TuningTable {
    rows: HashMap<TuneKey, Tuning>,
    /// Used for every key, whatever the rows say.
    forced: Option<Tuning>,
    /// A bit for each key that was missed, by its hash.
    missed: [AtomicU64; 4],
}

impl TuningTable {
    /// The table of `file`.
    ///
    /// # Errors
    /// [`GemmError::Tuning`]: a value that the kernels cannot use.
    pub fn new(file: &TuneFile) -> Result<Self, GemmError> {
        file.rows.iter().try_for_each(|row| row.tuning.check())?;
        let rows = file.rows.iter().map(|row| (row.key, row.tuning)).collect();
        Ok(Self { rows, ..Self::default() })
    }

    /// A table that answers the same for every key, to measure it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn forced(tuning: Tuning) -> Result<Self, GemmError> {
        tuning.check()?;
        Ok(Self { forced: Some(tuning), ..Self::default() })
    }

    /// The row for `key`; the heuristic if there is none, which is logged once per key.
    pub fn tuning(&self, key: TuneKey) -> Tuning {
        if let Some(tuning) = self.forced.or_else(|| self.rows.get(&key).copied()) {
            return tuning;
        }
        // A table without rows is no table: there is nothing to report.
        if !self.rows.is_empty() && self.is_first_miss(&key) {
            tracing::info!(%key, "no tuned row for this product, taking the heuristic");
        }
        Tuning::HEURISTIC
    }

    /// Two keys with the same hash are reported as one.
    fn is_first_miss(&self, key: &TuneKey) -> bool {
        let TuneKey { weights, n, k, rows, threads } = *key;
        let mixed = [weights as usize, n, k, rows, threads].into_iter().fold(0u64, |hash, value| {
            (hash.rotate_left(5) ^ value as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        let (word, bit) = ((mixed >> 62) as usize, 1 << (mixed >> 56 & 63));
        self.missed[word].fetch_or(bit, Ordering::Relaxed) & bit == 0
    }
}

/// The processor's vendor, family and model, as `AuthenticAMD-26-2`; the architecture where there is no such thing.
pub fn cpu_model() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::__cpuid;

        // SAFETY: every x86-64 has the instruction and these two leaves.
        #[allow(unused_unsafe, reason = "safe in newer releases of Rust")]
        let (vendor, version) = unsafe { (__cpuid(0), __cpuid(1).eax) };
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
        let name = String::from_utf8_lossy(&name).into_owned();
        let base = version >> 8 & 0xf;
        let family = if base == 0xf { base + (version >> 20 & 0xff) } else { base };
        let extended = if matches!(base, 0x6 | 0xf) { version >> 16 & 0xf } else { 0 };
        format!("{name}-{family}-{}", extended << 4 | version >> 4 & 0xf)
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::env::consts::ARCH.to_owned()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const KEY: TuneKey = TuneKey { weights: WeightKind::Fp8, n: 4096, k: 7168, rows: 8, threads: 2 };

    fn table(tuning: Tuning) -> Result<TuningTable, GemmError> {
        TuningTable::new(&TuneFile { cpu: cpu_model(), rows: vec![TuneRow { key: KEY, tuning }] })
    }

    #[test]
    fn a_row_answers_for_its_key_alone() {
        let tuned = Tuning { chunk_rows: 48, ..Tuning::HEURISTIC };
        let table = table(tuned).unwrap();
        assert_eq!(table.tuning(KEY), tuned);
        assert_eq!(table.tuning(TuneKey { rows: 16, ..KEY }), Tuning::HEURISTIC);
    }

    #[test]
    fn a_miss_is_reported_once() {
        let table = table(Tuning::HEURISTIC).unwrap();
        let other = TuneKey { rows: 16, ..KEY };
        assert!(table.is_first_miss(&other) && !table.is_first_miss(&other));
    }

    #[rstest]
    #[case(Tuning { chunk_rows: 0, ..Tuning::HEURISTIC }, "chunk_rows is 0")]
    #[case(Tuning { chunk_rows: 100, ..Tuning::HEURISTIC }, "chunk_rows is 100")]
    #[case(Tuning { chunk_rows: 102, ..Tuning::HEURISTIC }, "chunk_rows is 102")]
    #[case(Tuning { tasks_per_thread: 0, ..Tuning::HEURISTIC }, "tasks_per_thread is 0")]
    #[case(Tuning { span_bytes: 0, ..Tuning::HEURISTIC }, "span_bytes is 0")]
    #[case(Tuning { fp8_tile_rows: 5, ..Tuning::HEURISTIC }, "fp8_tile_rows is 5")]
    fn values_that_no_kernel_can_use_are_refused(#[case] tuning: Tuning, #[case] word: &str) {
        for error in [table(tuning).unwrap_err(), TuningTable::forced(tuning).unwrap_err()] {
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[rstest]
    #[case(0, 0, 1)]
    #[case(3, 8, 1)]
    #[case(9, 8, 2)]
    #[case(100, 3, 64)]
    #[case(100_000, 1, 512)]
    fn buckets(#[case] rows: usize, #[case] experts: usize, #[case] bucket: usize) {
        assert_eq!(TuneKey::rows_per_expert(rows, experts), bucket);
    }

    #[test]
    fn the_processor_has_a_name() {
        let name = cpu_model();
        assert!(!name.is_empty() && !name.contains('\0'), "{name:?}");
    }
}
