//! `config.json` as a table of keys that may have several spellings.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{CheckpointError, Result};

/// Largest `config.json` that is read; real ones have a few kilobytes.
pub(crate) const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Reads a JSON object of at most `limit` bytes.
pub(crate) fn read_object(path: &Path, limit: u64) -> Result<Map<String, Value>> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    if bytes > limit {
        return Err(CheckpointError::TooLarge { path: path.to_owned(), bytes, limit });
    }
    let mut text = Vec::new();
    // A pipe or a growing file has no honest length, hence the second limit.
    file.take(limit).read_to_end(&mut text).map_err(io)?;
    serde_json::from_slice(&text)
        .map_err(|e| CheckpointError::Json { path: path.to_owned(), why: e.to_string() })
}

/// An object of `config.json`. A key whose value is `null` is absent.
pub(crate) struct Config<'a> {
    path: PathBuf,
    /// Put before keys in errors, for nested objects.
    prefix: String,
    object: &'a Map<String, Value>,
}

impl<'a> Config<'a> {
    pub(crate) fn new(path: &Path, object: &'a Map<String, Value>) -> Self {
        Self { path: path.to_owned(), prefix: String::new(), object }
    }

    /// The object under `key`, `None` if it is absent.
    pub(crate) fn nested(&self, key: &str) -> Result<Option<Config<'a>>> {
        self.get(&[key], "an object", |value| value.as_object()).map(|object| {
            object.map(|object| Config {
                path: self.path.clone(),
                prefix: format!("{}{key}.", self.prefix),
                object,
            })
        })
    }

    /// The keys of the object, with what they hold.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.object.keys().map(String::as_str)
    }

    /// Whether `key` is there and not null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(|v| !v.is_null())
    }

    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(Value::is_null)
    }

    /// The key with what stands around it, for errors.
    pub(crate) fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The value of whichever of `keys` is there; if several are, they must agree.
    fn get<T>(
        &self,
        keys: &[&str],
        wanted: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let present: Vec<(&str, &'a Value)> = keys
            .iter()
            .filter_map(|&key| self.object.get(key).filter(|v| !v.is_null()).map(|v| (key, v)))
            .collect();
        let Some(&(key, value)) = present.first() else { return Ok(None) };
        if let Some((other, differs)) = present[1..].iter().find(|(_, v)| *v != value) {
            return Err(CheckpointError::ConflictingKeys {
                path: self.path.clone(),
                first: format!("{} = {value}", self.name(key)),
                second: format!("{} = {differs}", self.name(other)),
            });
        }
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.bad(key, wanted)),
        }
    }

    /// An error about the value of `key`.
    pub(crate) fn bad(&self, key: &str, wanted: impl Into<String>) -> CheckpointError {
        CheckpointError::BadKey {
            path: self.path.clone(),
            key: self.name(key),
            wanted: wanted.into(),
            found: self.object.get(key).map_or_else(|| "missing".to_owned(), Value::to_string),
        }
    }

    fn missing(&self, keys: &[&str]) -> CheckpointError {
        let names: Vec<String> = keys.iter().map(|key| self.name(key)).collect();
        CheckpointError::MissingKey { path: self.path.clone(), key: names.join(" or ") }
    }

    /// A count, which may be 0.
    pub(crate) fn count(&self, keys: &[&str]) -> Result<Option<usize>> {
        self.get(keys, "a whole number", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// A size that must be there and positive. The limit keeps products of two sizes inside 64 bits.
    pub(crate) fn size(&self, keys: &[&str]) -> Result<usize> {
        let read = |v: &Value| v.as_u64().filter(|&n| n > 0 && n <= i32::MAX as u64).map(|n| n as usize);
        self.get(keys, "a positive whole number", read)?.ok_or_else(|| self.missing(keys))
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(&[key], "true or false", Value::as_bool)
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f32>> {
        let read = |v: &Value| v.as_f64().map(|n| n as f32).filter(|n| n.is_finite());
        self.get(&[key], "a finite number", read)
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(&[key], "a string", Value::as_str)
    }

    /// A string that must be there.
    pub(crate) fn required_text(&self, key: &str) -> Result<&'a str> {
        self.text(key)?.ok_or_else(|| self.missing(&[key]))
    }

    pub(crate) fn counts(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let read = |v: &Value| {
            let items = v.as_array()?.iter();
            items.map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
        };
        self.get(&[key], "a list of whole numbers", read)
    }
}
