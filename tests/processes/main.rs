//! Every dispatch/combine backend over processes: the conformance suite, and calls in which a rank is killed.
//!
//! A test starts this program again, once per rank; all of them run all cases, each with as many ranks as it needs.

#[cfg(target_os = "linux")]
mod losses;
#[cfg(target_os = "linux")]
mod suite;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    suite::main()
}

#[cfg(not(target_os = "linux"))]
fn main() {}
