//! How a command ends: scripts depend on the codes.

use std::io::Write;
use std::process::ExitCode;

/// Why a command did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// Bad arguments, bad input files, or no backend fits: exit code 2.
    Refused(anyhow::Error),
    /// Something went wrong while it ran, or a check found an error: exit code 1.
    Failed(anyhow::Error),
    /// One of the above, which another process of the run reports.
    Elsewhere(u8),
}

impl Failure {
    /// The exit code.
    pub fn code(&self) -> u8 {
        match self {
            Failure::Refused(_) => 2,
            Failure::Failed(_) => 1,
            Failure::Elsewhere(code) => *code,
        }
    }

    /// The reason, if it is to be reported here.
    pub fn reason(&self) -> Option<&anyhow::Error> {
        match self {
            Failure::Refused(error) | Failure::Failed(error) => Some(error),
            Failure::Elsewhere(_) => None,
        }
    }

    /// Prints the reason and its causes to stderr, and gives the exit code.
    pub fn report(&self) -> ExitCode {
        let code = ExitCode::from(self.code());
        let Some(error) = self.reason() else { return code };
        // Some causes are already part of the text of the error above them.
        let mut text = String::new();
        for cause in error.chain().map(ToString::to_string) {
            if !text.ends_with(&cause) {
                text.push_str(if text.is_empty() { "" } else { ": " });
                text.push_str(&cause);
            }
        }
        // Nobody is left to tell if stderr cannot be written; the exit code still counts.
        let _ = writeln!(std::io::stderr(), "fmoe: {text}");
        code
    }
}

/// The refusal of `--ranks mpi` by a program that cannot.
#[cfg(not(feature = "mpi"))]
pub const WITHOUT_MPI: &str = "--ranks mpi: this program was built without MPI; build it with `--features mpi` (needs Open MPI and libclang)";

/// Sorts an error into one of the two bins.
pub trait OrFailure<T> {
    /// The caller gave something that cannot be run.
    fn or_refused(self) -> Result<T, Failure>;
    /// It could be run, and failed.
    fn or_failed(self) -> Result<T, Failure>;
}

impl<T, E: Into<anyhow::Error>> OrFailure<T> for Result<T, E> {
    fn or_refused(self) -> Result<T, Failure> {
        self.map_err(|e| Failure::Refused(e.into()))
    }

    fn or_failed(self) -> Result<T, Failure> {
        self.map_err(|e| Failure::Failed(e.into()))
    }
}

/// A refusal in words.
pub fn refused<T>(why: impl std::fmt::Display) -> Result<T, Failure> {
    Err(Failure::Refused(anyhow::anyhow!("{why}")))
}
