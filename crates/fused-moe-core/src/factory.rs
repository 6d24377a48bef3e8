//! Choosing a pair: every provider is asked, every refusal is kept, and nothing is built before all ranks agree.

use std::sync::Arc;

use crate::config::MoeConfig;
use crate::dtype::DeviceKind;
use crate::error::{Error, ErrorKind, Stage};
use crate::group::{ProcessGroup, first_mismatch};
use crate::kernel::{FusedMoEKernel, KernelBytes, ModularKernel, MonolithicKernel, OutputShape};
use crate::negotiate::{Axis, ExpertsCaps, Plan, Support, Unsupported, negotiate};
use crate::placement::Rank;
use crate::provider::{Experts, ExpertsProvider, PrepareFinalize, PrepareFinalizeProvider};
use crate::workspace::{DeviceAllocator, Workspace};

const FACTORY: &str = "factory";

/// Why nothing was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MakeError {
    /// No backend of that name is registered.
    #[error("unknown {stage} backend {name:?}{}; known: {}", hint(.name, .known), .known.join(", "))]
    UnknownBackend {
        /// "all2all" or "experts".
        stage: &'static str,
        /// The name that was asked for.
        name: String,
        /// The names that are registered.
        known: Vec<&'static str>,
    },
    /// No pair fits; all of them, with all reasons.
    #[error("no backends fit{}", list(.0))]
    NoneFits(Vec<RefusedPair>),
    /// A fitting pair could not be built.
    #[error(transparent)]
    Build(#[from] Error),
}

/// Names that begin with what was asked for: `mori` alone is neither of its successors.
fn hint(name: &str, known: &[&'static str]) -> String {
    let near: Vec<&str> = known.iter().copied().filter(|k| !name.is_empty() && k.starts_with(name)).collect();
    if near.is_empty() { String::new() } else { format!(" (use {})", near.join(" or ")) }
}

fn list(refused: &[RefusedPair]) -> String {
    refused.iter().map(|pair| format!("\n  {pair}")).collect()
}

/// A pair that does not fit, with every reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedPair {
    /// Name of the prepare/finalize backend; `-` when the experts alone refuse.
    pub comm: &'static str,
    /// Name of the experts backend.
    pub experts: &'static str,
    /// All reasons.
    pub reasons: Vec<Unsupported>,
}

impl std::fmt::Display for RefusedPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reasons: Vec<String> = self.reasons.iter().map(ToString::to_string).collect();
        write!(f, "{} x {}: {}", self.comm, self.experts, reasons.join("; "))
    }
}

/// Names to choose from; `None` means any, in order of registration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selection<'a> {
    /// Prepare/finalize backend.
    pub comm: Option<&'a str>,
    /// Experts backend.
    pub experts: Option<&'a str>,
}

/// The verdict on every pair that a selection allows.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Pairs that fit, best first.
    pub fitting: Vec<Plan>,
    /// Pairs that do not, with every reason.
    pub refused: Vec<RefusedPair>,
}

/// Picks the first provider that fits `experts` and builds it: quantized or unquantized dispatch, as negotiated.
///
/// There is always an answer: a backend, or every provider's reasons. EP = 1 is not an exception, it needs a
/// provider for one rank.
///
/// # Errors
/// [`MakeError::NoneFits`] and [`MakeError::Build`].
pub fn maybe_make_prepare_finalize(
    providers: &[&dyn PrepareFinalizeProvider],
    config: &MoeConfig,
    experts: &ExpertsCaps,
    group: &dyn ProcessGroup,
) -> Result<(Plan, PrepareFinalize), MakeError> {
    let mut refused = Vec::new();
    let mut chosen = None;
    for provider in providers {
        match fit(*provider, config, experts) {
            Ok(plan) => {
                chosen = Some((*provider, plan));
                break;
            }
            Err(reasons) => {
                refused.push(RefusedPair { comm: provider.name(), experts: experts.name, reasons })
            }
        }
    }
    agree(config, chosen.as_ref().map(|(_, plan)| plan), group)?;
    let (provider, plan) = chosen.ok_or(MakeError::NoneFits(refused))?;
    let built = provider.build(config, &plan, group)?;
    Ok((plan, built))
}

fn fit(
    provider: &dyn PrepareFinalizeProvider,
    config: &MoeConfig,
    experts: &ExpertsCaps,
) -> Result<Plan, Vec<Unsupported>> {
    let contradictions = config.contradictions();
    if !contradictions.is_empty() {
        return Err(contradictions);
    }
    match provider.supports(config, experts.kind) {
        Support::Supported(caps) => negotiate(config, &caps, experts),
        Support::Unsupported(reasons) => Err(reasons),
    }
}

