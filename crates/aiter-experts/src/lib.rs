//! Stage 3: experts with AITER's fused-MoE contract on the host
