//! `fmoe chaos`: a layer over processes that are killed, stopped and delayed, round after round.
//!
//! In a round all ranks run the layer once, and one or two of them may meet with a fault. The others must return a right
//! result or a typed error by the deadline. After a loss, they form a smaller group that goes on without the lost
//! experts; a stopped rank wakes up in the middle of that. Then killed ranks are replaced and all form a group again.

pub mod args;
mod crew;
mod messages;
pub mod rank;
mod script;
mod tally;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use fused_moe::router::survivors::LostExpertPolicy;
use fused_moe::transport::{Deadline, Rendezvous, Token};
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;

use crate::exit::{Failure, OrFailure, refused};
use crate::report::{print, print_json};
use crate::run::progress;
use args::{ChaosArgs, FaultKind};
use crew::{Cast, Crew, Event};
use messages::{Held, Join, LayerCall, Order, Outcome, Word};
use rank::Plot;
use script::{Fault, Scene};
use tally::{Leftovers, Life, Memory, Tally};

/// The comm backends that are tried in turn.
const BACKENDS: [&str; 5] =
    ["mori_high_throughput", "mori_low_latency", "allgather_reducescatter", "naive", "batched"];

/// Rounds without a loss after which the ranks form a group for the next backend.
const ROUNDS_PER_GROUP: u64 = 8;

/// Timeouts of the group after which a rank hangs: a call meets several of its deadlines at worst, and others may have the
/// processor.
const PATIENCE: u32 = 14;

const MAX_RANKS: usize = 16;