/// Compares configuration and plan over all ranks, so that a difference is an error on all of them and not a hang.
fn agree(config: &MoeConfig, plan: Option<&Plan>, group: &dyn ProcessGroup) -> Result<(), Error> {
    let mut fields = config.fingerprint();
    fields.push(("comm", plan.map_or("none", Plan::comm).to_string()));
    fields.push(("experts", plan.map_or("none", Plan::experts).to_string()));
    fields.push(("wire", plan.map_or("none".into(), |p| p.wire().to_string())));
    fields.push(("partial_sums", plan.map_or("none".into(), |p| p.partial_sums().to_string())));
    fields.push(("accumulation", plan.map_or("none".into(), |p| p.accumulation().to_string())));
    fields.push(("max_rows", plan.map_or("none".into(), |p| p.max_rows().to_string())));
    if let Some(mismatch) = first_mismatch(group, &fields)? {
        let kind = ErrorKind::Mismatch(Box::new(mismatch));
        return Err(Error::new(kind, Stage::QuantizeDispatch, FACTORY));
    }
    let (wanted, found) = (config.ep_size(), group.world_size());
    if wanted != found {
        let why = format!("the placement is for {wanted} ranks, the group has {found}");
        return Err(Error::contract(Stage::QuantizeDispatch, FACTORY, why));
    }
    Ok(())
}

/// The backends that a program knows, in order of preference.
#[derive(Clone, Default)]
pub struct Registry {
    comm: Vec<Arc<dyn PrepareFinalizeProvider>>,
    experts: Vec<Arc<dyn ExpertsProvider>>,
    memory: Vec<Arc<dyn DeviceAllocator>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (comm, experts) = (self.comm_names(), self.experts_names());
        f.debug_struct("Registry").field("comm", &comm).field("experts", &experts).finish()
    }
}

impl Registry {
    /// A registry that knows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a prepare/finalize provider behind the others.
    #[must_use]
    pub fn with_comm(mut self, provider: impl PrepareFinalizeProvider + 'static) -> Self {
        self.comm.push(Arc::new(provider));
        self
    }

    /// Adds an experts provider behind the others.
    #[must_use]
    pub fn with_experts(mut self, provider: impl ExpertsProvider + 'static) -> Self {
        self.experts.push(Arc::new(provider));
        self
    }

    /// Lets kernels be built on the kind of device that `memory` is of; of two of a kind the first serves.
    #[must_use]
    pub fn with_memory(mut self, memory: Arc<dyn DeviceAllocator>) -> Self {
        self.memory.push(memory);
        self
    }

    /// What allocates for `kind`; `None` for the host, which needs none, and for a device that nobody registered.
    fn memory(&self, kind: DeviceKind) -> Option<&dyn DeviceAllocator> {
        self.memory.iter().map(|memory| &**memory).find(|memory| memory.device().kind == kind)
    }

    /// Why nothing can be built on `kind`, however well backends fit.
    fn without_memory(&self, kind: DeviceKind) -> Option<Unsupported> {
        let missing = kind != DeviceKind::Host && self.memory(kind).is_none();
        missing.then(|| Unsupported::new(Axis::Device, format!("memory of {kind:?}"), "no allocator for it"))
    }

