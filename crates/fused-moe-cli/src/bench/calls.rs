//! The calls that are timed: how many tokens, and which experts each of them goes to.

use std::path::Path;

use anyhow::{Context, ensure};
use rand::{SeedableRng, seq::index};
use rand_pcg::Pcg64;
use serde::Deserialize;

/// Calls of the same number of tokens.
#[derive(Debug, PartialEq, Eq)]
pub struct Calls {
    /// Tokens of each call.
    pub tokens: usize,
    /// One call each: `[tokens, top_k]` expert ids.
    pub ids: Vec<Vec<i32>>,
}

impl Calls {
    /// `reps` calls of uniformly drawn experts, the same ones for the same number of tokens.
    pub fn uniform(experts: usize, top_k: usize, tokens: usize, reps: usize) -> Self {
        let mut random = Pcg64::seed_from_u64(tokens as u64);
        let mut row = || index::sample(&mut random, experts, top_k).into_iter().map(|expert| expert as i32);
        let mut call = || (0..tokens).flat_map(|_| row().collect::<Vec<_>>()).collect();
        Self { tokens, ids: (0..reps).map(|_| call()).collect() }
    }

    /// Experts that each call uses.
    pub fn active(&self) -> impl Iterator<Item = usize> {
        self.ids.iter().map(|ids| ids.iter().collect::<std::collections::HashSet<_>>().len())
    }

    /// The calls of a file, those of the same number of tokens together, in the order of the file.
    pub fn read(path: &Path, experts: usize, top_k: usize) -> anyhow::Result<Vec<Self>> {
        let of_file = || format!("in {}", path.display());
        let text = std::fs::read_to_string(path).with_context(of_file)?;
        let Recorded { calls } = serde_json::from_str(&text).with_context(of_file)?;
        let mut by_tokens: Vec<Self> = Vec::new();
        for (number, ids) in calls.into_iter().enumerate() {
            check(&ids, experts, top_k).with_context(|| format!("call {number} of {}", path.display()))?;
            let tokens = ids.len() / top_k;
            match by_tokens.iter_mut().find(|calls| calls.tokens == tokens) {
                Some(calls) => calls.ids.push(ids),
                None => by_tokens.push(Self { tokens, ids: vec![ids] }),
            }
        }
        ensure!(!by_tokens.is_empty(), "{} has no calls", path.display());
        Ok(by_tokens)
    }
}

/// A file of calls: `{"calls": [[id, …], …]}`, the ids of one call token by token.
#[derive(Deserialize)]
struct Recorded {
    calls: Vec<Vec<i32>>,
}

fn check(ids: &[i32], experts: usize, top_k: usize) -> anyhow::Result<()> {
    let len = ids.len();
    ensure!(len > 0 && len.is_multiple_of(top_k), "{len} ids are no rows of {top_k}");
    for (token, row) in ids.chunks(top_k).enumerate() {
        for (slot, &id) in row.iter().enumerate() {
            let is_expert = usize::try_from(id).is_ok_and(|id| id < experts);
            ensure!(is_expert, "token {token} goes to expert {id} of {experts}");
            ensure!(!row[..slot].contains(&id), "token {token} goes to expert {id} twice");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn read(text: &str) -> anyhow::Result<Vec<Calls>> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), text)?;
        Calls::read(file.path(), 4, 2)
    }

    #[test]
    fn calls_of_equal_size_are_together() {
        let calls = read(r#"{"calls": [[0, 1], [2, 3, 1, 0], [3, 2]]}"#).unwrap();
        let wanted = [
            Calls { tokens: 1, ids: vec![vec![0, 1], vec![3, 2]] },
            Calls { tokens: 2, ids: vec![vec![2, 3, 1, 0]] },
        ];
        assert_eq!(calls, wanted);
    }

    #[rstest]
    #[case(r#"{"calls": []}"#, "has no calls")]
    #[case(r#"{"calls": [[0, 1], [1]]}"#, "1 ids are no rows of 2")]
    #[case(r#"{"calls": [[]]}"#, "0 ids are no rows of 2")]
    #[case(r#"{"calls": [[0, 1, 3, 4]]}"#, "token 1 goes to expert 4 of 4")]
    #[case(r#"{"calls": [[-1, 1]]}"#, "token 0 goes to expert -1 of 4")]
    #[case(r#"{"calls": [[2, 2]]}"#, "token 0 goes to expert 2 twice")]
    #[case(r#"{"calls": 3}"#, "invalid type")]
    fn bad_files_are_refused(#[case] text: &str, #[case] word: &str) {
        let error = format!("{:#}", read(text).unwrap_err());
        assert!(error.contains(word), "{error}");
    }
}
