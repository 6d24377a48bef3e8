//! Ranks, symmetric heaps, puts and signals under the *-comm crates
