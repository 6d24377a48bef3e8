//! Options as variables: how whoever starts a rank tells it where to go.

use std::num::NonZeroUsize;
use std::str::FromStr;
use std::time::Duration;

use fused_moe_core::Rank;

use super::ProcessOptions;

const RANK: &str = "FMOE_RANK";
const WORLD_SIZE: &str = "FMOE_WORLD_SIZE";
const RANKS_PER_NODE: &str = "FMOE_RANKS_PER_NODE";
const RENDEZVOUS: &str = "FMOE_RENDEZVOUS";
const TOKEN: &str = "FMOE_TOKEN";
const TIMEOUT_MS: &str = "FMOE_TIMEOUT_MS";

/// A variable that is missing or cannot be read. The value is not shown: it may be a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadVariable {
    /// It is not set, though the one of the rank is.
    #[error("{RANK} is set but {0} is not")]
    Missing(&'static str),
    /// Its value is none of this variable.
    #[error("{0} has a value that cannot be read")]
    Unreadable(&'static str),
}

impl ProcessOptions {
    /// The options as environment variables, by name and value, for a program that is to be this rank.
    pub fn to_vars(&self) -> [(&'static str, String); 6] {
        let ranks_per_node = self.ranks_per_node.map_or(self.world_size, NonZeroUsize::get);
        [
            (RANK, self.rank.0.to_string()),
            (WORLD_SIZE, self.world_size.to_string()),
            (RANKS_PER_NODE, ranks_per_node.to_string()),
            (RENDEZVOUS, self.rendezvous.to_string()),
            (TOKEN, self.token.to_string()),
            (TIMEOUT_MS, self.timeout.as_millis().to_string()),
        ]
    }

    /// The options that `lookup` has the variables of; `None` if it has no rank, so nobody has made this program one.
    /// In a program that `fmoe launch` starts:
    ///
    /// ```
    /// use ep_transport::ProcessOptions;
    ///
    /// match ProcessOptions::from_vars(|name| std::env::var(name).ok())? {
    ///     Some(options) => println!("{} of {}", options.rank, options.world_size),
    ///     None => println!("alone"),
    /// }
    /// # Ok::<(), ep_transport::BadVariable>(())
    /// ```
    ///
    /// # Errors
    /// [`BadVariable`] if there is a rank, but something else is missing or cannot be read.
    pub fn from_vars(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, BadVariable> {
        if lookup(RANK).is_none() {
            return Ok(None);
        }
        fn read<T: FromStr>(
            lookup: &impl Fn(&str) -> Option<String>,
            name: &'static str,
        ) -> Result<T, BadVariable> {
            let value = lookup(name).ok_or(BadVariable::Missing(name))?;
            value.parse().map_err(|_| BadVariable::Unreadable(name))
        }
        Ok(Some(Self {
            rank: Rank(read(&lookup, RANK)?),
            world_size: read(&lookup, WORLD_SIZE)?,
            ranks_per_node: Some(read::<NonZeroUsize>(&lookup, RANKS_PER_NODE)?),
            rendezvous: read(&lookup, RENDEZVOUS)?,
            token: read(&lookup, TOKEN)?,
            timeout: Duration::from_millis(read(&lookup, TIMEOUT_MS)?),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Token;

    fn options() -> ProcessOptions {
        ProcessOptions {
            rank: Rank(3),
            world_size: 8,
            ranks_per_node: NonZeroUsize::new(4),
            rendezvous: ([127, 0, 0, 1], 4711).into(),
            token: Token::random().unwrap(),
            timeout: Duration::from_millis(1500),
        }
    }

    #[test]
    fn options_survive_the_journey() {
        let options = options();
        let vars = options.to_vars();
        let lookup = |name: &str| vars.iter().find(|(it, _)| *it == name).map(|(_, value)| value.clone());
        let read = ProcessOptions::from_vars(lookup).unwrap().unwrap();
        assert_eq!(read.to_vars(), vars);
        assert!(ProcessOptions::from_vars(|_| None).unwrap().is_none());
    }

    #[test]
    fn what_is_missing_or_unreadable_is_named() {
        let vars = options().to_vars();
        for (name, value) in &vars[1..] {
            let without = |it: &str| vars.iter().find(|(n, _)| n == &it && n != name).map(|(_, v)| v.clone());
            assert_eq!(ProcessOptions::from_vars(without).err(), Some(BadVariable::Missing(name)));
            let bad = |it: &str| match it == *name {
                true => Some(format!("{value}x")),
                false => without(it),
            };
            assert_eq!(ProcessOptions::from_vars(bad).err(), Some(BadVariable::Unreadable(name)));
        }
    }
}
