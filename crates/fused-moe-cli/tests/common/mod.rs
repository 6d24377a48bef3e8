//! What the tests of the program share: running it, and making, damaging and reading the files it works on.

// Each test file is a crate of its own and uses a part of this one.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use half::bf16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use tempfile::TempDir;

/// All dispatch backends that `fmoe run` names.
pub const COMMS: [&str; 5] =
    ["mori_high_throughput", "mori_low_latency", "allgather_reducescatter", "naive", "batched"];

/// Longer than any command here takes; one that is still running then hangs.
const DEADLINE: Duration = Duration::from_secs(120);

/// Folder of a golden case.
pub fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(case)
}

/// How a command ended.
#[derive(Debug)]
pub struct Finished {
    pub command: String,
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// Fails unless the command succeeded.
    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    /// Fails unless the command ended with `code` and stderr holds every one of `words`.
    pub fn failed(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "stderr lacks {word:?}: {self:?}");
        }
        self
    }

    /// Stdout, which must be one JSON value and nothing else.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// Runs `fmoe`; fails if it hangs, panics or is killed by a signal.
pub fn fmoe<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Finished {
    finish(Command::new(env!("CARGO_BIN_EXE_fmoe")).args(args).env_remove("RUST_LOG"))
}

/// Runs `command`, with both streams taken; fails as [`fmoe`] does.
pub fn finish(command: &mut Command) -> Finished {
    let shown = format!("{command:?}");
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.unwrap_or_else(|e| panic!("{shown}: {e}"));
    let id = child.id();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let Ok(output) = receiver.recv_timeout(DEADLINE) else {
        let _ = Command::new("kill").arg(id.to_string()).status();
        panic!("hangs: {shown}");
    };
    let output = output.unwrap_or_else(|e| panic!("{shown}: {e}"));
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap_or_else(|e| panic!("{shown}: {e}"));
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    assert!(!stderr.contains("panicked"), "{shown} panics: {stderr}");
    let code = output.status.code().unwrap_or_else(|| panic!("{shown}: {}: {stderr}", output.status));
    Finished { command: shown, code, stdout, stderr }
}

/// Arguments of `fmoe run`; what is not set is left to the program.
#[derive(Clone, Debug)]
pub struct Run {
    pub checkpoint: PathBuf,
    pub input: PathBuf,
    pub output: PathBuf,
    pub options: Vec<String>,
}

impl Run {
    /// A golden case as the manifest has it.
    pub fn golden(case: &str, output: &Path) -> Self {
        let folder = golden(case);
        Self {
            input: folder.join("input.safetensors"),
            checkpoint: folder,
            output: output.to_path_buf(),
            options: vec!["--layer".into(), manifest_entry(case)["layer"].to_string()],
        }
    }

    /// With more options, separated by spaces.
    pub fn with(mut self, options: &str) -> Self {
        self.options.extend(options.split_whitespace().map(str::to_string));
        self
    }

    /// Runs it.
    pub fn run(&self) -> Finished {
        let mut args = vec![OsStr::new("run"), OsStr::new("--checkpoint"), self.checkpoint.as_os_str()];
        args.extend([OsStr::new("--input"), self.input.as_os_str()]);
        args.extend([OsStr::new("--output"), self.output.as_os_str()]);
        args.extend(self.options.iter().map(OsStr::new));
        fmoe(args)
    }

    /// Fails unless it ends with `code` and every one of `words` on stderr, and OUT and its folder are as they
    /// were, both where OUT existed and where it did not.
    pub fn refused(mut self, code: i32, words: &[&str]) {
        let folder = tempfile::tempdir().unwrap();
        self.output = folder.path().join("out.safetensors");
        self.run().failed(code, words);
        assert_eq!(listing(folder.path()), Vec::<String>::new(), "left behind by {self:?}");
        std::fs::write(&self.output, "before").unwrap();
        let finished = self.run().failed(code, words);
        assert_eq!(listing(folder.path()), ["out.safetensors"], "left behind by {self:?}");
        assert_eq!(std::fs::read_to_string(&self.output).unwrap(), "before", "{finished:?}");
    }
}

