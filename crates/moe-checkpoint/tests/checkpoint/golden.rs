//! The committed checkpoints that transformers wrote: every tensor is found and fits.

use std::path::{Path, PathBuf};

use fused_moe_core::QuantScheme;
use moe_checkpoint::Checkpoint;

fn folders() -> Vec<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(golden)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").exists())
        .collect();
    folders.sort();
    folders
}

#[test]
fn every_golden_checkpoint_opens() {
    let folders = folders();
    assert!(folders.len() >= 10, "only {} golden folders", folders.len());
    for folder in folders {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let model = checkpoint.model();
        // Most of the folders hold one layer only.
        let layers: Vec<_> = model.moe_layers().filter_map(|layer| checkpoint.layer(layer).ok()).collect();
        assert!(!layers.is_empty(), "{name}: {:?}", checkpoint.layer(1).err());
        for layer in layers {
            let quantised = name.contains("fp8") || name.contains("fp4");
            assert_eq!(quantised, layer.scheme() != QuantScheme::Unquantized, "{name}");
            assert_eq!(name.contains("gpt_oss"), layer.gate_bias().is_some(), "{name}");
            assert_eq!(layer.scheme(), model.declared_scheme, "{name}");
            assert_eq!(name.contains("deepseek_v3"), layer.correction_bias().is_some(), "{name}");
            for expert in 0..model.num_experts() {
                let tensors = layer.expert(expert).unwrap();
                for matrix in [&tensors.gate, &tensors.up] {
                    assert_eq!((matrix.rows(), matrix.cols()), (model.intermediate, model.hidden), "{name}");
                    assert_eq!(matrix.bias().is_some(), model.bias, "{name}");
                    assert_eq!(matrix.scheme(), layer.scheme(), "{name}");
                }
                let down = &tensors.down;
                assert_eq!((down.rows(), down.cols()), (model.hidden, model.intermediate), "{name}");
            }
            let shared = layer.shared_experts().unwrap();
            let has_shared = ["deepseek", "qwen2", "qwen3_5"].iter().any(|family| name.contains(family));
            assert_eq!(shared.is_some(), has_shared, "{name}");
            assert_eq!(checkpoint.reads().experts.len(), model.num_experts(), "{name}");
        }
    }
}
