//! Ranks as processes: this one is rank 0, and starts itself again for the others.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use fused_moe::Rank;
use fused_moe::transport::{Deadline, Endpoint, ProcessOptions, Rendezvous, Token, join_processes};

use super::TIMEOUT;
use super::cells::Group;

/// What tells a process that it is another rank, and which: `address token rank ranks`. In the environment, as arguments
/// can be read by every user of the machine.
pub const SEAT: &str = "FMOE_BENCH_COMM_SEAT";

/// Joining takes no longer, even on a busy machine.
const JOINING: Duration = Duration::from_secs(60);

/// Where a process is to sit.
#[derive(Clone, Copy, Debug)]
pub struct Seat {
    address: SocketAddr,
    token: Token,
    rank: u32,
    /// Ranks in the group.
    pub ranks: usize,
}

impl std::str::FromStr for Seat {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let fields: Vec<&str> = text.split(' ').collect();
        let [address, token, rank, ranks] = fields[..] else { return Err(anyhow!("{SEAT} is no seat")) };
        Ok(Self {
            address: address.parse()?,
            token: token.parse()?,
            rank: rank.parse()?,
            ranks: ranks.parse()?,
        })
    }
}

impl Seat {
    /// Takes the seat.
    pub fn join(&self, group: Group) -> anyhow::Result<Endpoint> {
        let transport = join_processes(&ProcessOptions {
            rank: Rank(self.rank),
            world_size: self.ranks,
            ranks_per_node: NonZeroUsize::new(group.ranks_per_node),
            rendezvous: self.address,
            token: self.token,
            timeout: TIMEOUT,
        })?;
        Ok(Endpoint::new(transport))
    }
}

/// The other ranks, which end with this one.
struct Others(Vec<Child>);

impl Drop for Others {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended cannot be killed, which is what was wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs `body` as rank 0 of `group`; the others run this program with the same arguments.
pub fn run<T>(group: Group, body: impl FnOnce(Endpoint) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let token = Token::random()?;
    let ranks_per_node = NonZeroUsize::new(group.ranks_per_node);
    let rendezvous = Rendezvous::bind(([127, 0, 0, 1], 0).into(), group.ranks, ranks_per_node, token)?;
    let address = rendezvous.address();
    let serving = thread::spawn(move || rendezvous.serve(Deadline::after(JOINING)));

    let mut others = Others(Vec::new());
    for rank in 1..group.ranks {
        let child = Command::new(std::env::current_exe().context("cannot find this program")?)
            .args(std::env::args_os().skip(1))
            .env(SEAT, format!("{address} {token} {rank} {}", group.ranks))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start a rank")?;
        others.0.push(child);
    }
    let seat = Seat { address, token, rank: 0, ranks: group.ranks };
    let joined = seat.join(group);
    serving.join().map_err(|_| anyhow!("the rendezvous panicked"))??;
    let done = body(joined?)?;
    // They have come to their end with this rank; what they may still say is how.
    for (index, child) in others.0.iter_mut().enumerate() {
        let status = child.wait().context("cannot wait for a rank")?;
        if !status.success() {
            return Err(anyhow!("rank {} ended with {status}", index + 1));
        }
    }
    Ok(done)
}
