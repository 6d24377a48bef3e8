//! What the experts had to do: tokens per slot, layer and step.

use fused_moe_core::{NO_EXPERT, ProcessGroup};

/// What a [`LoadRecorder`] has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadShape {
    /// Layers with experts.
    pub layers: usize,
    /// Slots per layer, over all ranks.
    pub physical: usize,
    /// Steps that are kept, the current one among them; at least 1.
    pub window: usize,
}

/// Something that has no place in a record.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A window of no steps.
    #[error("a window of no steps keeps nothing")]
    EmptyWindow,
    /// A layer that the recorder has no room for.
    #[error("layer {layer} is not in 0..{layers}")]
    NoSuchLayer {
        /// The layer.
        layer: usize,
        /// Layers of the recorder.
        layers: usize,
    },
    /// An id that is neither −1 nor of a slot.
    #[error("expert id {id} at position {position} is neither -1 nor in 0..{physical}")]
    NoSuchExpert {
        /// Position among the ids given.
        position: usize,
        /// The id.
        id: i32,
        /// Slots of the layer.
        physical: usize,
    },
    /// The ranks do not count the same slots.
    #[error("rank {rank} has counted {theirs} slots, this one {mine}")]
    Slots {
        /// The other rank.
        rank: usize,
        /// Its slots.
        theirs: usize,
        /// Slots of this rank.
        mine: usize,
    },
    /// The ranks could not be asked.
    #[error(transparent)]
    Group(#[from] fused_moe_core::Error),
}

/// Counts the tokens that this rank has sent to every slot, step by step, in a window of the last steps.
///
/// All memory is had at the start; [`LoadRecorder::record`] and [`LoadRecorder::end_step`] allocate nothing.
///
/// ```
/// use router::eplb::{LoadRecorder, LoadShape};
///
/// let mut recorder = LoadRecorder::new(LoadShape { layers: 1, physical: 4, window: 2 })?;
/// recorder.record(0, &[1, 3, 1, -1])?;
/// recorder.end_step();
/// recorder.record(0, &[1, 0])?;
/// assert_eq!(recorder.load(0), [1, 3, 0, 1]);
/// recorder.end_step(); // The window holds two steps: the first is gone.
/// assert_eq!(recorder.load(0), [1, 1, 0, 0]);
/// # Ok::<(), router::eplb::LoadError>(())
/// ```
#[derive(Clone, Debug)]
pub struct LoadRecorder {
    shape: LoadShape,
    /// `[window, layers, physical]`.
    counts: Vec<u64>,
    /// Row of `counts` that the current step is in.
    current: usize,
    /// Steps in the window, the current one among them.
    steps: usize,
    recording: bool,
}

impl LoadRecorder {
    /// A recorder at the start of its first step, switched on.
    ///
    /// # Errors
    /// [`LoadError::EmptyWindow`].
    pub fn new(shape: LoadShape) -> Result<Self, LoadError> {
        if shape.window == 0 {
            return Err(LoadError::EmptyWindow);
        }
        let counts = vec![0; shape.window * shape.layers * shape.physical];
        Ok(Self { shape, counts, current: 0, steps: 1, recording: true })
    }

    /// What it has room for.
    pub fn shape(&self) -> LoadShape {
        self.shape
    }

    /// Switches recording off (warm-up, profiling runs) or on again. While it is off, nothing is counted and
    /// steps do not end.
    pub fn set_recording(&mut self, on: bool) {
        self.recording = on;
    }

    /// Counts the slots that the rows of a call go to, [`crate::eplb::ReplicaTable::map`]'s output. −1 does not
    /// count; rows that are padding with ids in them are for the caller to leave out.
    ///
    /// # Errors
    /// [`LoadError::NoSuchLayer`] and [`LoadError::NoSuchExpert`]; nothing is counted then.
    pub fn record(&mut self, layer: usize, physical_ids: &[i32]) -> Result<(), LoadError> {
        let LoadShape { layers, physical, .. } = self.shape;
        if layer >= layers {
            return Err(LoadError::NoSuchLayer { layer, layers });
        }
        let unknown = |id: i32| id != NO_EXPERT && usize::try_from(id).map_or(true, |id| id >= physical);
        if let Some(position) = physical_ids.iter().position(|&id| unknown(id)) {
            return Err(LoadError::NoSuchExpert { position, id: physical_ids[position], physical });
        }
        if self.recording {
            let row = self.row(self.current, layer);
            let counts = &mut self.counts[row];
            physical_ids.iter().filter(|&&id| id != NO_EXPERT).for_each(|&id| counts[id as usize] += 1);
        }
        Ok(())
    }

    /// Ends a step: the next call counts in a new one, and the oldest leaves a full window.
    pub fn end_step(&mut self) {
        if !self.recording {
            return;
        }
        self.current = (self.current + 1) % self.shape.window;
        self.steps = (self.steps + 1).min(self.shape.window);
        let per_step = self.shape.layers * self.shape.physical;
        self.counts[self.current * per_step..][..per_step].fill(0);
    }

    /// `[physical]` counts of `layer`, summed over the window; empty for a layer that does not exist.
    pub fn load(&self, layer: usize) -> Vec<u64> {
        let mut sums = vec![0; if layer < self.shape.layers { self.shape.physical } else { 0 }];
        for step in self.steps(layer) {
            sums.iter_mut().zip(step).for_each(|(sum, count)| *sum += count);
        }
        sums
    }

    /// `[physical]` counts of `layer` in every step of the window, the oldest first and the current one last; none
    /// for a layer that does not exist.
    pub fn steps(&self, layer: usize) -> impl Iterator<Item = &[u64]> + '_ {
        let steps = if layer < self.shape.layers { self.steps } else { 0 };
        let window = self.shape.window;
        let step = move |age: usize| &self.counts[self.row((self.current + window - age) % window, layer)];
        (0..steps).rev().map(step)
    }

    /// Forgets what `layer` has counted. After a rebalance: its slots hold other experts now.
    pub fn clear(&mut self, layer: usize) {
        if layer < self.shape.layers {
            for step in 0..self.shape.window {
                let row = self.row(step, layer);
                self.counts[row].fill(0);
            }
        }
    }

    fn row(&self, step: usize, layer: usize) -> std::ops::Range<usize> {
        let start = (step * self.shape.layers + layer) * self.shape.physical;
        start..start + self.shape.physical
    }
}

/// `load`, counted by each rank for its own tokens, summed over all ranks. Collective; every rank gets the same, and
/// so proposes the same placement.
///
/// # Errors
/// [`LoadError::Slots`] if the ranks count different slots, [`LoadError::Group`] if a rank does not take part.
pub fn sum_over_ranks(group: &dyn ProcessGroup, load: &[u64]) -> Result<Vec<u64>, LoadError> {
    let bytes: Vec<u8> = load.iter().flat_map(|count| count.to_le_bytes()).collect();
    let mut sums = vec![0u64; load.len()];
    for (rank, theirs) in group.all_gather(&bytes)?.iter().enumerate() {
        let (counts, _) = theirs.as_chunks::<8>();
        if counts.len() != sums.len() {
            return Err(LoadError::Slots { rank, theirs: counts.len(), mine: sums.len() });
        }
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += u64::from_le_bytes(*count));
    }
    Ok(sums)
}
