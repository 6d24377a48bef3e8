//! A backend under test: named cases, each run once, and a floor on those that pass.

use std::sync::{Arc, OnceLock};

use fused_moe_core::{Axis, ExpertsProvider, PrepareFinalizeProvider, Unsupported};

use crate::outcome::{Outcome, Settings};
use crate::{comm_suite, experts_suite, monolithic_suite};

type Run = Box<dyn Fn(&'static str, Settings) -> Outcome + Send + Sync>;

/// The suite for one backend. The `conformance_*` macros turn it into tests; this is for running it otherwise.
///
/// ```
/// use moe_conformance::{Suite, reference};
///
/// let suite = Suite::comm(reference::BatchedComm);
/// assert!(suite.outcome("rows_block_ep1").is_pass());
/// // One rank is all that this backend can do, and it says so.
/// assert!(suite.outcome("rows_block_ep2").to_string().contains("parallelism: needs 2 ranks, found 1 rank"));
/// ```
pub struct Suite {
    cases: &'static [&'static str],
    run: Run,
    settings: Settings,
    exceptions: Vec<(&'static str, &'static str)>,
    ended: Vec<OnceLock<Outcome>>,
}

impl std::fmt::Debug for Suite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Suite").field("cases", &self.cases.len()).finish_non_exhaustive()
    }
}

impl Suite {
    /// The suite for a prepare/finalize backend.
    pub fn comm(provider: impl PrepareFinalizeProvider + 'static) -> Self {
        let provider: Arc<dyn PrepareFinalizeProvider> = Arc::new(provider);
        Self::new(
            comm_suite::CASES,
            Box::new(move |case, settings| comm_suite::run(&provider, case, settings)),
        )
    }

    /// The suite for a backend of modular experts.
    pub fn experts(provider: impl ExpertsProvider + 'static) -> Self {
        let provider: Arc<dyn ExpertsProvider> = Arc::new(provider);
        let run = move |case, settings| experts_suite::run(&provider, case, settings);
        Self::new(experts_suite::CASES, Box::new(run))
    }

    /// The suite for a backend of monolithic experts.
    pub fn monolithic(provider: impl ExpertsProvider + 'static) -> Self {
        let provider: Arc<dyn ExpertsProvider> = Arc::new(provider);
        let run = move |case, settings| monolithic_suite::run(&provider, case, settings);
        Self::new(monolithic_suite::CASES, Box::new(run))
    }

    fn new(cases: &'static [&'static str], run: Run) -> Self {
        let ended = cases.iter().map(|_| OnceLock::new()).collect();
        Self { cases, run, settings: Settings::default(), exceptions: Vec::new(), ended }
    }

    /// The suite with other settings, to repeat a failure or to shorten a deadline.
    #[must_use]
    pub fn with_settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// Counts `case` as refused, with the reason. For what a backend cannot say in its capabilities; the floor
    /// shows it.
    #[must_use]
    pub fn except(mut self, case: &'static str, reason: &'static str) -> Self {
        self.exceptions.push((case, reason));
        self
    }

    /// Names of all cases.
    pub fn cases(&self) -> &'static [&'static str] {
        self.cases
    }

    /// How `case` ended. It is run the first time that it is asked for.
    pub fn outcome(&self, case: &str) -> Outcome {
        let Some(index) = self.cases.iter().position(|&name| name == case) else {
            return Outcome::Fail(format!("there is no case {case:?}"));
        };
        let outcome = self.ended[index].get_or_init(|| {
            if let Some((_, why)) = self.exceptions.iter().find(|(name, _)| *name == case) {
                return Outcome::Refused(vec![Unsupported::new(Axis::Library, "this case", *why)]);
            }
            // A seed of its own for each case, whichever of them are run.
            let settings = self.settings.with_seed(self.settings.seed.derive(index as u64));
            (self.run)(self.cases[index], settings).within(format!("run seed {}", self.settings.seed))
        });
        outcome.clone()
    }

    /// Panics if `case` fails; prints the reasons if it is refused.
    ///
    /// # Panics
    /// As it says, with the case, the seed and the first difference: this is the body of a test.
    pub fn assert(&self, case: &str) {
        match self.outcome(case) {
            Outcome::Fail(why) => panic!("{case}: {why}"),
            other => println!("{case}: {other}"),
        }
    }

    /// Panics unless at least `floor` cases pass. Cases that were not run yet are run.
    ///
    /// # Panics
    /// As it says, with the cases that do not pass.
    pub fn assert_floor(&self, floor: usize) {
        let outcomes: Vec<_> = self.cases.iter().map(|case| (case, self.outcome(case))).collect();
        let passed = outcomes.iter().filter(|(_, outcome)| outcome.is_pass()).count();
        let rest = outcomes.iter().filter(|(_, outcome)| !outcome.is_pass());
        let rest: String = rest.map(|(case, outcome)| format!("\n{case}: {outcome}")).collect();
        println!("{passed} of {} cases pass", outcomes.len());
        assert!(passed >= floor, "{passed} cases pass, the floor is {floor}; not passed:{rest}");
    }
}
