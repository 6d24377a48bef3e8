//! The status word.

use fused_moe_core::Fault;
use rand::Rng;

use crate::layer::fresh;

#[test]
fn every_fault_survives_the_wire() {
    let mut rng = fresh();
    for _ in 0..100 {
        let (a, b, id) = (rng.random(), rng.random(), rng.random());
        let all = [
            Fault::NonFiniteHidden { token: a, element: b },
            Fault::NonFiniteWeight { token: a, slot: b },
            Fault::NonFiniteLogit { token: a, expert: b },
            Fault::ExpertIdOutOfRange { token: a, slot: b, id },
            Fault::DuplicateExpertId { token: a, id },
            Fault::TooManyTokens { tokens: a, max: b },
            Fault::BadTensor,
            Fault::ExpertsFailed,
            Fault::OverlapFailed,
            Fault::Abandoned,
            Fault::ExpertLost { token: a, expert: b, rank: rng.random() },
            Fault::TooManyReceivedRows { rank: a, rows: b, max: rng.random() },
            Fault::Unknown { code: rng.random_range(13..=u32::MAX) },
        ];
        for (i, fault) in all.into_iter().enumerate() {
            let words = fault.to_words();
            assert_eq!(Fault::from_words(words), Some(fault), "{words:?}");
            assert_ne!(words[0], 0, "{fault:?} reads as success");
            assert!(all[..i].iter().all(|other| other.to_words()[0] != words[0]), "{fault:?} shares a code");
            // What a log shows names the values, in lower case and without a full stop.
            let text = fault.to_string();
            assert!(!text.ends_with('.') && text.starts_with(|c: char| !c.is_uppercase()), "{text}");
        }
    }
}

#[test]
fn no_word_is_no_fault_and_no_fault_is_no_word() {
    assert_eq!(Fault::from_words([0, 1, 2, 3]), None);
    assert!(Fault::from_words(Fault::Unknown { code: 0 }.to_words()).is_some());
}
