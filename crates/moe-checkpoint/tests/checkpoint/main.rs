//! Checkpoints on disk: what is read from good ones, what is said about bad ones.

mod errors;
mod families;
mod fixture;
mod golden;
