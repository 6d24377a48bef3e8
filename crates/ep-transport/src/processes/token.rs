//! The secret of a group.

use std::str::FromStr;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Result, TransportError};

/// A secret that the ranks of one group share, so that no stranger becomes one of them. Written as 32 hexadecimal
/// digits; `Debug` keeps it.
#[derive(Clone, Copy)]
pub struct Token([u8; Token::BYTES]);

impl Token {
    pub(super) const BYTES: usize = 16;

    /// A fresh one.
    ///
    /// # Errors
    /// [`TransportError::System`] if the system has no random numbers.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; Self::BYTES];
        // Requests of up to 256 bytes are never cut short.
        getrandom(&mut bytes, GetRandomFlags::empty())
            .map_err(|error| TransportError::system("random token")(error.into()))?;
        Ok(Self(bytes))
    }

    pub(super) const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    pub(super) const fn to_bytes(self) -> [u8; Self::BYTES] {
        self.0
    }
}

impl PartialEq for Token {
    /// Takes as long for a token that begins right as for one that does not.
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
    }
}

impl Eq for Token {}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Text that is not a [`Token`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a token is 32 hexadecimal digits")]
pub struct NoToken;

impl FromStr for Token {
    type Err = NoToken;

    fn from_str(text: &str) -> Result<Self, NoToken> {
        let digits = text.len() == 2 * Self::BYTES && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        let number = u128::from_str_radix(text, 16).ok().filter(|_| digits);
        number.map(|number| Self(number.to_be_bytes())).ok_or(NoToken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_being_written() {
        let token = Token::random().unwrap();
        assert_eq!(token.to_string().parse(), Ok(token));
        assert_ne!(token, Token::random().unwrap());
        assert_eq!(Token::from_bytes([0; 16]).to_string().parse(), Ok(Token::from_bytes([0; 16])));
        assert!(!format!("{token:?}").contains(&token.to_string()));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        for text in ["", "0", "+123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdeg"] {
            assert_eq!(text.parse::<Token>(), Err(NoToken), "{text:?}");
        }
    }
}
