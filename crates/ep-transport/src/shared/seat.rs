//! One rank's place in a group: a few words, which may lie in memory that processes share.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::doorbell::Doorbell;
use crate::error::Silence;
use crate::transport::Collective;

/// Bit of [`Seat::absences`]: the rank does nothing any more.
const DEPARTED: u32 = 1;
/// Bit of [`Seat::absences`]: the rank's endpoint is gone, its heaps are not.
const NO_ENDPOINT: u32 = 2;
/// Bit of [`Seat::absences`]: the rank gave up on a collective.
const GAVE_UP: u32 = 4;
/// Bit of [`Seat::absences`]: the rank's process has ended without leaving.
const DIED: u32 = 8;

/// Bit of [`Seat::absences`]: the rank has come to a shrink.
const SHRINKING: u32 = 16;

/// Bytes that a rank posts at a time; more take several meetings.
pub(super) const POSTING_BYTES: usize = 64 << 10;

/// Why a rank is not, or not fully, there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Absence {
    /// It does nothing any more.
    Departed = DEPARTED,
    /// Its endpoint is gone, its heaps are not.
    NoEndpoint = NO_ENDPOINT,
    /// It gave up on a collective.
    GaveUp = GAVE_UP,
    /// Its process has ended without leaving.
    Died = DIED,
    /// It has come to a shrink, and takes no further part in this group.
    Shrinking = SHRINKING,
}

/// What a rank brings to a meeting.
#[derive(Clone, Debug)]
pub(super) struct Posting {
    pub(super) operation: Collective,
    /// Bytes that it brings in all meetings of this collective.
    pub(super) total: usize,
    /// Those of this meeting.
    pub(super) bytes: Vec<u8>,
}

/// Room for one posting. Words, as another process may write where it should not; nothing here is read by
/// reference.
#[derive(Debug)]
#[repr(C)]
struct Board {
    operation: AtomicU64,
    total: AtomicU64,
    len: AtomicU64,
    words: [AtomicU64; POSTING_BYTES / 8],
}

/// One rank's place in the group. Zeroed memory is the seat of a rank that has done nothing yet.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Seat {
    /// Rung when anything changes that the rank may wait for.
    pub(super) doorbell: Doorbell,
    /// Meetings that the rank has posted to.
    posted: AtomicU64,
    absences: AtomicU32,
    /// What it posted to the last two, by parity. A rank posts to meeting n + 1 only when it has read all
    /// postings of n − 1, so two suffice.
    boards: [Board; 2],
}

impl Seat {
    /// Why the rank will not set any further signal, if it will not.
    pub(super) fn shuns_signals(&self) -> Option<Silence> {
        match self.absences.load(Ordering::Acquire) {
            absences if absences & DEPARTED != 0 => Some(Silence::Departed),
            absences if absences & DIED != 0 => Some(Silence::Died),
            absences if absences & SHRINKING != 0 => Some(Silence::Shrinking),
            _ => None,
        }
    }

    /// Why the rank will not come to any further collective, if it will not.
    pub(super) fn shuns_collectives(&self) -> Option<Silence> {
        match self.absences.load(Ordering::Acquire) {
            0 => None,
            absences if absences & DEPARTED != 0 => Some(Silence::Departed),
            absences if absences & DIED != 0 => Some(Silence::Died),
            absences if absences & NO_ENDPOINT != 0 => Some(Silence::Departed),
            absences if absences & SHRINKING != 0 => Some(Silence::Shrinking),
            _ => Some(Silence::GaveUp),
        }
    }

    /// Whether the rank's process has ended without leaving.
    pub(super) fn has_died(&self) -> bool {
        self.absences.load(Ordering::Acquire) & (DIED | DEPARTED) == DIED
    }

    /// Whether the rank has come to a shrink.
    pub(super) fn is_shrinking(&self) -> bool {
        self.absences.load(Ordering::Acquire) & SHRINKING != 0
    }

    /// Whether the rank is past coming to a shrink, and past going on after one.
    pub(super) fn will_not_shrink(&self) -> bool {
        self.absences.load(Ordering::Acquire) & (DEPARTED | NO_ENDPOINT | DIED) != 0
    }

    pub(super) fn announce(&self, absence: Absence) {
        self.absences.fetch_or(absence as u32, Ordering::AcqRel);
    }

    /// Whether the rank has posted to meeting `number`.
    pub(super) fn has_posted(&self, number: u64) -> bool {
        self.posted.load(Ordering::Acquire) >= number
    }

    /// Posts to meeting `number`. Only the rank itself does.
    pub(super) fn post(&self, number: u64, posting: &Posting) {
        let board = &self.boards[(number % 2) as usize];
        board.operation.store(posting.operation.code(), Ordering::Relaxed);
        board.total.store(posting.total as u64, Ordering::Relaxed);
        board.len.store(posting.bytes.len() as u64, Ordering::Relaxed);
        for (word, bytes) in board.words.iter().zip(posting.bytes.chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_le_bytes(padded), Ordering::Relaxed);
        }
        self.posted.store(number, Ordering::Release);
    }

    /// What the rank posted to meeting `number`, to which it has posted; `None` if that is no posting.
    pub(super) fn posting(&self, number: u64) -> Option<Posting> {
        let board = &self.boards[(number % 2) as usize];
        let operation = Collective::from_code(board.operation.load(Ordering::Relaxed))?;
        let total = board.total.load(Ordering::Relaxed) as usize;
        let len = board.len.load(Ordering::Relaxed) as usize;
        let words = board.words.get(..len.div_ceil(8))?;
        let mut bytes: Vec<u8> =
            words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
        bytes.truncate(len);
        Some(Posting { operation, total, bytes })
    }
}
