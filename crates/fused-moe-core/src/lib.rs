//! Vocabulary, stage traits, negotiation and composition of the fused-moe pipeline