/// Names in `folder`, sorted.
pub fn listing(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The golden cases.
pub fn manifest() -> Vec<Value> {
    serde_json::from_slice(&std::fs::read(golden("manifest.json")).unwrap()).unwrap()
}

/// One golden case.
pub fn manifest_entry(case: &str) -> Value {
    manifest().into_iter().find(|entry| entry["name"] == case).unwrap_or_else(|| panic!("no case {case}"))
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// bf16 values.
    pub fn bf16(shape: &[usize], values: impl IntoIterator<Item = f32>) -> Self {
        let bytes = values.into_iter().flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect();
        Self { dtype: Dtype::BF16, shape: shape.to_vec(), bytes }
    }

    /// f32 values.
    pub fn f32(shape: &[usize], values: impl IntoIterator<Item = f32>) -> Self {
        let bytes = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    /// The values of a bf16 or f32 tensor.
    pub fn values(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::BF16 => self.bytes.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::F32 => self.words().into_iter().map(f32::from_le_bytes).collect(),
            other => panic!("{other:?} has no values here"),
        }
    }

    /// The values of an i32 tensor.
    pub fn ids(&self) -> Vec<i32> {
        assert_eq!(self.dtype, Dtype::I32);
        self.words().into_iter().map(i32::from_le_bytes).collect()
    }

    fn words(&self) -> Vec<[u8; 4]> {
        self.bytes.chunks(4).map(|b| [b[0], b[1], b[2], b[3]]).collect()
    }
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// All tensors of a file.
pub fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let tensors = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let tensors = tensors.tensors().into_iter().map(|(name, view)| {
        let (dtype, shape) = (view.dtype(), view.shape().to_vec());
        (name, Tensor { dtype, shape, bytes: view.data().to_vec() })
    });
    tensors.collect()
}

/// Writes a file of tensors.
pub fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, tensor)| {
        (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Writes a file with `hidden_states`.
pub fn write_hidden(path: &Path, hidden_states: Tensor) {
    write(path, &Tensors::from([("hidden_states".into(), hidden_states)]));
}

/// `‖got − want‖ / ‖want‖`.
pub fn relative_l2(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let error: f64 = got.iter().zip(want).map(|(&g, &w)| square(f64::from(g) - f64::from(w))).sum();
    let norm: f64 = want.iter().map(|&w| square(f64::from(w))).sum();
    if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
}

/// A copy of a golden case that a test may damage.
#[derive(Debug)]
pub struct Copied {
    folder: TempDir,
    case: String,
}

impl Copied {
    /// Copies `case`.
    pub fn of(case: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in listing(&golden(case)) {
            std::fs::copy(golden(case).join(&name), folder.path().join(&name)).unwrap();
        }
        Self { folder, case: case.into() }
    }

    /// Where a file of it is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Changes `config.json`.
    pub fn edit_config(&self, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let path = self.path("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(config.as_object_mut().unwrap());
        std::fs::write(path, config.to_string()).unwrap();
    }

    /// Changes the tensors of `model.safetensors`.
    pub fn edit_tensors(&self, edit: impl FnOnce(&mut Tensors)) {
        self.edit(&self.path("model.safetensors"), edit);
    }

    /// Changes `hidden_states`.
    pub fn edit_hidden(&self, edit: impl FnOnce(&mut Tensor)) {
        let edit = |tensors: &mut Tensors| edit(tensors.get_mut("hidden_states").unwrap());
        self.edit(&self.path("input.safetensors"), edit);
    }

    fn edit(&self, path: &Path, edit: impl FnOnce(&mut Tensors)) {
        let mut tensors = read(path);
        edit(&mut tensors);
        write(path, &tensors);
    }

    /// The case's own layer and input, OUT beside them.
    pub fn run(&self) -> Run {
        Run {
            checkpoint: self.folder.path().to_path_buf(),
            input: self.path("input.safetensors"),
            ..Run::golden(&self.case, &self.path("out.safetensors"))
        }
    }
}
