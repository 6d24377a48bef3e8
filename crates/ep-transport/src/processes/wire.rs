//! What is said at a rendezvous, in bytes: little-endian words of fixed length.

use std::io::{self, Read};

use fused_moe_core::Rank;

use super::memory::FileAddress;
use super::token::Token;
use crate::error::RendezvousError;
use crate::shared::Topology;

/// What every conversation begins with.
const MAGIC: [u8; 8] = *b"fusedmoe";

/// Ranks of one group have one version of this crate: they share its structures.
pub(super) const VERSION: [u8; 16] = {
    let version = env!("CARGO_PKG_VERSION").as_bytes();
    let mut padded = [0; 16];
    let mut at = 0;
    while at < version.len() && at < padded.len() {
        padded[at] = version[at];
        at += 1;
    }
    padded
};

fn version_text(version: [u8; 16]) -> String {
    String::from_utf8_lossy(&version).trim_end_matches('\0').to_owned()
}

/// What a rank says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) version: [u8; 16],
    pub(super) token: Token,
    pub(super) rank: Rank,
    pub(super) world_size: u32,
    pub(super) ranks_per_node: u32,
    pub(super) pid: u32,
}

impl Hello {
    /// Bytes of it.
    pub(super) const BYTES: usize = 8 + 16 + 16 + 4 * 4;

    pub(super) fn encode(&self) -> Vec<u8> {
        let numbers = [self.rank.0, self.world_size, self.ranks_per_node, self.pid].map(u32::to_le_bytes);
        [&MAGIC[..], &self.version, &self.token.to_bytes(), numbers.as_flattened()].concat()
    }

    /// `None` if this is something else.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(&MAGIC)?;
        let (version, rest) = rest.split_first_chunk()?;
        let (token, rest) = rest.split_first_chunk()?;
        let numbers: Vec<u32> = words(rest).collect();
        let [rank, world_size, ranks_per_node, pid] = numbers.try_into().ok()?;
        let (rank, token) = (Rank(rank), Token::from_bytes(*token));
        Some(Self { version: *version, token, rank, world_size, ranks_per_node, pid })
    }

    /// Why this rank cannot be one of a group of `topology` with `token`, if it cannot.
    pub(super) fn refused_by(&self, topology: Topology, token: &Token) -> Option<RendezvousError> {
        let theirs = (topology.world_size, topology.ranks_per_node);
        let mine = (self.world_size as usize, self.ranks_per_node as usize);
        if self.token != *token {
            Some(RendezvousError::Token)
        } else if self.version != VERSION {
            let (mine, theirs) = (version_text(self.version), version_text(VERSION));
            Some(RendezvousError::Version { mine, theirs })
        } else if mine != theirs || self.rank.index() >= topology.world_size {
            Some(RendezvousError::Topology { rank: self.rank, mine, theirs })
        } else {
            None
        }
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word))
}

/// What a rank is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// All are there: the control file, and the processes in rank order.
    Welcome { control: FileAddress, pids: Vec<u32> },
    /// All are ready.
    Start,
    /// There will be no group, at least not with this rank.
    Refused(RendezvousError),
}

/// First byte of an answer.
mod kind {
    pub(super) const WELCOME: u8 = 1;
    pub(super) const START: u8 = 2;
    pub(super) const TOKEN: u8 = 3;
    pub(super) const VERSION: u8 = 4;
    pub(super) const TOPOLOGY: u8 = 5;
    pub(super) const TAKEN: u8 = 6;
    pub(super) const MISSING: u8 = 7;
}

impl Answer {
    pub(super) fn encode(&self) -> Vec<u8> {
        let with = |kind: u8, numbers: &[u32]| {
            let numbers = numbers.iter().flat_map(|number| number.to_le_bytes());
            [kind].into_iter().chain(numbers).collect::<Vec<u8>>()
        };
        match self {
            Answer::Welcome { control, pids } => {
                [&[kind::WELCOME], &control.to_bytes()[..], &with(0, pids)[1..]].concat()
            }
            Answer::Start => vec![kind::START],
            Answer::Refused(RendezvousError::Version { .. }) => [&[kind::VERSION], &VERSION[..]].concat(),
            Answer::Refused(RendezvousError::Topology { theirs, .. }) => {
                with(kind::TOPOLOGY, &[theirs.0 as u32, theirs.1 as u32])
            }
            Answer::Refused(RendezvousError::Taken(rank)) => with(kind::TAKEN, &[rank.0]),
            Answer::Refused(RendezvousError::Missing(rank)) => with(kind::MISSING, &[rank.0]),
            Answer::Refused(_) => vec![kind::TOKEN],
        }
    }

    /// Reads the answer to `hello`.
    pub(super) fn read(stream: &mut impl Read, hello: &Hello) -> io::Result<Self> {
        let mut kind = [0];
        stream.read_exact(&mut kind)?;
        let mut bytes = |len: usize| -> io::Result<Vec<u8>> {
            let mut bytes = vec![0; len];
            stream.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        Ok(match kind[0] {
            kind::WELCOME => {
                let control = FileAddress::from_bytes(&bytes(FileAddress::BYTES)?).ok_or_else(invalid)?;
                Answer::Welcome { control, pids: words(&bytes(4 * hello.world_size as usize)?).collect() }
            }
            kind::START => Answer::Start,
            kind::TOKEN => Answer::Refused(RendezvousError::Token),
            kind::VERSION => {
                let theirs = bytes(VERSION.len())?.try_into().map(version_text).map_err(|_| invalid())?;
                Answer::Refused(RendezvousError::Version { mine: version_text(VERSION), theirs })
            }
            kind::TOPOLOGY => {
                let mine = (hello.world_size as usize, hello.ranks_per_node as usize);
                let theirs: Vec<usize> = words(&bytes(8)?).map(|n| n as usize).collect();
                let theirs = (theirs[0], theirs[1]);
                Answer::Refused(RendezvousError::Topology { rank: hello.rank, mine, theirs })
            }
            kind @ (kind::TAKEN | kind::MISSING) => {
                let rank = Rank(words(&bytes(4)?).next().ok_or_else(invalid)?);
                Answer::Refused(match kind {
                    kind::TAKEN => RendezvousError::Taken(rank),
                    _ => RendezvousError::Missing(rank),
                })
            }
            _ => return Err(invalid()),
        })
    }
}
