//! Hugging Face MoE checkpoints, memory-mapped, one rank's experts at a time
