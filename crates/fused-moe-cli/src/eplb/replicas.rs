//! What `fmoe run` does with a placement, and what it records.

use std::path::Path;

use anyhow::{Context, anyhow};
use fused_moe::router::eplb::{Balance, LoadRecorder, LoadShape, ReplicaTable};
use fused_moe::{ExpertPlacement, MoeConfig};

use super::BalanceReport;
use super::files::{LoadFile, PlacementFile};
use crate::exit::{Failure, OrFailure, refused};

/// The experts of a layer with their replicas.
#[derive(Debug)]
pub struct Replicas {
    /// The replicas.
    pub table: ReplicaTable,
    /// The configuration over physical experts.
    pub config: MoeConfig,
}

impl Replicas {
    /// Places `layer`, whose configuration without replicas is `config`, as the file at `path` says; without a file,
    /// every expert is in the slot of its own id.
    pub fn new(path: Option<&Path>, layer: usize, config: MoeConfig) -> Result<Self, Failure> {
        let Some(path) = path else {
            let table = ReplicaTable::identity(config.num_experts(), 0).or_refused()?;
            return Ok(Self { table, config });
        };
        let file = PlacementFile::read(path).or_refused()?;
        let mut why = Vec::new();
        if file.num_experts != config.num_experts() {
            why.push(format!(
                "it is of {} experts, the model has {}",
                file.num_experts,
                config.num_experts()
            ));
        }
        if file.ranks != config.ep_size() {
            why.push(format!("it is for {} ranks, --ep-size is {}", file.ranks, config.ep_size()));
        }
        let table = file.table(layer).transpose().or_refused()?;
        if table.is_none() {
            let layers: Vec<String> = file.layers().map(|layer| layer.to_string()).collect();
            why.push(format!("it places layers {}, not {layer}", layers.join(", ")));
        }
        let Some(table) = table.filter(|_| why.is_empty()) else {
            return refused(format!("--placement {}: {}", path.display(), why.join("; ")));
        };
        let placement = ExpertPlacement::linear(table.num_physical(), file.ranks).or_refused()?;
        let redundant_experts = table.num_physical() - table.num_logical();
        Ok(Self { config: MoeConfig { placement, redundant_experts, ..config }, table })
    }
}

/// The load of one call.
#[derive(Debug)]
pub struct Recorded {
    /// By logical expert, for `--record-load`.
    pub file: LoadFile,
    /// As it lay on the ranks.
    pub balance: BalanceReport,
}

impl Recorded {
    /// Counts the `slots` that the tokens of all ranks went to in `layer`.
    pub fn new(replicas: &Replicas, layer: usize, slots: &[i32]) -> anyhow::Result<Self> {
        let Replicas { table, config } = replicas;
        let shape = LoadShape { layers: 1, physical: table.num_physical(), window: 1 };
        let mut recorder = LoadRecorder::new(shape)?;
        recorder.record(0, slots).context("counting the load")?;
        let steps = recorder.steps(0).map(|load| table.logical_load(load)).collect();
        let groups = config.routing.as_ref().and_then(|routing| routing.groups).map(|groups| groups.n_group);
        let load = recorder.steps(0).next().ok_or_else(|| anyhow!("a recorder is in some step"))?;
        Ok(Self {
            file: LoadFile::new(table.num_logical(), groups, layer, steps),
            balance: (&Balance::measured(load, &config.placement)).into(),
        })
    }
}
