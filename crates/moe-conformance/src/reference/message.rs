//! What a rank tells all others in one half of a round: a fault or rows.

use fused_moe_core::{Fault, Rank};

/// Bytes of a fault and a count.
const HEADER: usize = 5 * 4;

/// Starts a message of `count` rows, or of a fault.
pub(super) fn begin(message: &mut Vec<u8>, fault: Option<Fault>, count: usize) {
    message.clear();
    for word in fault.map_or([0; 4], Fault::to_words) {
        message.extend_from_slice(&word.to_le_bytes());
    }
    message.extend_from_slice(&(count as u32).to_le_bytes());
}

/// The messages of all ranks of one half of a round.
pub(super) struct Gathered {
    /// By rank; a rank that is not there sent nothing.
    pub(super) messages: Vec<(Rank, Vec<u8>)>,
}

impl Gathered {
    /// The fault of the lowest rank that has one.
    pub(super) fn fault(&self) -> Option<(Rank, Fault)> {
        let of = |(rank, message): &(Rank, Vec<u8>)| {
            let words = [0, 1, 2, 3].map(|i| word(message, i));
            Fault::from_words(words).map(|fault| (*rank, fault))
        };
        self.messages.iter().find_map(of)
    }

    /// Rank, number of rows, and the bytes behind the header.
    pub(super) fn parts(&self) -> impl Iterator<Item = (Rank, usize, &[u8])> {
        let part = |(rank, message): &'_ (Rank, Vec<u8>)| (*rank, word(message, 4) as usize);
        self.messages.iter().map(move |m| (part(m).0, part(m).1, m.1.get(HEADER..).unwrap_or_default()))
    }
}

fn word(message: &[u8], index: usize) -> u32 {
    let bytes = message.get(index * 4..index * 4 + 4).and_then(|bytes| bytes.try_into().ok());
    // A message that is too short is of a peer that does not speak this protocol.
    bytes.map_or(u32::MAX, u32::from_le_bytes)
}
