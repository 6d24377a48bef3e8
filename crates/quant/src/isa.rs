//! Which instruction set the kernels use. The choice never changes a result.

use std::sync::OnceLock;

use crate::error::QuantError;
use crate::kernel::{Job, portable::Portable};

/// An instruction set that this CPU has.
///
/// A value is the proof that the CPU has it: it comes only from [`Isa::detect`], [`Isa::available`],
/// [`Isa::named`] and [`Isa::SCALAR`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// Plain Rust, on every CPU.
    pub const SCALAR: Isa = Isa(Kind::Scalar);

    /// The fastest one. The CPU is asked once per process, and the answer logged at debug level.
    pub fn detect() -> Isa {
        static CHOSEN: OnceLock<Isa> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            let isa = Self::available()[0];
            tracing::debug!(isa = isa.name(), "chose the instruction set of the quantisers");
            isa
        })
    }

    /// All that this CPU has, fastest first.
    pub fn available() -> &'static [Isa] {
        #[cfg(target_arch = "x86_64")]
        {
            const ALL: &[Isa] = &[Isa(Kind::Avx512), Isa(Kind::Avx2), Isa::SCALAR];
            let avx2 = is_x86_feature_detected!("avx2");
            if avx2 && is_x86_feature_detected!("avx512f") {
                ALL
            } else if avx2 {
                &ALL[1..]
            } else {
                &ALL[2..]
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            &[Isa::SCALAR]
        }
    }

    /// The one called `name` (`avx512`, `avx2` or `scalar`), to force a choice.
    ///
    /// # Errors
    /// [`QuantError::IsaUnavailable`] if this CPU does not have it or nobody knows it.
    pub fn named(name: &str) -> Result<Isa, QuantError> {
        let available = Self::available();
        available.iter().copied().find(|isa| isa.name() == name).ok_or_else(|| QuantError::IsaUnavailable {
            name: name.to_owned(),
            available: available.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "),
        })
    }

    /// Lower-case name.
    pub const fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
        }
    }

    /// Runs `job` with the vectors of this instruction set.
    pub(crate) fn run<J: Job>(self, job: J) -> J::Output {
        match self.0 {
            // SAFETY: `Portable` needs nothing of the CPU.
            Kind::Scalar => unsafe { job.run::<Portable>() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` of this kind is only handed out by `available`, which found the feature.
            Kind::Avx2 => unsafe { crate::kernel::avx2::run(job) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Kind::Avx512 => unsafe { crate::kernel::avx512::run(job) },
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_available_one_can_be_forced_by_name() {
        for &isa in Isa::available() {
            assert_eq!(Isa::named(isa.name()), Ok(isa));
        }
        assert_eq!(Isa::detect(), Isa::available()[0]);
        assert_eq!(Isa::available().last(), Some(&Isa::SCALAR));
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        let message = Isa::named("sse9").unwrap_err().to_string();
        assert!(message.contains("\"sse9\"") && message.contains("scalar"), "{message}");
    }
}
