//! The safetensors files of a checkpoint: mapped into memory, each header parsed once, when first needed.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors};
use serde_json::Value;

use crate::config::read_object;
use crate::error::{CheckpointError, Result};

/// Largest index that is read; DeepSeek-V3's, with 90 thousand tensors, has 9 MB.
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// Bytes in front of a safetensors header, which hold its length.
const LENGTH_BYTES: usize = 8;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A tensor as it lies in its file.
#[derive(Clone, Copy)]
pub(crate) struct Stored<'c> {
    pub(crate) path: &'c Path,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'c [usize],
    pub(crate) bytes: &'c [u8],
}

/// All weight files of a checkpoint.
#[derive(Debug)]
pub(crate) struct TensorFiles {
    /// The index, or the single file.
    root: PathBuf,
    /// Tensor to position in `shards`; `None` without an index.
    index: Option<HashMap<String, usize>>,
    shards: Vec<Shard>,
}

impl TensorFiles {
    /// Opens the files of `dir`: `model.safetensors` if it is there, as transformers does, else those of the index.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE);
        if single.exists() {
            let shard = Shard::new(single.clone());
            shard.contents(None)?;
            return Ok(Self { root: single, index: None, shards: vec![shard] });
        }
        let root = dir.join(INDEX);
        if !root.exists() {
            return Err(CheckpointError::NoWeights { dir: dir.to_owned() });
        }
        let object = read_object(&root, MAX_INDEX_BYTES)?;
        let bad = |why: String| CheckpointError::Json { path: root.clone(), why };
        let Some(weight_map) = object.get("weight_map").and_then(Value::as_object) else {
            return Err(bad("key weight_map is not an object of tensor names and file names".to_owned()));
        };
        let mut shards: Vec<Shard> = Vec::new();
        let mut position: HashMap<&str, usize> = HashMap::new();
        let mut index = HashMap::with_capacity(weight_map.len());
        for (tensor, file) in weight_map {
            let Some(file) = file.as_str().filter(|file| is_plain_name(file)) else {
                return Err(bad(format!(
                    "tensor {tensor} is in {file}, wanted the name of a file beside it"
                )));
            };
            let at = *position.entry(file).or_insert_with(|| {
                shards.push(Shard::new(dir.join(file)));
                shards.len() - 1
            });
            index.insert(tensor.clone(), at);
        }
        Ok(Self { root, index: Some(index), shards })
    }

    /// The tensor `name`, `None` if the checkpoint has none of that name.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Stored<'_>>> {
        let Some(index) = &self.index else { return self.shards[0].tensor(name) };
        let Some(&at) = index.get(name) else { return Ok(None) };
        let shard = &self.shards[at];
        match shard.tensor(name)? {
            Some(stored) => Ok(Some(stored)),
            None => Err(CheckpointError::MissingTensor { tensor: name.to_owned(), path: shard.path.clone() }),
        }
    }

    /// The tensor `name`, which must be there.
    pub(crate) fn get(&self, name: &str) -> Result<Stored<'_>> {
        self.find(name)?.ok_or_else(|| CheckpointError::MissingTensor {
            tensor: name.to_owned(),
            path: self.root.clone(),
        })
    }

    /// Whether the checkpoint has the tensor `name`, by the index where there is one: no shard is opened for it.
    pub(crate) fn contains(&self, name: &str) -> bool {
        match &self.index {
            Some(index) => index.contains_key(name),
            None => matches!(self.shards[0].tensor(name), Ok(Some(_))),
        }
    }
}

/// Whether `file` names a file of the folder itself: an index must not reach outside its folder.
fn is_plain_name(file: &str) -> bool {
    let mut parts = Path::new(file).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    contents: OnceLock<Contents>,
}

#[derive(Debug)]
struct Contents {
    map: Mmap,
    /// Where the tensors start.
    base: usize,
    metadata: Metadata,
}

impl Shard {
    fn new(path: PathBuf) -> Self {
        Self { path, contents: OnceLock::new() }
    }

    fn tensor(&self, name: &str) -> Result<Option<Stored<'_>>> {
        let contents = self.contents(Some(name))?;
        let Some(info) = contents.metadata.info(name) else { return Ok(None) };
        let (start, end) = info.data_offsets;
        // `read_metadata` checked that the tensors fill the file without gaps or overlaps.
        let bytes = &contents.map[contents.base + start..contents.base + end];
        Ok(Some(Stored { path: &self.path, dtype: info.dtype, shape: &info.shape, bytes }))
    }

    /// The mapped file; `tensor` is what it is opened for.
    fn contents(&self, tensor: Option<&str>) -> Result<&Contents> {
        if let Some(contents) = self.contents.get() {
            return Ok(contents);
        }
        let contents = self.open(tensor)?;
        Ok(self.contents.get_or_init(|| contents))
    }

    fn open(&self, tensor: Option<&str>) -> Result<Contents> {
        let io = |source: std::io::Error| match tensor {
            Some(tensor) if source.kind() == std::io::ErrorKind::NotFound => {
                CheckpointError::MissingShard { path: self.path.clone(), tensor: tensor.to_owned() }
            }
            _ => CheckpointError::Io { path: self.path.clone(), source },
        };
        let file = File::open(&self.path).map_err(io)?;
        // SAFETY: the mapping is private and read-only. Nothing stops another process from writing to the file;
        // like every program that maps weights, this one relies on checkpoints not being changed while in use.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let (length, metadata) =
            SafeTensors::read_metadata(&map).map_err(|why| self.header_error(&map, &why))?;
        Ok(Contents { base: LENGTH_BYTES + length, metadata, map })
    }

    /// Tells a file that is too short from one that is wrong.
    fn header_error(&self, map: &[u8], why: &SafeTensorError) -> CheckpointError {
        let found = map.len() as u64;
        let wanted = match why {
            SafeTensorError::HeaderTooSmall => Some(LENGTH_BYTES as u64),
            SafeTensorError::InvalidHeaderLength | SafeTensorError::MetadataIncompleteBuffer => {
                announced_bytes(map)
            }
            _ => None,
        };
        match wanted.filter(|&wanted| wanted > found) {
            Some(wanted) => CheckpointError::Truncated { path: self.path.clone(), wanted, found },
            None => CheckpointError::Header { path: self.path.clone(), why: why.to_string() },
        }
    }
}

/// Bytes that the file should have by its header, or by as much of the header as is there.
fn announced_bytes(map: &[u8]) -> Option<u64> {
    let length = u64::from_le_bytes(map.get(..LENGTH_BYTES)?.try_into().ok()?);
    let base = length.checked_add(LENGTH_BYTES as u64)?;
    let Some(header) = map.get(LENGTH_BYTES..usize::try_from(base).ok()?) else { return Some(base) };
    let header: Value = serde_json::from_slice(header).ok()?;
    let ends = header.as_object()?.values().filter_map(|tensor| tensor.get("data_offsets")?.get(1)?.as_u64());
    base.checked_add(ends.max().unwrap_or(0))
}
