//! The fuzz targets as functions of bytes. A target that returns found nothing; what it finds is a panic.
//!
//! They stand apart from the programs that libFuzzer drives, so that another engine, or a test that replays one
//! input, can call them.

mod checkpoint;
mod routing;
mod sorting;

pub use checkpoint::checkpoint;
pub use routing::routing;
pub use sorting::sorting;
