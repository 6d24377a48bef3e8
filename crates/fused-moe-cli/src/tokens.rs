//! Files of tensors: hidden states in, outputs out.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use half::bf16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tempfile::NamedTempFile;

/// Hidden states, `[tokens, hidden]`, rounded to bf16 once.
#[derive(Clone, Debug)]
pub struct HiddenStates {
    /// Row-major values.
    pub values: Vec<bf16>,
    /// Rows.
    pub tokens: usize,
}

impl HiddenStates {
    /// Reads `hidden_states` from a safetensors file.
    pub fn read(path: &Path, hidden: usize) -> anyhow::Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let context = || format!("in {}", path.display());
        let tensors = SafeTensors::deserialize(&bytes).with_context(context)?;
        let tensor = tensors.tensor("hidden_states").with_context(context)?;
        let &[tokens, columns] = tensor.shape() else {
            bail!("hidden_states is {:?}, wanted [tokens, {hidden}], {}", tensor.shape(), context());
        };
        if columns != hidden {
            bail!(
                "hidden_states is [{tokens}, {columns}], the model's hidden size is {hidden}, {}",
                context()
            );
        }
        let values: Vec<bf16> = match tensor.dtype() {
            Dtype::BF16 => tensor.data().chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect(),
            Dtype::F32 => {
                let values =
                    tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                values.map(bf16::from_f32).collect()
            }
            found => bail!("hidden_states is {found:?}, wanted BF16 or F32, {}", context()),
        };
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            let (token, element) = (at / hidden, at % hidden);
            bail!("hidden_states of token {token} is {} at element {element}, {}", values[at], context());
        }
        Ok(Self { values, tokens })
    }
}

/// What a run writes.
#[derive(Clone, Debug)]
pub struct LayerOutput {
    /// Rows of every tensor.
    pub tokens: usize,
    /// Columns of `output` and `routed`.
    pub hidden: usize,
    /// Columns of `topk_ids` and `topk_weights`.
    pub top_k: usize,
    /// `[tokens, hidden]`: routed and shared experts.
    pub output: Vec<f32>,
    /// `[tokens, hidden]`: routed experts.
    pub routed: Vec<f32>,
    /// `[tokens, top_k]`.
    pub topk_ids: Vec<i32>,
    /// `[tokens, top_k]`.
    pub topk_weights: Vec<f32>,
}

/// A file that appears whole or not at all.
#[derive(Debug)]
pub struct OutputFile {
    path: PathBuf,
    folder: PathBuf,
}

impl OutputFile {
    /// Checks that `path` can be written, without touching it.
    pub fn check(path: &Path) -> anyhow::Result<Self> {
        let folder = match path.parent() {
            Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
            Some(folder) => folder,
            None => bail!("{} is not a file name", path.display()),
        };
        if !folder.is_dir() {
            bail!("the folder of {} does not exist", path.display());
        }
        if path.is_dir() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            bail!("{} is a folder", path.display());
        }
        // A rename would put a file in the place of /dev/null.
        if path.exists() && !path.is_file() {
            bail!("{} is not an ordinary file", path.display());
        }
        Ok(Self { path: path.to_path_buf(), folder: folder.to_path_buf() })
    }

    /// Whether both are the same file, whatever their paths are.
    pub fn is(&self, other: &Self) -> bool {
        let place = |file: &Self| {
            (file.folder.canonicalize().ok(), file.path.file_name().map(std::ffi::OsStr::to_os_string))
        };
        place(self) == place(other)
    }

    /// Writes the outputs beside the file under a temporary name.
    pub fn stage(&self, out: &LayerOutput) -> anyhow::Result<StagedFile<'_>> {
        let f32_bytes = |values: &[f32]| bytes_of(values, f32::to_le_bytes);
        let ids = bytes_of(&out.topk_ids, i32::to_le_bytes);
        let mut named = Vec::new();
        let tensors = [
            ("output", Dtype::F32, out.hidden, f32_bytes(&out.output)),
            ("routed", Dtype::F32, out.hidden, f32_bytes(&out.routed)),
            ("topk_ids", Dtype::I32, out.top_k, ids),
            ("topk_weights", Dtype::F32, out.top_k, f32_bytes(&out.topk_weights)),
        ];
        for (name, dtype, columns, bytes) in &tensors {
            let view = TensorView::new(*dtype, vec![out.tokens, *columns], bytes);
            named.push((*name, view.map_err(|e| anyhow!("{name}: {e}"))?));
        }
        self.stage_bytes(&safetensors::serialize(named, None)?)
    }

    /// Writes `bytes` beside the file under a temporary name.
    pub fn stage_bytes(&self, bytes: &[u8]) -> anyhow::Result<StagedFile<'_>> {
        let context = || format!("cannot write {}", self.path.display());
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        {
            // Temporary files are private by default; this one becomes an ordinary file, subject to the umask.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(&self.folder).with_context(context)?;
        std::fs::write(file.path(), bytes).with_context(context)?;
        Ok(StagedFile { file, path: &self.path })
    }
}

/// Contents under a temporary name, which are gone if they are not committed.
#[derive(Debug)]
pub struct StagedFile<'p> {
    file: NamedTempFile,
    path: &'p Path,
}

impl StagedFile<'_> {
    /// Renames them to their own name.
    pub fn commit(self) -> anyhow::Result<()> {
        self.file.persist(self.path).with_context(|| format!("cannot write {}", self.path.display()))?;
        Ok(())
    }
}

fn bytes_of<T: Copy, const N: usize>(values: &[T], bytes: fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&value| bytes(value)).collect()
}
