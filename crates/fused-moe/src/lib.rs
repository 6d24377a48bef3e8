//! Composable expert-parallel fused MoE: the facade crate
