//! FP8 codecs and quantisers of the fused-moe pipeline
