//! The names that the tensors of a layer have in a family's checkpoints.

use crate::error::{CheckpointError, Result};
use crate::files::TensorFiles;
use crate::model::{ModelFamily, MoeModel};
use crate::wanted::{PackedPart, Wanted};

/// What stands before `layers.`: models saved without their language head have no `model.`, models of several
/// modalities keep the language model apart.
const ROOTS: [&str; 3] = ["model.", "", "model.language_model."];

/// The names of a layer's tensors.
#[derive(Debug)]
pub(crate) struct Names {
    /// `model.layers.3.mlp.`
    pub(crate) prefix: String,
    /// `gate` or `router`.
    router: &'static str,
    experts: Experts,
}

/// How the routed experts are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Experts {
    /// Gate, up and down of each expert in tensors of their own, of these names.
    Each([&'static str; 3]),
    /// `gate_up_proj` and `down_proj` of all experts: gate rows, then up rows.
    Packed,
    /// As [`Experts::Packed`], but gate and up alternate, and everything has a bias.
    GptOss {
        /// MXFP4 in blocks, not bf16.
        blocks: bool,
    },
}

impl Names {
    pub(crate) fn detect(files: &TensorFiles, family: ModelFamily, layer: usize) -> Result<Self> {
        let (blocks, projections): (&[&str], _) = match family {
            // transformers 5 holds Mixtral's block under `mlp` and writes it so when it packs the experts.
            ModelFamily::Mixtral => (&["block_sparse_moe", "mlp"], ["w1", "w3", "w2"]),
            _ => (&["mlp"], ["gate_proj", "up_proj", "down_proj"]),
        };
        let router = if family == ModelFamily::GptOss { "router" } else { "gate" };
        let prefixes: Vec<String> = ROOTS
            .iter()
            .flat_map(|root| blocks.iter().map(move |block| format!("{root}layers.{layer}.{block}.")))
            .collect();
        let mut present =
            prefixes.iter().filter(|prefix| files.contains(&format!("{prefix}{router}.weight")));
        // Without any, the first is the name that the error should have.
        let prefix = present.next().unwrap_or(&prefixes[0]).clone();
        if let Some(other) = present.next() {
            return Err(CheckpointError::Ambiguous {
                what: format!("layer {layer}"),
                why: format!("both {prefix}{router}.weight and {other}{router}.weight are there"),
            });
        }
        let packed = format!("{prefix}experts.gate_up_proj");
        let other = match family {
            ModelFamily::GptOss => format!("{packed}_blocks"),
            _ => format!("{prefix}experts.0.{}.weight", projections[0]),
        };
        let experts = match (files.contains(&packed), files.contains(&other)) {
            (true, true) => {
                return Err(CheckpointError::Ambiguous {
                    what: format!("the experts of layer {layer}"),
                    why: format!("both {packed} and {other} are there"),
                });
            }
            (_, blocks) if family == ModelFamily::GptOss => Experts::GptOss { blocks },
            (true, false) => Experts::Packed,
            (false, _) => Experts::Each(projections),
        };
        Ok(Self { prefix, router, experts })
    }

    /// The router's tensor `what`: `weight` or `bias`.
    pub(crate) fn router(&self, what: &str) -> String {
        format!("{}{}.{what}", self.prefix, self.router)
    }

    /// Where gate, up and down of `expert` should be.
    pub(crate) fn expert(&self, expert: usize, model: &MoeModel) -> [Wanted; 3] {
        let (hidden, intermediate) = (model.hidden, model.intermediate);
        let experts = format!("{}experts", self.prefix);
        let part = |first_row, row_step, total_rows| PackedPart {
            expert,
            num_experts: model.num_experts(),
            first_row,
            row_step,
            total_rows,
        };
        let (gate_up, down) = (format!("{experts}.gate_up_proj"), format!("{experts}.down_proj"));
        let (both, whole) = (2 * intermediate, part(0, 1, hidden));
        match self.experts {
            Experts::Each(names) => mlp(&format!("{experts}.{expert}"), names, hidden, intermediate),
            Experts::Packed => [
                Wanted::packed(&gate_up, intermediate, hidden, part(0, 1, both)),
                Wanted::packed(&gate_up, intermediate, hidden, part(intermediate, 1, both)),
                Wanted::packed(&down, hidden, intermediate, whole),
            ],
            Experts::GptOss { blocks } => [
                Wanted::gpt_oss(&gate_up, [intermediate, hidden], part(0, 2, both), blocks),
                Wanted::gpt_oss(&gate_up, [intermediate, hidden], part(1, 2, both), blocks),
                Wanted::gpt_oss(&down, [hidden, intermediate], whole, blocks),
            ],
        }
    }
}

/// Where the projections `names` of the MLP `base` should be.
pub(crate) fn mlp(base: &str, names: [&str; 3], hidden: usize, intermediate: usize) -> [Wanted; 3] {
    let [gate, up, down] = names.map(|name| format!("{base}.{name}"));
    [
        Wanted::own(&gate, intermediate, hidden),
        Wanted::own(&up, intermediate, hidden),
        Wanted::own(&down, hidden, intermediate),
    ]
}
