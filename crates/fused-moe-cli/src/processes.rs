//! Ranks that are processes: starting them, and joining their group.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use fused_moe::Rank;
use fused_moe::transport::{
    Deadline, Endpoint, ProcessOptions, Rendezvous, Token, TransportError, join_processes,
};

use crate::exit::{Failure, OrFailure, refused};

/// How long ranks wait for each other before there is a group.
const MEETING: Duration = Duration::from_secs(60);

/// Between two looks at processes.
const LOOK: Duration = Duration::from_millis(10);

/// A group that is to be: what all its ranks are told.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Ranks in it.
    pub world_size: usize,
    /// Ranks on each node.
    pub ranks_per_node: Option<NonZeroUsize>,
    /// The timeout of its waits.
    pub timeout: Duration,
}

impl Group {
    /// Opens a rendezvous for the group and holds it in the background. What each rank needs to come there.
    pub fn meet(self) -> Result<impl Fn(Rank) -> ProcessOptions, TransportError> {
        let Self { world_size, ranks_per_node, timeout } = self;
        let token = Token::random()?;
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let meeting = Rendezvous::bind(loopback, world_size, ranks_per_node, token)?;
        let rendezvous = meeting.address();
        std::thread::spawn(move || {
            // The ranks that come are told the same.
            if let Err(error) = meeting.serve(Deadline::after(MEETING)) {
                tracing::warn!(%error, "the ranks did not meet");
            }
        });
        Ok(move |rank| ProcessOptions { rank, world_size, ranks_per_node, rendezvous, token, timeout })
    }
}

/// Processes of ranks. What is left of them when this is dropped is killed.
#[derive(Debug, Default)]
pub struct Children {
    running: Vec<(Rank, Child)>,
}

/// How the process of a rank ended, if not well.
#[derive(Clone, Copy, Debug)]
pub struct BadEnd {
    /// The rank.
    pub rank: Rank,
    /// How.
    pub status: ExitStatus,
}

impl std::fmt::Display for BadEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ended with {}", self.rank, self.status)
    }
}

impl std::error::Error for BadEnd {}

impl Children {
    /// Starts `command` as the rank of `options`. It is killed when this process ends, however that happens.
    pub fn start(
        &mut self,
        command: impl IntoIterator<Item = impl AsRef<OsStr>>,
        options: &ProcessOptions,
        stdout: Stdio,
    ) -> anyhow::Result<()> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let child = Command::new(program)
            .args(["launch-rank", &std::process::id().to_string(), "--"])
            .args(command)
            .envs(options.to_vars())
            .stdout(stdout)
            .stdin(Stdio::null())
            .spawn();
        self.running.push((options.rank, child.with_context(|| format!("cannot start {}", options.rank))?));
        Ok(())
    }

    /// Those that have ended, if one of them did not end well; forgets the others that have ended.
    pub fn look(&mut self) -> Option<BadEnd> {
        let mut bad = None;
        self.running.retain_mut(|(rank, child)| match child.try_wait() {
            Ok(Some(status)) => {
                if !status.success() {
                    bad = bad.or(Some(BadEnd { rank: *rank, status }));
                }
                false
            }
            Ok(None) => true,
            // It is not a child of this process, so it has ended.
            Err(_) => false,
        });
        bad
    }

    /// Waits until all have ended, or one not well, or `limit` has passed. Whether any is left.
    pub fn wait(&mut self, limit: Option<Instant>) -> Result<bool, BadEnd> {
        loop {
            if let Some(bad) = self.look() {
                return Err(bad);
            }
            if self.running.is_empty() || limit.is_some_and(|limit| Instant::now() >= limit) {
                return Ok(!self.running.is_empty());
            }
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for (_, child) in &mut self.running {
            // Errors mean that it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// One rank's end of a group of processes, and the other ranks if this process has started them.
#[derive(Debug)]
pub struct World {
    /// The end.
    pub endpoint: Endpoint,
    children: Children,
}

impl World {
    /// Joins a group of `group`'s size: as the rank that the environment makes this process; or, if it makes it none,
    /// as rank 0 of processes that run the arguments of this one.
    pub fn join(group: Group) -> Result<Self, Failure> {
        let given = ProcessOptions::from_vars(|name| std::env::var(name).ok()).or_refused()?;
        let Some(given) = given else { return Self::start(group).or_failed() };
        let per_node = |of: Option<NonZeroUsize>| of.map_or(group.world_size, NonZeroUsize::get);
        let (mine, theirs) = (per_node(group.ranks_per_node), per_node(given.ranks_per_node));
        if (given.world_size, theirs) != (group.world_size, mine) {
            return refused(format!(
                "--ep-size {} --gpus-per-node {mine} among {} ranks that were launched, {theirs} per node",
                group.world_size, given.world_size
            ));
        }
        let joined = join_processes(&ProcessOptions { timeout: group.timeout, ..given });
        let endpoint = Endpoint::new(joined.or_failed()?);
        Ok(Self { endpoint, children: Children::default() })
    }

    fn start(group: Group) -> anyhow::Result<Self> {
        let options = group.meet()?;
        let mut children = Children::default();
        let program = std::env::current_exe().context("cannot find this program")?;
        for rank in (1..group.world_size as u32).map(Rank) {
            let command =
                std::iter::once(program.clone().into_os_string()).chain(std::env::args_os().skip(1));
            children.start(command, &options(rank), Stdio::null())?;
        }
        let mine = options(Rank(0));
        let joining = std::thread::spawn(move || join_processes(&mine));
        while !joining.is_finished() {
            if let Some(bad) = children.look() {
                bail!("{bad} before it had joined");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let joined = joining.join().map_err(|_| anyhow!("joining the group panicked"))?;
        Ok(Self { endpoint: Endpoint::new(joined?), children })
    }

    /// Whether this rank is the one that reports.
    pub fn reports(&self) -> bool {
        self.endpoint.transport().rank() == Rank(0)
    }

    /// Waits until the processes that this one has started have ended.
    pub fn end(mut self) -> Result<(), BadEnd> {
        self.children.wait(Some(Instant::now() + MEETING)).map(drop)
    }
}