    /// Names of the prepare/finalize providers, in order.
    pub fn comm_names(&self) -> Vec<&'static str> {
        self.comm.iter().map(|p| p.name()).collect()
    }

    /// Names of the experts providers, in order.
    pub fn experts_names(&self) -> Vec<&'static str> {
        self.experts.iter().map(|p| p.name()).collect()
    }

    /// The prepare/finalize provider of that name.
    ///
    /// # Errors
    /// [`MakeError::UnknownBackend`].
    pub fn comm(&self, name: &str) -> Result<&Arc<dyn PrepareFinalizeProvider>, MakeError> {
        self.comm.iter().find(|p| p.name() == name).ok_or_else(|| MakeError::UnknownBackend {
            stage: "all2all",
            name: name.into(),
            known: self.comm_names(),
        })
    }

    /// The experts provider of that name.
    ///
    /// # Errors
    /// [`MakeError::UnknownBackend`].
    pub fn experts(&self, name: &str) -> Result<&Arc<dyn ExpertsProvider>, MakeError> {
        self.experts.iter().find(|p| p.name() == name).ok_or_else(|| MakeError::UnknownBackend {
            stage: "experts",
            name: name.into(),
            known: self.experts_names(),
        })
    }

    /// Asks every pair that `selection` allows. Pure: nothing is allocated.
    ///
    /// # Errors
    /// [`MakeError::UnknownBackend`].
    pub fn survey(&self, config: &MoeConfig, selection: Selection<'_>) -> Result<Survey, MakeError> {
        let comm = match selection.comm {
            Some(name) => std::slice::from_ref(self.comm(name)?),
            None => &self.comm,
        };
        let experts = match selection.experts {
            Some(name) => std::slice::from_ref(self.experts(name)?),
            None => &self.experts,
        };
        let without_memory = self.without_memory(config.device);
        let mut survey = Survey { fitting: Vec::new(), refused: Vec::new() };
        for experts in experts {
            let mut contradictions = config.contradictions();
            let caps = match experts.supports(config) {
                Support::Supported(caps) if contradictions.is_empty() => caps,
                Support::Supported(_) => {
                    let reasons = contradictions;
                    survey.refused.push(RefusedPair { comm: "-", experts: experts.name(), reasons });
                    continue;
                }
                Support::Unsupported(reasons) => {
                    contradictions.extend(reasons);
                    let reasons = contradictions;
                    survey.refused.push(RefusedPair { comm: "-", experts: experts.name(), reasons });
                    continue;
                }
            };
            for comm in comm {
                let fitted = fit(&**comm, config, &caps).and_then(|plan| match &without_memory {
                    Some(reason) => Err(vec![reason.clone()]),
                    None => Ok(plan),
                });
                match fitted {
                    Ok(plan) => survey.fitting.push(plan),
                    Err(reasons) => {
                        survey.refused.push(RefusedPair {
                            comm: comm.name(),
                            experts: experts.name(),
                            reasons,
                        });
                    }
                }
            }
        }
        Ok(survey)
    }

    /// Bytes that a kernel for `plan` holds on `rank`: what [`Registry::build`] allocates.
    ///
    /// # Errors
    /// [`MakeError::UnknownBackend`].
    pub fn required_bytes(
        &self,
        config: &MoeConfig,
        plan: &Plan,
        rank: Rank,
    ) -> Result<KernelBytes, MakeError> {
        let (expert_out, reduced) = OutputShape::new(config, plan, rank).bytes(config, plan);
        Ok(KernelBytes {
            comm: self.comm(plan.comm())?.required_bytes(config, plan),
            workspace: Workspace::rounded(self.experts(plan.experts())?.workspace_bytes(config, plan)),
            expert_out: expert_out + reduced,
        })
    }

    /// Builds this rank's kernel for the first pair that fits. Collective: all ranks first compare their
    /// configuration and plan.
    ///
    /// # Errors
    /// [`MakeError`]; a difference between ranks is [`ErrorKind::Mismatch`] on all of them.
    pub fn build(
        &self,
        config: &MoeConfig,
        selection: Selection<'_>,
        group: &dyn ProcessGroup,
    ) -> Result<FusedMoEKernel, MakeError> {
        let survey = self.survey(config, selection);
        let plan = survey.as_ref().ok().and_then(|survey| survey.fitting.first());
        // A rank that cannot even look takes part, so that the others need not wait for their deadline.
        let agreed = agree(config, plan, group);
        let survey = survey?;
        agreed?;
        let plan = survey.fitting.first();
        let plan = plan.cloned().ok_or(MakeError::NoneFits(survey.refused))?;
        let (rank, memory) = (group.rank(), self.memory(config.device));
        let experts = self.experts(plan.experts())?.build(config, &plan, rank)?;
        let prepare_finalize = self.comm(plan.comm())?.build(config, &plan, group)?;
        Ok(match (prepare_finalize, experts) {
            (PrepareFinalize::Modular(p), Experts::Modular(e)) => {
                FusedMoEKernel::Modular(ModularKernel::new_in(config.clone(), plan, rank, p, e, memory)?)
            }
            (PrepareFinalize::Monolithic(p), Experts::Monolithic(e)) => FusedMoEKernel::Monolithic(
                MonolithicKernel::new_in(config.clone(), plan, rank, p, e, memory)?,
            ),
            (p, e) => {
                let why = Unsupported::new(Axis::KernelKind, format!("{e:?}"), format!("{p:?}"));
                return Err(Error::contract(Stage::QuantizeDispatch, FACTORY, why.to_string()).into());
            }
        })
    }
}
