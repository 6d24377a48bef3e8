//! Which configurations each form runs, and its capabilities.

use fused_moe_core::{ExpertsCaps, KernelKind, MoeConfig, RoutingMethod, Unsupported};
use grouped_gemm::experts::{ExpertsError, Supported, accepted_wires};

use crate::compute::Form;
use crate::limits::{self, SchemeLimits};
use crate::{NAME, NAME_ROUTED};

impl Form {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Form::Monolithic => NAME,
            Form::Routed => NAME_ROUTED,
        }
    }

    fn limits(self, config: &MoeConfig) -> Vec<Unsupported> {
        match self {
            Form::Monolithic => limits::monolithic(config),
            Form::Routed => limits::routed(config),
        }
    }

    /// Resolves `config`, or says everything that is against it.
    pub(crate) fn resolve(self, config: &MoeConfig) -> Result<Supported, Vec<Unsupported>> {
        Supported::resolve(config, self.limits(config))
    }

    /// The same, with one error that lists all reasons.
    pub(crate) fn supported(self, config: &MoeConfig) -> Result<Supported, ExpertsError> {
        Supported::of(config, self.limits(config))
    }

    /// The capabilities under a configuration that is supported.
    pub(crate) fn caps(self, config: &MoeConfig) -> ExpertsCaps {
        let mut caps = ExpertsCaps::host(self.name(), accepted_wires(config));
        if self == Form::Monolithic {
            caps.kind = KernelKind::Monolithic;
            let llama4 = config.routing.as_ref().is_some_and(|r| r.method == RoutingMethod::Llama4);
            caps.weight_on_input =
                llama4 && SchemeLimits::of(config.quant).is_ok_and(|limits| limits.weight_on_input);
        }
        caps
    }
}
