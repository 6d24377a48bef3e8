//! Groups of processes: that they are groups as those of threads are, who may join, and what happens when one dies.
//!
//! The ranks of a test are this program again, with the name of what to do and where to meet as arguments.

#[path = "../common/mod.rs"]
#[cfg(target_os = "linux")]
mod common;
#[cfg(target_os = "linux")]
mod groups;
#[cfg(target_os = "linux")]
mod ranks;

#[cfg(target_os = "linux")]
mod shrinks;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    groups::main()
}

#[cfg(not(target_os = "linux"))]
fn main() {}
