//! Benchmarks; results are under `benches/record`.
