//! Rounds of random shapes, routings and nodes, against what the protocol promises bit by bit.

mod protocol;
mod silence;
mod tampered;
mod world;
