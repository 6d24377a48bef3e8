//! Experts on the GPU that are broken on purpose: the suite has to fail them, in cases that the unbroken ones pass.

use fused_moe_core::{
    Dispatched, ExecCx, ExpertMatrices, ExpertWeights, Experts, ExpertsCaps, ExpertsModular, ExpertsProvider,
    MoeConfig, Plan, Rank, Result, Support, TensorViewMut,
};
use gpu_experts::GpuExperts;
use libtest_mimic::{Failed, Trial};
use moe_conformance::{Outcome, Suite};
use moe_kernels::Gpu;

use crate::conformance::settings;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    /// Gate and up are packed in each other's place.
    SwappedGateUp,
    /// Every expert has the weights of the next one.
    NextExpert,
    /// Every expert has the scales of the next one.
    NextScales,
    /// The second call of a kernel does nothing.
    OnlyOnce,
}

struct Broken {
    experts: GpuExperts,
    bug: Bug,
}

impl ExpertsProvider for Broken {
    fn name(&self) -> &'static str {
        self.experts.name()
    }

    fn supports(&self, config: &MoeConfig) -> Support<ExpertsCaps> {
        self.experts.supports(config)
    }

    fn workspace_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        self.experts.workspace_bytes(config, plan)
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, rank: Rank) -> Result<Experts> {
        let built = self.experts.build(config, plan, rank)?;
        Ok(match (built, self.bug) {
            (Experts::Modular(experts), Bug::OnlyOnce) => {
                Experts::Modular(Box::new(OnlyOnce { experts, calls: Default::default() }))
            }
            (built, _) => built,
        })
    }

    fn pack(&self, config: &MoeConfig, rank: Rank, experts: &[ExpertMatrices<'_>]) -> Result<ExpertWeights> {
        let mut broken = experts.to_vec();
        match self.bug {
            Bug::SwappedGateUp => broken.iter_mut().for_each(|e| std::mem::swap(&mut e.gate, &mut e.up)),
            Bug::NextExpert => broken.rotate_left(1),
            Bug::NextScales => {
                for (expert, next) in broken.iter_mut().zip(experts.iter().cycle().skip(1)) {
                    expert.gate.scale = next.gate.scale;
                    expert.up.scale = next.up.scale;
                    expert.down.scale = next.down.scale;
                }
            }
            Bug::OnlyOnce => {}
        }
        self.experts.pack(config, rank, &broken)
    }
}

struct OnlyOnce {
    experts: Box<dyn ExpertsModular>,
    calls: std::sync::atomic::AtomicUsize,
}

impl ExpertsModular for OnlyOnce {
    fn caps(&self) -> &ExpertsCaps {
        self.experts.caps()
    }

    fn workspace_bytes(&self) -> usize {
        self.experts.workspace_bytes()
    }

    fn apply(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &Dispatched<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        match self.calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            0 => self.experts.apply(cx, weights, input, out),
            _ => Ok(()),
        }
    }
}

/// One trial for each.
pub fn trials(gpu: &Gpu) -> Vec<Trial> {
    let table: [(Bug, &[(&str, &str)]); 4] = [
        (
            Bug::SwappedGateUp,
            &[("oracle_none_ep1", "relative L2 error"), ("oracle_block_ep2", "relative L2 error")],
        ),
        (
            Bug::NextExpert,
            &[("oracle_ptpc_ep1", "relative L2 error"), ("foreignids_none_ep3", "relative L2")],
        ),
        // Of channels: those of blocks are nearly the same for all experts.
        (Bug::NextScales, &[("oracle_ptpc_ep1", "relative L2 error"), ("oracle_ptpc_ep2", "relative L2")]),
        (Bug::OnlyOnce, &[("oracle_none_ep1", "other bits the second time")]),
    ];
    let trial = |(bug, cases): (Bug, &'static [(&'static str, &'static str)])| {
        let gpu = gpu.clone();
        Trial::test(format!("cuda::saboteurs::{bug:?}"), move || {
            cases.iter().try_for_each(|&(case, because)| fails(&gpu, bug, case, because))
        })
    };
    table.into_iter().map(trial).collect()
}

fn fails(gpu: &Gpu, bug: Bug, case: &str, because: &str) -> std::result::Result<(), Failed> {
    let experts = GpuExperts::new(gpu.clone());
    let broken = Suite::experts(Broken { experts, bug }).with_settings(settings(gpu)?);
    match broken.outcome(case) {
        Outcome::Fail(why) if why.contains(because) => Ok(()),
        other => Err(format!("{case} of the saboteur: {other}").into()),
    }
}
