//! Checkpoints from arbitrary bytes.

use std::cell::RefCell;
use std::path::Path;

use arbitrary::{Result, Unstructured};
use fused_moe_core::DType;
use moe_checkpoint::{Checkpoint, CheckpointError, Matrix, MoeLayer, WeightScale};
use tempfile::TempDir;

use crate::checkpoint::model::Model;

mod model;

/// Separates the parts of an input that is text: no JSON has it, and a mutation of one part leaves the others.
const SEPARATOR: &[u8] = b"\n--\n";

/// Tensor bytes that a file gets at most: enough for every correct model that is drawn.
const MAX_TENSOR_BYTES: usize = 1 << 18;

/// Opens what the bytes describe and reads all layers that have experts: errors must be typed, and reads must
/// stay inside the file. The first byte says how the rest becomes files:
///
/// - `r`: `config.json`, then `model.safetensors` as it is.
/// - `h`: `config.json`, then the header of `model.safetensors`, which gets its length in front, then tensor bytes.
/// - `s`: as `h`, with the weights in `a.safetensors`, and the index after them.
/// - anything else: bytes that a small model is drawn from, correct but for a few edits. Without edits it must
///   be accepted.
pub fn checkpoint(bytes: &[u8]) {
    let Some((&kind, rest)) = bytes.split_first() else { return };
    match kind {
        b'r' | b'h' | b's' => with_files(&Files::split(kind, rest), |dir| drop(read(dir))),
        _ => drop(drawn(&mut Unstructured::new(rest))),
    }
}

/// Running out of bytes ends a case like any other: there is nothing to report.
fn drawn(u: &mut Unstructured<'_>) -> Result<()> {
    let mut model = Model::draw(u)?;
    let edited = model.edit(u)?;
    with_files(&model.files(), |dir| match read(dir) {
        Ok(read) if !edited => assert_eq!(read, model.expected_reads()),
        Ok(_) => {}
        Err(error) => assert!(edited, "a correct checkpoint was refused: {error}\n{model:?}"),
    });
    Ok(())
}

/// The files of a checkpoint.
struct Files {
    config: Vec<u8>,
    weights: Vec<u8>,
    /// Makes the weights a shard.
    index: Option<Vec<u8>>,
}

impl Files {
    fn split(kind: u8, bytes: &[u8]) -> Self {
        let (config, rest) = cut(bytes);
        if kind == b'r' {
            return Self { config: config.to_vec(), weights: rest.to_vec(), index: None };
        }
        let (header, rest) = cut(rest);
        let (tensors, index) = cut(rest);
        let index = (kind == b's').then(|| index.to_vec());
        Self { config: config.to_vec(), weights: safetensors(header, tensors), index }
    }
}

/// The bytes before and behind the first separator.
fn cut(bytes: &[u8]) -> (&[u8], &[u8]) {
    let found = bytes.windows(SEPARATOR.len()).position(|window| window == SEPARATOR);
    found.map_or((bytes, &[]), |at| (&bytes[..at], &bytes[at + SEPARATOR.len()..]))
}

/// A safetensors file: the length of the header, the header, the tensors.
///
/// Tensor bytes that the header announces and the input does not have are zeros, so that inputs stay small.
fn safetensors(header: &[u8], tensors: &[u8]) -> Vec<u8> {
    let announced = serde_json::from_slice(header).ok().and_then(|header: serde_json::Value| {
        let ends = header.as_object()?.values().filter_map(|t| t.get("data_offsets")?.get(1)?.as_u64());
        ends.max()
    });
    let len =
        announced.filter(|&len| len <= MAX_TENSOR_BYTES as u64).map_or(tensors.len(), |len| len as usize);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend(tensors.iter().copied().chain(std::iter::repeat(0)).take(len));
    file
}

