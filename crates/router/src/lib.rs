//! Stage 1 of the fused-moe pipeline: router logits to top-k expert ids and weights
