//! What the commander and its ranks say to each other, a line of JSON each.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Where in a layer call a rank can be told to stop and wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Before it sends anything.
    Before,
    /// Between the two halves of the dispatch.
    Dispatch,
    /// Between the two halves of the combine.
    Combine,
}

/// From the commander.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Become a member of a group.
    Join(Join),
    /// Run the layer.
    Call(LayerCall),
    /// Go on where you wait.
    Go,
    /// Leave the group.
    Leave,
}

/// A group of some of the seats.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Join {
    pub rendezvous: SocketAddr,
    pub token: String,
    /// Seats in the order of ranks.
    pub members: Vec<u32>,
    pub all2all: String,
    pub timeout_ms: u64,
}

/// One call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerCall {
    /// What the tokens are drawn for.
    pub number: u64,
    /// Name of a [`LostExpertPolicy`](fused_moe::router::survivors::LostExpertPolicy).
    pub policy: String,
    /// Where to say [`Word::Waits`] and wait for [`Order::Go`].
    pub wait: Option<Phase>,
}

/// From a rank.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Word {
    Joined,
    Waits,
    Done(Outcome),
    /// Has left, and holds so much.
    Left(Held),
}

/// How a call, or joining a group, ended on a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Every element is within its bound of the oracle's.
    Right,
    /// An element is not.
    Wrong(String),
    /// A typed error.
    Error { kind: String, text: String },
}

/// What a rank holds between two groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Resident bytes.
    pub memory: u64,
    /// Open descriptors.
    pub descriptors: usize,
    /// Mapped files without a name.
    pub mappings: usize,
}

impl Held {
    /// Of this process.
    pub fn now() -> std::io::Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = resident.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        Ok(Self {
            memory: 1024 * kib.unwrap_or(0),
            // Reading the folder takes a descriptor, too.
            descriptors: std::fs::read_dir("/proc/self/fd")?.count().saturating_sub(1),
            mappings: maps.lines().filter(|line| line.contains("/memfd:")).count(),
        })
    }
}
