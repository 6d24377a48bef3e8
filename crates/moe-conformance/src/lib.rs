//! Oracle and conformance suite for authors of fused-moe backends
