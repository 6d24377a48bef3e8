//! The processes of `fmoe chaos`, and their signals.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process};

use super::args::Sabotage;
use super::messages::{Order, Word};

/// How a process is started.
#[derive(Clone, Debug)]
pub struct Cast {
    pub program: PathBuf,
    pub seats: usize,
    pub seed: u64,
    pub sabotage: Option<Sabotage>,
}

/// One process per seat. A seat whose process is killed is empty until it is filled again.
pub struct Crew {
    cast: Cast,
    seats: Vec<Option<Member>>,
    lives: u64,
    words: (Sender<Heard>, Receiver<Heard>),
}

struct Member {
    child: Child,
    life: u64,
    /// What it has said and nobody has asked for yet.
    inbox: VecDeque<Event>,
}

struct Heard {
    seat: usize,
    life: u64,
    event: Event,
}

/// What came from a seat.
#[derive(Debug)]
pub enum Event {
    Said(Word),
    /// Its process has ended, or talks nonsense.
    Ended,
}

impl Crew {
    pub fn new(cast: Cast) -> anyhow::Result<Self> {
        let mut crew =
            Self { seats: (0..cast.seats).map(|_| None).collect(), cast, lives: 0, words: channel() };
        (0..crew.seats.len()).try_for_each(|seat| crew.fill(seat))?;
        Ok(crew)
    }

    pub fn is_empty(&self, seat: usize) -> bool {
        self.seats[seat].is_none()
    }

    /// Starts a process for an empty seat.
    pub fn fill(&mut self, seat: usize) -> anyhow::Result<()> {
        if self.seats[seat].is_some() {
            return Ok(());
        }
        let Cast { program, seats, seed, sabotage } = &self.cast;
        let mut command = Command::new(program);
        command
            .args(["chaos-rank", "--seed", &seed.to_string(), "--seats", &seats.to_string()])
            .args(["--seat", &seat.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(sabotage) = sabotage.as_ref().and_then(ValueEnum::to_possible_value).filter(|_| seat == 0)
        {
            command.args(["--sabotage", sabotage.get_name()]);
        }
        let mut child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
        self.lives += 1;
        let (life, words) = (self.lives, self.words.0.clone());
        let lines = BufReader::new(child.stdout.take().context("a child without stdout")?).lines();
        std::thread::spawn(move || {
            let words_of = lines.map_while(Result::ok).map_while(|line| serde_json::from_str(&line).ok());
            let events = words_of.map(Event::Said).chain(std::iter::once(Event::Ended));
            // Nobody listens any more once the crew is gone.
            for event in events {
                if words.send(Heard { seat, life, event }).is_err() {
                    return;
                }
            }
        });
        self.seats[seat] = Some(Member { child, life, inbox: VecDeque::new() });
        Ok(())
    }

    /// Tells a seat what to do. A process that has ended does not hear it.
    pub fn order(&mut self, seat: usize, order: &Order) -> anyhow::Result<()> {
        let Some(member) = &mut self.seats[seat] else { return Ok(()) };
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        if let Some(stdin) = &mut member.child.stdin {
            // A broken pipe shows as an ended process soon enough.
            let _ = stdin.write_all(&line).and_then(|()| stdin.flush());
        }
        Ok(())
    }

    /// The next that comes from a seat; `None` at the deadline.
    pub fn hear(&mut self, seat: usize, deadline: Instant) -> Option<Event> {
        loop {
            match &mut self.seats[seat] {
                None => return Some(Event::Ended),
                Some(member) => {
                    if let Some(event) = member.inbox.pop_front() {
                        return Some(event);
                    }
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let Heard { seat: from, life, event } = self.words.1.recv_timeout(left).ok()?;
            // A process that was killed may have said something before.
            if let Some(member) = self.seats[from].as_mut().filter(|member| member.life == life) {
                member.inbox.push_back(event);
            }
        }
    }

    /// Puts back what [`Crew::hear`] gave.
    pub fn unhear(&mut self, seat: usize, event: Event) {
        if let Some(member) = &mut self.seats[seat] {
            member.inbox.push_front(event);
        }
    }

    /// Kills the process of a seat, however it is, and leaves the seat empty.
    pub fn kill(&mut self, seat: usize) -> anyhow::Result<()> {
        if let Some(mut member) = self.seats[seat].take() {
            member.child.kill().context("killing a rank")?;
            member.child.wait().context("waiting for a killed rank")?;
        }
        Ok(())
    }

    /// Stops a process in its tracks.
    pub fn stop(&self, seat: usize) -> anyhow::Result<()> {
        self.signal(seat, Signal::STOP)
    }

    /// Lets it go on.
    pub fn resume(&self, seat: usize) -> anyhow::Result<()> {
        self.signal(seat, Signal::CONT)
    }

    fn signal(&self, seat: usize, signal: Signal) -> anyhow::Result<()> {
        let Some(member) = &self.seats[seat] else { return Ok(()) };
        let pid = i32::try_from(member.child.id()).ok().and_then(Pid::from_raw).context("a process id")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Ends all processes and waits for them; how many did not end by themselves.
    pub fn dismiss(mut self) -> anyhow::Result<usize> {
        let mut stubborn = 0;
        let deadline = Instant::now() + Duration::from_secs(10);
        for member in self.seats.iter_mut().flatten() {
            member.child.stdin = None;
        }
        for member in self.seats.iter_mut().flatten() {
            let ended = loop {
                if member.child.try_wait()?.is_some() {
                    break true;
                }
                if Instant::now() >= deadline {
                    break false;
                }
                std::thread::sleep(Duration::from_millis(1));
            };
            stubborn += usize::from(!ended);
        }
        Ok(stubborn)
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for seat in 0..self.seats.len() {
            let _ = self.kill(seat);
        }
    }
}
