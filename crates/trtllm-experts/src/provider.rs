//! The providers: what a registry asks.

use fused_moe_core::{
    Error, ExpertMatrices, ExpertWeights, Experts, ExpertsCaps, ExpertsProvider, MoeConfig, Plan, Rank,
    Result, Stage, Support, check_expert_count,
};
use grouped_gemm::Executor;
use grouped_gemm::experts::PackedExperts;

use crate::TrtllmError;
use crate::compute::{Form, sizes};
use crate::monolithic::MonolithicKernel;
use crate::routed::RoutedKernel;

/// Makes monolithic host experts with the contract of TRTLLM-gen, named `trtllm`.
///
/// They read logits of all experts beside the rows, route by the configuration's method, and write the weighted sum
/// over the experts of this rank: under expert parallelism a partial sum.
#[derive(Clone, Copy, Debug)]
pub struct TrtllmExperts {
    executor: Executor,
}

/// Makes the same experts without their routing, named `trtllm_routed`: ids and weights arrive with the rows.
#[derive(Clone, Copy, Debug)]
pub struct TrtllmRoutedExperts {
    executor: Executor,
}

fn supports(form: Form, config: &MoeConfig) -> Support<ExpertsCaps> {
    match form.resolve(config) {
        Ok(_) => Support::Supported(form.caps(config)),
        Err(reasons) => Support::Unsupported(reasons),
    }
}

/// 0 for a configuration that is not supported.
fn workspace_bytes(form: Form, config: &MoeConfig, plan: &Plan, executor: &Executor) -> usize {
    let Ok(supported) = form.resolve(config) else { return 0 };
    sizes(config, plan, (form, supported), executor).map_or(0, |sizes| sizes.bytes())
}

fn contract(form: Form) -> impl FnOnce(TrtllmError) -> Error {
    move |error| Error::contract(Stage::Experts, form.name(), error)
}

fn pack(form: Form, config: &MoeConfig, rank: Rank, experts: &[ExpertMatrices<'_>]) -> Result<ExpertWeights> {
    check_expert_count(form.name(), config, rank, experts)?;
    let packed = form
        .supported(config)
        .and_then(|supported| PackedExperts::pack(supported.scheme, config, rank, experts))
        .map_err(|error| contract(form)(error.into()))?;
    Ok(packed.into_weights(form.name()))
}

macro_rules! provider {
    ($provider:ident: $form:expr, $kind:ident, $kernel:ident) => {
        impl $provider {
            /// Experts on the fastest instruction set, with the threads of rayon's global pool.
            pub fn new() -> Self {
                Self::with_executor(Executor::detect())
            }

            /// Experts whose GEMMs run on `executor`. The number of threads does not change a bit of the result; the
            /// instruction set may.
            pub fn with_executor(executor: Executor) -> Self {
                Self { executor }
            }
        }

        impl Default for $provider {
            fn default() -> Self {
                Self::new()
            }
        }

        impl ExpertsProvider for $provider {
            fn name(&self) -> &'static str {
                $form.name()
            }

            fn supports(&self, config: &MoeConfig) -> Support<ExpertsCaps> {
                supports($form, config)
            }

            fn workspace_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
                workspace_bytes($form, config, plan, &self.executor)
            }

            fn build(&self, config: &MoeConfig, plan: &Plan, rank: Rank) -> Result<Experts> {
                let kernel = $kernel::new(config, plan, rank, self.executor).map_err(contract($form))?;
                Ok(Experts::$kind(Box::new(kernel)))
            }

            fn pack(
                &self,
                config: &MoeConfig,
                rank: Rank,
                experts: &[ExpertMatrices<'_>],
            ) -> Result<ExpertWeights> {
                pack($form, config, rank, experts)
            }
        }
    };
}

provider!(TrtllmExperts: Form::Monolithic, Monolithic, MonolithicKernel);
provider!(TrtllmRoutedExperts: Form::Routed, Modular, RoutedKernel);