/// Runs the command.
pub fn run(args: &ChaosArgs) -> Result<(), Failure> {
    if !(2..=MAX_RANKS).contains(&args.ep_size) {
        return refused(format!("--ep-size {}: 2 to {MAX_RANKS} ranks can lose one", args.ep_size));
    }
    if args.rounds == 0 || args.timeout_ms == 0 {
        return refused("--rounds and --timeout-ms are at least 1");
    }
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = args.seed.unwrap_or_else(|| clock.map_or(0, |time| time.as_nanos() as u64));
    let descriptors = Held::now().or_failed()?.descriptors;
    let mut theatre = Theatre::new(args, seed).or_failed()?;
    let bar = progress(args.rounds, "rounds");
    for number in 0..args.rounds {
        theatre.round(number).or_failed()?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mut tally = theatre.close().or_failed()?;
    tally.leftovers.descriptors = Held::now().or_failed()?.descriptors.saturating_sub(descriptors);
    if args.json {
        let mut report = serde_json::to_value(&tally).or_failed()?;
        report["seed"] = seed.into();
        report["clean"] = tally.is_clean().into();
        print_json(&report).or_failed()?;
    } else {
        print_tally(args, seed, &tally).or_failed()?;
    }
    if tally.is_clean() {
        return Ok(());
    }
    let what = format!(
        "{} wrong results, {} hangs, {} errors without a fault, left behind: {:?}",
        tally.wrong, tally.hangs, tally.unexplained, tally.leftovers
    );
    Err(Failure::Failed(anyhow!("{what}; --seed {seed}")))
}

fn print_tally(args: &ChaosArgs, seed: u64, tally: &Tally) -> anyhow::Result<()> {
    let list = |counts: &BTreeMap<String, u64>| {
        let counts: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        if counts.is_empty() { "none".to_string() } else { counts.join(", ") }
    };
    print(format_args!(
        "{} rounds over {} processes, seed {seed}: {} groups, {} processes replaced\n\
         faults: {}\noutcomes: {}\nafter a loss: {}\n\
         WRONG {}, HANG {}, errors without a fault {}\n\
         memory: {:+.0} bytes per rank and group ({} samples, at most {:.1} MiB)\n\
         left behind: {} descriptors and {} mappings of a rank, {} descriptors here, {} processes",
        tally.rounds,
        args.ep_size,
        tally.groups,
        tally.respawned,
        list(&tally.faults),
        list(&tally.outcomes),
        list(&tally.after_loss),
        tally.wrong,
        tally.hangs,
        tally.unexplained,
        tally.memory.slope_bytes_per_group,
        tally.memory.samples,
        tally.memory.largest_bytes as f64 / (1 << 20) as f64,
        tally.leftovers.descriptors_of_ranks,
        tally.leftovers.mappings_of_ranks,
        tally.leftovers.descriptors,
        tally.leftovers.processes,
    ))?;
    tally.complaints.iter().try_for_each(|complaint| print(format_args!("  {complaint}")))
}

/// A run.
struct Theatre {
    crew: Crew,
    plot: Plot,
    random: Pcg64,
    tally: Tally,
    timeout: Duration,
    faults: Vec<FaultKind>,
    everyone: Vec<usize>,
    /// Rounds that the group of everyone has played; `None` if there is no such group.
    played: Option<u64>,
    current: Vec<Life>,
    ended: Vec<Life>,
}

impl Theatre {
    fn new(args: &ChaosArgs, seed: u64) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program")?;
        Ok(Self {
            crew: Crew::new(Cast { program, seats: args.ep_size, seed, sabotage: args.sabotage })?,
            plot: Plot::new(seed, args.ep_size)?,
            random: Pcg64::seed_from_u64(seed),
            tally: Tally::default(),
            timeout: Duration::from_millis(args.timeout_ms),
            faults: args.faults.clone(),
            everyone: (0..args.ep_size).collect(),
            played: None,
            current: (0..args.ep_size).map(|_| Life::default()).collect(),
            ended: Vec::new(),
        })
    }

    /// One round, and what has to be done after it.
    fn round(&mut self, number: u64) -> anyhow::Result<()> {
        self.tally.rounds += 1;
        if self.played.is_some_and(|played| played >= ROUNDS_PER_GROUP) {
            self.leave(&self.everyone.clone())?;
            self.played = None;
        }
        if self.played.is_none() && !self.assemble()? {
            return Ok(());
        }
        self.played = self.played.map(|played| played + 1);
        let scene = Scene::draw(&mut self.random, self.everyone.len(), &self.faults, self.timeout);
        *self.tally.faults.entry(scene.name()).or_default() += 1;
        // Nothing is lost in a whole group, so the policy does not matter.
        self.call(&self.everyone.clone(), number, LostExpertPolicy::Fail, &scene)?;
        self.strike(&scene)?;
        let present: Vec<usize> = self
            .everyone
            .iter()
            .copied()
            .filter(|seat| !scene.loses() || !scene.victims.contains(seat))
            .collect();
        let outcomes = self.collect(&present, number)?;
        for (seat, outcome) in &outcomes {
            let explained = |kind: &str| scene.loses() && kind == "PeerLost";
            self.judge(number, *seat, outcome, explained);
        }
        let left: Vec<usize> = outcomes.into_iter().map(|(seat, _)| seat).collect();
        if scene.loses() || left.len() < present.len() {
            self.recover(number, &scene, &left)?;
        }
        Ok(())
    }

    /// Orders a call.
    fn call(
        &mut self,
        seats: &[usize],
        number: u64,
        policy: LostExpertPolicy,
        scene: &Scene,
    ) -> anyhow::Result<()> {
        seats.iter().try_for_each(|seat| {
            let wait = scene.phase.filter(|_| scene.victims.contains(seat));
            self.crew.order(*seat, &Order::Call(LayerCall { number, policy: policy.name().into(), wait }))
        })
    }

    /// Lets the fault happen.
    fn strike(&mut self, scene: &Scene) -> anyhow::Result<()> {
        let Scene { fault, victims, phase, after } = scene;
        if phase.is_none() {
            std::thread::sleep(*after);
        }
        let deadline = Instant::now() + self.timeout / 4;
        for &seat in victims.iter().filter(|_| phase.is_some()) {
            // One that does not get there in time is struck where it is.
            match self.crew.hear(seat, deadline) {
                Some(Event::Said(Word::Waits)) | None => {}
                Some(other) => self.crew.unhear(seat, other),
            }
        }
        for &seat in victims {
            match fault {
                Fault::None => {}
                Fault::Kill => self.empty(seat)?,
                Fault::Stop => self.crew.stop(seat)?,
                Fault::Delay(_) if phase.is_none() => self.crew.stop(seat)?,
                Fault::Delay(_) => {}
            }
        }
        if let Fault::Delay(delay) = fault {
            std::thread::sleep(*delay);
            victims.iter().try_for_each(|&seat| self.crew.resume(seat))?;
        }
        // A stopped rank hears it when it wakes up.
        victims.iter().filter(|_| phase.is_some()).try_for_each(|&seat| self.crew.order(seat, &Order::Go))
    }

    /// How a call ended on `seats`; those that are missing have hung or died and been replaced.
    fn collect(&mut self, seats: &[usize], number: u64) -> anyhow::Result<Vec<(usize, Outcome)>> {
        let mut outcomes = Vec::new();
        for &seat in seats {
            match self.await_word(seat, &format!("round {number}"), |word| matches!(word, Word::Done(_)))? {
                Some(Word::Done(outcome)) => outcomes.push((seat, outcome)),
                _ => self.crew.fill(seat)?,
            }
        }
        Ok(outcomes)
    }

    /// Waits for a word of `seat`. `None` if it hangs or has died: the seat is empty then.
    fn await_word(
        &mut self,
        seat: usize,
        when: &str,
        wanted: impl Fn(&Word) -> bool,
    ) -> anyhow::Result<Option<Word>> {
        let deadline = Instant::now() + PATIENCE * self.timeout;
        loop {
            match self.crew.hear(seat, deadline) {
                Some(Event::Said(word)) if wanted(&word) => return Ok(Some(word)),
                // It waited later than it was waited for.
                Some(Event::Said(Word::Waits)) => {}
                Some(Event::Said(other)) => {
                    self.tally.unexplained += 1;
                    self.tally.complain(format!("{when}: seat {seat} said {other:?}"));
                    break;
                }
                Some(Event::Ended) => {
                    self.tally.unexplained += 1;
                    self.tally.complain(format!("{when}: the process of seat {seat} ended by itself"));
                    break;
                }
                None => {
                    self.tally.hangs += 1;
                    self.tally.complain(format!("{when}: seat {seat} hangs"));
                    break;
                }
            }
        }
        self.empty(seat)?;
        Ok(None)
    }

    fn judge(&mut self, number: u64, seat: usize, outcome: &Outcome, explained: impl Fn(&str) -> bool) {
        self.tally.count(outcome);
        match outcome {
            Outcome::Right => {}
            Outcome::Wrong(why) => {
                self.tally.wrong += 1;
                self.tally.complain(format!("round {number}: seat {seat} is WRONG: {why}"));
            }
            Outcome::Error { kind, .. } if explained(kind) => {}
            Outcome::Error { text, .. } => {
                self.tally.unexplained += 1;
                self.tally.complain(format!("round {number}: seat {seat} failed without a fault: {text}"));
            }
        }
    }

    /// After a loss: those that are `left` go on as a smaller group for a call, then every seat is filled again.
    fn recover(&mut self, number: u64, scene: &Scene, left: &[usize]) -> anyhow::Result<()> {
        self.played = None;
        let left = self.leave(left)?;
        let members: Vec<u32> = left.iter().map(|&seat| seat as u32).collect();
        let policy = LostExpertPolicy::ALL[self.random.random_range(0..LostExpertPolicy::ALL.len())];
        let is_layer = self.plot.over(&members).is_ok();
        let played = if is_layer { policy.name() } else { "too few experts" };
        *self.tally.after_loss.entry(played.into()).or_default() += 1;
        let stopped: &[usize] = if scene.fault == Fault::Stop { &scene.victims } else { &[] };
        if is_layer && self.form(&left)? {
            self.call(&left, number, policy, &Scene::calm())?;
            std::thread::sleep(scene.after);
            // They wake up, perhaps in the middle of a copy, while the others run.
            stopped.iter().try_for_each(|&seat| self.crew.resume(seat))?;
            let outcomes = self.collect(&left, number)?;
            for (seat, outcome) in outcomes {
                let explained = |kind: &str| policy == LostExpertPolicy::Fail && kind == "RankFailed";
                self.judge(number, seat, &outcome, explained);
            }
        }
        stopped.iter().try_for_each(|&seat| self.crew.resume(seat))?;
        // The others have gone: an error is what there is to say, if not all had arrived before.
        for (seat, outcome) in self.collect(stopped, number)? {
            self.judge(number, seat, &outcome, |kind| kind == "PeerLost");
        }
        self.leave(&self.everyone.clone()).map(drop)
    }

    /// Makes `seats` leave their group. Returns those that did.
    fn leave(&mut self, seats: &[usize]) -> anyhow::Result<Vec<usize>> {
        let mut left = Vec::new();
        seats.iter().try_for_each(|&seat| self.crew.order(seat, &Order::Leave))?;
        for &seat in seats.iter() {
            if self.crew.is_empty(seat) {
                continue;
            }
            if let Some(Word::Left(held)) =
                self.await_word(seat, "leaving", |word| matches!(word, Word::Left(_)))?
            {
                self.current[seat].0.push(held);
                left.push(seat);
            }
        }
        Ok(left)
    }

    /// Fills all seats and makes one group of them; `false` if that fails, and everyone is replaced.
    fn assemble(&mut self) -> anyhow::Result<bool> {
        for seat in self.everyone.clone() {
            if self.crew.is_empty(seat) {
                self.tally.respawned += 1;
                self.crew.fill(seat)?;
                // A new process answers when it is ready.
                self.leave(&[seat])?;
            }
        }
        let formed = self.form(&self.everyone.clone())?;
        self.played = formed.then_some(0);
        Ok(formed)
    }

    /// Makes a group of `seats` for the next backend. Where one cannot join, all of them are replaced.
    fn form(&mut self, seats: &[usize]) -> anyhow::Result<bool> {
        let all2all = BACKENDS[(self.tally.groups % BACKENDS.len() as u64) as usize];
        self.tally.groups += 1;
        let token = Token::random()?;
        let rendezvous = Rendezvous::bind(([127, 0, 0, 1], 0).into(), seats.len(), None, token)?;
        let join = Join {
            rendezvous: rendezvous.address(),
            token: token.to_string(),
            members: seats.iter().map(|&seat| seat as u32).collect(),
            all2all: all2all.into(),
            timeout_ms: self.timeout.as_millis() as u64,
        };
        let deadline = Deadline::after(PATIENCE * self.timeout);
        let host = std::thread::spawn(move || rendezvous.serve(deadline));
        seats.iter().try_for_each(|&seat| self.crew.order(seat, &Order::Join(join.clone())))?;
        let mut all = true;
        for &seat in seats {
            let answer = |word: &Word| matches!(word, Word::Joined | Word::Done(_));
            match self.await_word(seat, "joining", answer)? {
                Some(Word::Joined) => {}
                Some(Word::Done(outcome)) => {
                    self.judge(self.tally.rounds, seat, &outcome, |_| false);
                    all = false;
                }
                _ => all = false,
            }
        }
        let served = host.join().map_err(|_| anyhow!("the rendezvous panicked"))?;
        if let Err(error) = served.as_ref() {
            self.tally.complain(format!("a rendezvous failed: {error}"));
        }
        if !all || served.is_err() {
            seats.iter().try_for_each(|&seat| self.empty(seat))?;
        }
        Ok(all && served.is_ok())
    }

    /// Kills the process of a seat.
    fn empty(&mut self, seat: usize) -> anyhow::Result<()> {
        self.ended.push(std::mem::take(&mut self.current[seat]));
        self.crew.kill(seat)
    }

    /// Ends all processes.
    fn close(mut self) -> anyhow::Result<Tally> {
        self.leave(&self.everyone.clone())?;
        let Self { crew, mut tally, current, ended, .. } = self;
        let lives: Vec<Life> = current.into_iter().chain(ended).collect();
        tally.memory = Memory::of(&lives);
        tally.leftovers = Leftovers { processes: crew.dismiss()?, ..Leftovers::of_ranks(&lives) };
        Ok(tally)
    }
}