/// Calls `use_dir` with a folder that holds `files`.
fn with_files<T>(files: &Files, use_dir: impl FnOnce(&Path) -> T) -> T {
    thread_local! {
        // One folder for all inputs: making and removing one costs as much as the rest of an input.
        static DIR: RefCell<Option<TempDir>> = const { RefCell::new(None) };
    }
    DIR.with_borrow_mut(|dir| {
        let dir =
            dir.get_or_insert_with(|| TempDir::new().expect("the system has a temporary folder")).path();
        let put = |name: &str, bytes: Option<&[u8]>| {
            let path = dir.join(name);
            match bytes {
                Some(bytes) => std::fs::write(path, bytes).expect("the temporary folder can be written"),
                None if path.exists() => std::fs::remove_file(path).expect("the file is ours"),
                None => {}
            }
        };
        let weights = Some(&files.weights[..]);
        put("config.json", Some(&files.config));
        put("model.safetensors", weights.filter(|_| files.index.is_none()));
        put("a.safetensors", weights.filter(|_| files.index.is_some()));
        put("model.safetensors.index.json", files.index.as_deref());
        use_dir(dir)
    })
}

/// Reads every layer; the number of experts that were read.
fn read(dir: &Path) -> std::result::Result<usize, CheckpointError> {
    let checkpoint = Checkpoint::open(dir)?;
    let model = checkpoint.model();
    let in_words = model.moe_layers_in_words();
    assert_eq!(in_words == "none", model.moe_layers().next().is_none());
    // A layer that does not exist is an error, whatever the file says.
    assert!(checkpoint.layer(model.num_layers).is_err());
    let mut reads = 0;
    for layer in model.moe_layers().take(4) {
        reads += read_layer(&checkpoint.layer(layer)?)?;
    }
    assert!(checkpoint.reads().bytes > 0 || reads == 0);
    Ok(reads)
}

fn read_layer(layer: &MoeLayer<'_>) -> std::result::Result<usize, CheckpointError> {
    let (model, experts) = (layer.model(), layer.model().num_experts());
    assert_eq!((layer.gate().rows(), layer.gate().cols()), (experts, model.hidden));
    touch(layer.gate());
    if let Some(bias) = layer.correction_bias() {
        assert!(bias.len() == experts && bias.iter().all(|b| b.is_finite()));
    }
    assert!(layer.expert(experts).is_err());
    for expert in 0..experts {
        let tensors = layer.expert(expert)?;
        assert_eq!(tensors.scheme(), layer.scheme());
        for (matrix, rows, cols) in [
            (&tensors.gate, model.intermediate, model.hidden),
            (&tensors.up, model.intermediate, model.hidden),
            (&tensors.down, model.hidden, model.intermediate),
        ] {
            assert_eq!((matrix.rows(), matrix.cols()), (rows, cols));
            touch(matrix.values());
            let dtype = matrix.values().dtype();
            assert_eq!(dtype.is_fp8() || dtype == DType::Fp4E2M1x2, matrix.scale().is_some());
            assert_eq!(matrix.bias().map(<[f32]>::len), model.bias.then_some(rows));
            if let Some(scale) = matrix.scale() {
                check_scale(scale, rows, cols);
            }
        }
    }
    if let Some(shared) = layer.shared_experts()? {
        for matrix in [&shared.mlp.gate, &shared.mlp.up, &shared.mlp.down] {
            touch(matrix.values());
        }
        shared.sigmoid_gate.iter().for_each(touch);
    }
    Ok(experts)
}

/// Reads the first and the last byte, which lie in the file only if all of them do.
fn touch(matrix: &Matrix<'_>) {
    let view = matrix.view();
    assert_eq!(view.dims(), [matrix.rows(), matrix.cols()]);
    for row in [0, matrix.rows() - 1] {
        let bytes = view.row_bytes(row).expect("the row is there");
        std::hint::black_box((bytes[0], bytes[bytes.len() - 1]));
    }
}

fn check_scale(scale: &WeightScale<'_>, rows: usize, cols: usize) {
    for (row, col) in [(0, 0), (rows - 1, cols - 1)] {
        let value = scale.at(row, col, cols);
        assert!(value.is_finite() && value >= 0.0, "scale {value}");
    }
}
