//! The status word: how a failing rank tells its peers what happened.
//!
//! A rank that cannot do its part of a round sends zero tokens and a [`Fault`] instead of staying silent. A
//! fault is four 32-bit words, so it fits beside a signal on any transport.

/// Why a rank could not do its part of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// A hidden state is NaN or infinite.
    NonFiniteHidden {
        /// Row of the caller's tensor.
        token: u32,
        /// Element of the row.
        element: u32,
    },
    /// A top-k weight is NaN or infinite.
    NonFiniteWeight {
        /// Row of the caller's tensor.
        token: u32,
        /// Slot of the row.
        slot: u32,
    },
    /// A router logit is NaN.
    NonFiniteLogit {
        /// Row of the caller's tensor.
        token: u32,
        /// Expert of the row.
        expert: u32,
    },
    /// An expert id is neither −1 nor in `0..num_experts`.
    ExpertIdOutOfRange {
        /// Row of the caller's tensor.
        token: u32,
        /// Slot of the row.
        slot: u32,
        /// The id.
        id: i32,
    },
    /// A token names the same expert twice.
    DuplicateExpertId {
        /// Row of the caller's tensor.
        token: u32,
        /// The id.
        id: i32,
    },
    /// More tokens than the handle was built for.
    TooManyTokens {
        /// Tokens of this call.
        tokens: u32,
        /// `max_tokens_per_rank`.
        max: u32,
    },
    /// A tensor of the call has the wrong shape, element type, device or layout; the failing rank's own error
    /// says which.
    BadTensor,
    /// The experts kernel returned an error.
    ExpertsFailed,
    /// Work between send and receive (an overlap closure) returned an error.
    OverlapFailed,
    /// The ticket of the round was dropped.
    Abandoned,
    /// A token is routed to an expert that went with a lost rank, and such tokens are to fail.
    ExpertLost {
        /// Row of the caller's tensor.
        token: u32,
        /// The expert, as the router numbers it.
        expert: u32,
        /// The rank that held it, as it was numbered before it was lost.
        rank: u32,
    },
    /// More rows go to a rank than it has room for.
    TooManyReceivedRows {
        /// That rank.
        rank: u32,
        /// Rows that were to be there.
        rows: u32,
        /// [`crate::MoeConfig::max_received_rows`].
        max: u32,
    },
    /// A status word of a version that this build does not know.
    Unknown {
        /// The first word.
        code: u32,
    },
}

impl Fault {
    /// The fault as four words; the first is never zero.
    pub const fn to_words(self) -> [u32; 4] {
        match self {
            Fault::NonFiniteHidden { token, element } => [1, token, element, 0],
            Fault::NonFiniteWeight { token, slot } => [2, token, slot, 0],
            Fault::NonFiniteLogit { token, expert } => [3, token, expert, 0],
            Fault::ExpertIdOutOfRange { token, slot, id } => [4, token, slot, id as u32],
            Fault::DuplicateExpertId { token, id } => [5, token, 0, id as u32],
            Fault::TooManyTokens { tokens, max } => [6, tokens, max, 0],
            Fault::BadTensor => [7, 0, 0, 0],
            Fault::ExpertsFailed => [8, 0, 0, 0],
            Fault::OverlapFailed => [9, 0, 0, 0],
            Fault::Abandoned => [10, 0, 0, 0],
            Fault::ExpertLost { token, expert, rank } => [11, token, expert, rank],
            Fault::TooManyReceivedRows { rank, rows, max } => [12, rank, rows, max],
            // A peer must never read a fault as success.
            Fault::Unknown { code: 0 } => [u32::MAX, 0, 0, 0],
            Fault::Unknown { code } => [code, 0, 0, 0],
        }
    }

    /// The fault in `words`, `None` if the first word is zero (no fault).
    pub const fn from_words(words: [u32; 4]) -> Option<Self> {
        let [code, a, b, c] = words;
        Some(match code {
            0 => return None,
            1 => Fault::NonFiniteHidden { token: a, element: b },
            2 => Fault::NonFiniteWeight { token: a, slot: b },
            3 => Fault::NonFiniteLogit { token: a, expert: b },
            4 => Fault::ExpertIdOutOfRange { token: a, slot: b, id: c as i32 },
            5 => Fault::DuplicateExpertId { token: a, id: c as i32 },
            6 => Fault::TooManyTokens { tokens: a, max: b },
            7 => Fault::BadTensor,
            8 => Fault::ExpertsFailed,
            9 => Fault::OverlapFailed,
            10 => Fault::Abandoned,
            11 => Fault::ExpertLost { token: a, expert: b, rank: c },
            12 => Fault::TooManyReceivedRows { rank: a, rows: b, max: c },
            code => Fault::Unknown { code },
        })
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Fault::NonFiniteHidden { token, element } => {
                write!(f, "hidden state of token {token} is not finite at element {element}")
            }
            Fault::NonFiniteWeight { token, slot } => {
                write!(f, "top-k weight of token {token} is not finite in slot {slot}")
            }
            Fault::NonFiniteLogit { token, expert } => {
                write!(f, "router logit of token {token} for expert {expert} is NaN")
            }
            Fault::ExpertIdOutOfRange { token, slot, id } => {
                write!(f, "expert id {id} of token {token} in slot {slot} does not exist")
            }
            Fault::DuplicateExpertId { token, id } => write!(f, "token {token} names expert {id} twice"),
            Fault::TooManyTokens { tokens, max } => {
                write!(f, "{tokens} tokens, the handle was built for at most {max} per rank")
            }
            Fault::BadTensor => f.write_str("a tensor of the call does not fit"),
            Fault::ExpertsFailed => f.write_str("the experts kernel failed"),
            Fault::OverlapFailed => f.write_str("the overlapped work failed"),
            Fault::Abandoned => f.write_str("the ticket of the round was dropped"),
            Fault::ExpertLost { token, expert, rank } => {
                write!(f, "token {token} is routed to expert {expert}, which went with lost rank {rank}")
            }
            Fault::TooManyReceivedRows { rank, rows, max } => {
                write!(f, "{rows} rows or more go to rank {rank}, which has room for {max}")
            }
            Fault::Unknown { code } => write!(f, "unknown status word {code}"),
        }
    }
}
