//! Host grouped GEMM over packed expert weights
