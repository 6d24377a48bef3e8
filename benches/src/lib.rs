//! Benchmarks of this workspace: `cargo bench -p moe-benches`.
//!
//! Benchmarks proper lie in `benches/`, layer shapes in `definitions/`, results in `record/`. Stage 3 is measured by
//! `fmoe bench experts`, which needs no harness. Nothing is in this library.
