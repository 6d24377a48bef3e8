//! Starting the ranks of a test, stopping and killing them.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use ep_transport::{Deadline, ProcessOptions, Rendezvous, Result, Token};
use fused_moe_core::Rank;
use rand::RngCore;

/// Where a group meets, as arguments of its ranks.
pub struct Place {
    pub world_size: usize,
    pub ranks_per_node: usize,
    pub address: SocketAddr,
    pub token: Token,
    pub seed: u64,
}

impl Place {
    pub fn options(&self, rank: u32) -> ProcessOptions {
        ProcessOptions {
            rank: Rank(rank),
            world_size: self.world_size,
            ranks_per_node: NonZeroUsize::new(self.ranks_per_node),
            rendezvous: self.address,
            token: self.token,
            timeout: Duration::from_secs(30),
        }
    }
}

/// The processes of a test. Those that still run when it ends are killed.
pub struct Ranks {
    children: Vec<Child>,
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Ranks {
    pub fn start(body: &str, place: &Place) -> Self {
        let start = |rank: u32| {
            let program = std::env::current_exe().unwrap();
            let mut command = Command::new(program);
            command.args(["rank", body, &rank.to_string()]);
            command.args([place.world_size, place.ranks_per_node].map(|n| n.to_string()));
            command.args([place.address.to_string(), place.token.to_string(), place.seed.to_string()]);
            command.stdout(Stdio::piped()).spawn().unwrap()
        };
        Self { children: (0..place.world_size as u32).map(start).collect() }
    }

    /// Waits until the rank says `word`.
    pub fn hear(&mut self, rank: usize, word: &str) {
        let mut line = String::new();
        let stdout = self.children[rank].stdout.as_mut().unwrap();
        // Byte by byte, so that nothing of the next line is lost with a buffer.
        BufReader::with_capacity(1, stdout).read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), word, "rank {rank}");
    }

    /// Waits until all ranks but `lost` have ended well; what they said since they were last heard.
    pub fn end(self, lost: Option<usize>) -> Vec<String> {
        let ranks: Vec<usize> = (0..self.children.len()).filter(|rank| Some(*rank) != lost).collect();
        self.end_of(&ranks)
    }

    /// Waits until `ranks` have ended well; what they said since they were last heard.
    pub fn end_of(mut self, ranks: &[usize]) -> Vec<String> {
        let mut said = Vec::new();
        for &rank in ranks {
            let child = &mut self.children[rank];
            let mut text = String::new();
            child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
            let status = child.wait().unwrap();
            assert!(status.success(), "rank {rank}: {status}, said {text:?}");
            said.push(text);
        }
        said
    }

    pub fn signal(&self, rank: usize, signal: &str) {
        let pid = self.children[rank].id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }
}

/// A rendezvous that is being held, and the place of it.
pub fn meet(world_size: usize, ranks_per_node: usize) -> (Place, JoinHandle<Result<()>>) {
    meet_within(Duration::from_secs(30), world_size, ranks_per_node)
}

pub fn meet_within(
    timeout: Duration,
    world_size: usize,
    ranks_per_node: usize,
) -> (Place, JoinHandle<Result<()>>) {
    let (token, seed) = (Token::random().unwrap(), rand::rng().next_u64());
    println!("seed {seed}");
    let nodes = NonZeroUsize::new(ranks_per_node);
    let rendezvous = Rendezvous::bind(([127, 0, 0, 1], 0).into(), world_size, nodes, token).unwrap();
    let place = Place { world_size, ranks_per_node, address: rendezvous.address(), token, seed };
    (place, std::thread::spawn(move || rendezvous.serve(Deadline::after(timeout))))
}
