//! The combination matrix: every dispatch/combine backend with every experts backend, scheme, format and size of the
//! group, one test per cell.
//!
//! A cell that the backends' own capabilities say fits must agree with the oracle in all its cases; any other must be
//! refused with reasons, and must refuse to be built. `cargo xtask matrix --full` runs every case of every cell.

use std::collections::BTreeSet;
use std::process::ExitCode;

use fused_moe::{Activation, ActivationFormat, QuantScheme, Registry, Selection};
use libtest_mimic::{Arguments, Failed, Trial};
use moe_conformance::{Case, EP_SIZES, Outcome, SCHEMES, Settings, Topology, layer, reference};

/// Cells that must fit at least, so that a backend which starts to refuse does not go unnoticed: what fitted when it
/// was counted, over every dispatch and experts backend of this workspace and the reference ones.
const FLOOR: usize = 1139;

/// Cases of a covering per cell in the daily run.
const DAILY_CASES: usize = 6;

/// Whether a scheme is in the daily run; the FNUZ formats join in the full one.
fn is_daily((name, _): &&(&'static str, QuantScheme)) -> bool {
    !name.ends_with("fnuz")
}

fn registry() -> Registry {
    fused_moe::default_backends()
        .with_comm(reference::ReferenceComm)
        .with_comm(reference::BatchedComm)
        .with_experts(reference::ReferenceExperts)
        .with_experts(reference::BatchedExperts)
        .with_experts(reference::MonolithicExperts)
}

/// One cell of the matrix.
#[derive(Clone, Copy)]
struct Cell {
    comm: &'static str,
    experts: &'static str,
    scheme: (&'static str, QuantScheme),
    topology: Topology,
}

impl Cell {
    fn name(&self) -> String {
        format!("{}::{}::{}::{}", self.comm, self.experts, self.scheme.0, self.topology)
    }

    fn selection(&self) -> Selection<'static> {
        Selection { comm: Some(self.comm), experts: Some(self.experts) }
    }

    fn cases(&self, full: bool, settings: Settings) -> Vec<Case> {
        let (quant, seed) = (self.scheme.1, settings.seed);
        let Topology { ranks, nodes } = self.topology;
        let mut cases = match full {
            true => Case::covering(quant, ranks, seed).into_iter().map(|case| case.on_nodes(nodes)).collect(),
            false => Case::covering_part(quant, self.topology, seed),
        };
        // Drawn anew in every run, so that these get to all pairs of factors in time.
        if !full {
            cases.truncate(DAILY_CASES);
        }
        // What gpt-oss has, and what fills up tiles; a backend may refuse either.
        let plain = Case::plain(quant, ranks, seed).on_nodes(nodes);
        cases.push(Case { activation: Activation::SWIGLU_OAI, expert_bias: true, ..plain.clone() });
        cases.push(plain.clone().padded());
        cases.push(plain);
        cases
    }

    /// Format of the plan for this cell, `None` if it does not fit.
    fn format(&self, registry: &Registry, settings: Settings) -> Option<ActivationFormat> {
        let Topology { ranks, nodes } = self.topology;
        let config = Case::plain(self.scheme.1, ranks, settings.seed).on_nodes(nodes).config();
        let survey = registry.survey(&config, self.selection()).ok()?;
        survey.fitting.first().map(|plan| plan.format())
    }

    /// All cases of the cell. Individual cases may be refused (a router weight on the input that neither side
    /// applies), but in a cell that fits, not all of them.
    fn run(&self, registry: &Registry, fits: bool, full: bool, settings: Settings) -> Result<(), Failed> {
        let mut passed = 0;
        for case in self.cases(full, settings) {
            match layer::run(registry, &case, self.selection(), settings) {
                Outcome::Pass => passed += 1,
                Outcome::Refused(_) => {}
                Outcome::Fail(why) => return Err(why.into()),
            }
        }
        match (fits, passed) {
            (true, 0) => Err("the cell fits, but every case of it was refused".into()),
            (false, 1..) => Err(format!("the cell does not fit, but {passed} cases of it passed").into()),
            _ => Ok(()),
        }
    }
}

fn main() -> ExitCode {
    let (mine, theirs): (Vec<String>, Vec<String>) = std::env::args().partition(|arg| arg == "--full");
    let full = !mine.is_empty();
    let arguments = Arguments::from_iter(theirs);
    let settings = Settings::default();
    let registry = registry();

    let schemes: Vec<_> = SCHEMES.iter().filter(|scheme| full || is_daily(scheme)).collect();
    let mut cells = Vec::new();
    for comm in registry.comm_names() {
        for experts in registry.experts_names() {
            for &&scheme in &schemes {
                let topologies = EP_SIZES.map(Topology::one_node).into_iter().chain(Topology::MULTI_NODE);
                cells.extend(topologies.map(|topology| Cell { comm, experts, scheme, topology }));
            }
        }
    }
    let mut trials = Vec::new();
    let mut formats = BTreeSet::new();
    let mut fitting = 0;
    for cell in cells {
        let format = cell.format(&registry, settings);
        fitting += usize::from(format.is_some());
        formats.extend(format.map(ActivationFormat::name));
        let registry = registry.clone();
        let kind = if format.is_some() { "fits" } else { "refused" };
        let run = move || cell.run(&registry, format.is_some(), full, settings);
        trials.push(Trial::test(cell.name(), run).with_kind(kind));
    }
    trials.push(Trial::test("floor", move || {
        if fitting < FLOOR {
            return Err(format!("{fitting} cells fit, at least {FLOOR} must").into());
        }
        if formats.len() < 2 {
            return Err(format!("only the formats {formats:?} are covered").into());
        }
        Ok(())
    }));
    println!("seed {}", settings.seed);
    libtest_mimic::run(&arguments, trials).exit_code()
}
