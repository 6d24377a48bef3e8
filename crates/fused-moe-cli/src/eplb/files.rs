//! Files of expert loads and of placements: JSON, with everything that is wrong with one told at once.
//!
//! A load file has what was counted, by logical expert:
//!
//! ```json
//! {"version": 1, "num_experts": 4, "groups": 2, "layers": [{"layer": 0, "steps": [[9, 0, 3, 4], [8, 1, 3, 4]]}]}
//! ```
//!
//! A placement file has the logical expert in every slot, slots in rank order:
//!
//! ```json
//! {"version": 1, "num_experts": 4, "ranks": 2, "slots_per_rank": 3,
//!  "layers": [{"layer": 0, "physical_to_logical": [0, 1, 2, 0, 1, 3]}]}
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use fused_moe::router::eplb::{ReplicaTable, TableError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The version of both formats.
const VERSION: u32 = 1;

/// What the experts of some layers had to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadFile {
    version: u32,
    /// Logical experts of every layer.
    pub num_experts: usize,
    /// Groups of the router, if it has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<usize>,
    layers: Vec<LayerLoad>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerLoad {
    layer: usize,
    /// `[steps, num_experts]` (token, expert) pairs.
    steps: Vec<Vec<u64>>,
}

impl LoadFile {
    /// The record of one layer, `[steps, num_experts]`.
    pub fn new(num_experts: usize, groups: Option<usize>, layer: usize, steps: Vec<Vec<u64>>) -> Self {
        Self { version: VERSION, num_experts, groups, layers: vec![LayerLoad { layer, steps }] }
    }

    /// Reads a file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let file: Self = parse(path)?;
        let mut why = Reasons::of(path);
        why.version(file.version);
        why.layers(file.layers.iter().map(|layer| layer.layer));
        if file.num_experts == 0 {
            why.add("num_experts is 0");
        }
        if file.groups == Some(0) {
            why.add("groups is 0");
        }
        for LayerLoad { layer, steps } in &file.layers {
            if steps.is_empty() {
                why.add(format!("layer {layer} has no steps"));
            }
            for (step, load) in steps.iter().enumerate().filter(|(_, load)| load.len() != file.num_experts) {
                let (found, wanted) = (load.len(), file.num_experts);
                why.add(format!(
                    "step {step} of layer {layer} is of {found} experts, num_experts is {wanted}"
                ));
            }
        }
        why.none_or(file)
    }

    /// The load of every layer, summed over the steps of all `files` (at least one), which must be of one model.
    pub fn sum(files: &[(&Path, LoadFile)]) -> anyhow::Result<BTreeMap<usize, Vec<u64>>> {
        let mut sums: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
        for (path, file) in files {
            let (first, wanted) = &files[0];
            if (file.num_experts, file.groups) != (wanted.num_experts, wanted.groups) {
                let of = |file: &LoadFile| {
                    let groups = file.groups.map_or("no".into(), |groups| groups.to_string());
                    format!("{} experts in {groups} groups", file.num_experts)
                };
                bail!("{} is of {}, {} of {}", first.display(), of(wanted), path.display(), of(file));
            }
            for LayerLoad { layer, steps } in &file.layers {
                let sum = sums.entry(*layer).or_insert_with(|| vec![0; file.num_experts]);
                for (expert, load) in steps.iter().flat_map(|load| load.iter().enumerate()) {
                    let overflow = || format!("the load of expert {expert} of layer {layer} is over 2^64");
                    sum[expert] = sum[expert].checked_add(*load).with_context(overflow)?;
                }
            }
        }
        Ok(sums)
    }
}

/// Which logical expert every slot of some layers holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlacementFile {
    version: u32,
    /// Logical experts of every layer.
    pub num_experts: usize,
    /// Ranks that share them.
    pub ranks: usize,
    /// Slots of every rank.
    pub slots_per_rank: usize,
    layers: Vec<LayerPlacement>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerPlacement {
    layer: usize,
    /// `[ranks · slots_per_rank]`.
    physical_to_logical: Vec<u32>,
}

impl PlacementFile {
    /// A file of no layers yet.
    pub fn new(num_experts: usize, ranks: usize, slots_per_rank: usize) -> Self {
        Self { version: VERSION, num_experts, ranks, slots_per_rank, layers: Vec::new() }
    }

    /// Adds a layer.
    pub fn push(&mut self, layer: usize, table: &ReplicaTable) {
        let physical_to_logical = table.physical_to_logical().to_vec();
        self.layers.push(LayerPlacement { layer, physical_to_logical });
    }

    /// Reads a file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let file: Self = parse(path)?;
        let mut why = Reasons::of(path);
        why.version(file.version);
        why.layers(file.layers.iter().map(|layer| layer.layer));
        let wanted = file.ranks.checked_mul(file.slots_per_rank);
        for layer in &file.layers {
            let found = layer.physical_to_logical.len();
            if Some(found) != wanted {
                why.add(format!(
                    "layer {} has {found} slots, {} ranks with {} slots each have others",
                    layer.layer, file.ranks, file.slots_per_rank
                ));
            }
            if let Err(error) = file.table_of(layer) {
                why.add(format!("layer {}: {error}", layer.layer));
            }
        }
        why.none_or(file)
    }

    /// The layers that it places, in order of the file.
    pub fn layers(&self) -> impl Iterator<Item = usize> + '_ {
        self.layers.iter().map(|layer| layer.layer)
    }

    /// The table of `layer`, if it places that.
    pub fn table(&self, layer: usize) -> Option<Result<ReplicaTable, TableError>> {
        self.layers.iter().find(|placed| placed.layer == layer).map(|placed| self.table_of(placed))
    }

    fn table_of(&self, layer: &LayerPlacement) -> Result<ReplicaTable, TableError> {
        ReplicaTable::new(self.num_experts, layer.physical_to_logical.clone())
    }
}

/// One JSON object.
pub fn to_json(value: &impl Serialize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(value)?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn parse<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("in {}", path.display()))
}

/// Everything that is wrong with a file.
struct Reasons<'p> {
    path: &'p Path,
    found: Vec<String>,
}

impl<'p> Reasons<'p> {
    fn of(path: &'p Path) -> Self {
        Self { path, found: Vec::new() }
    }

    fn add(&mut self, why: impl Into<String>) {
        self.found.push(why.into());
    }

    fn version(&mut self, found: u32) {
        if found != VERSION {
            self.add(format!("version is {found}, this program reads {VERSION}"));
        }
    }

    fn layers(&mut self, layers: impl Iterator<Item = usize>) {
        let mut seen = Vec::new();
        for layer in layers {
            if seen.contains(&layer) {
                self.add(format!("layer {layer} is there twice"));
            }
            seen.push(layer);
        }
        if seen.is_empty() {
            self.add("there are no layers");
        }
    }

    fn none_or<T>(self, file: T) -> anyhow::Result<T> {
        if self.found.is_empty() {
            return Ok(file);
        }
        Err(anyhow!("{}: {}", self.path.display(), self.found.join("; ")))
    }
}
