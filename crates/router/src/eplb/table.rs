//! Which physical experts are replicas of which logical one, and which of them a token goes to.

use fused_moe_core::NO_EXPERT;

/// A table that does not describe replicas.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// Nothing to choose from.
    #[error("a table of no logical experts")]
    Empty,
    /// More slots than an i32 id can name.
    #[error("{slots} slots are more than {}", i32::MAX)]
    TooManySlots {
        /// Physical experts.
        slots: usize,
    },
    /// A slot holds an expert that the router does not know.
    #[error("slot {slot} holds expert {expert}, wanted one of 0..{num_logical}")]
    NoSuchExpert {
        /// The physical expert.
        slot: usize,
        /// The logical expert it is said to hold.
        expert: u32,
        /// Logical experts.
        num_logical: usize,
    },
    /// A logical expert that no slot holds.
    #[error("expert {expert} is in none of {slots} slots")]
    NoReplica {
        /// The logical expert.
        expert: usize,
        /// Physical experts.
        slots: usize,
    },
    /// A logical expert with more replicas than a row of the caller's table has columns.
    #[error("expert {expert} has {replicas} replicas, a row has {columns} columns")]
    TooManyReplicas {
        /// The logical expert.
        expert: usize,
        /// Its replicas.
        replicas: usize,
        /// Columns of a row.
        columns: usize,
    },
}

/// Top-k rows that cannot be mapped. Nothing has been written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// A last row that is not whole.
    #[error("{len} ids are not rows of {top_k}")]
    Rows {
        /// Ids given.
        len: usize,
        /// Slots of a row.
        top_k: usize,
    },
    /// The output has another size than the input.
    #[error("the output has room for {output} ids, the input has {input}")]
    Output {
        /// Ids that fit.
        output: usize,
        /// Ids given.
        input: usize,
    },
    /// An id that is neither −1 nor of a logical expert.
    #[error("expert id {id} of token {token} in slot {slot} is neither -1 nor in 0..{num_logical}")]
    NoSuchExpert {
        /// Row.
        token: usize,
        /// Slot of the row.
        slot: usize,
        /// The id.
        id: i32,
        /// Logical experts.
        num_logical: usize,
    },
}

/// The multiplier of the replica choice: ⌊2³²/φ⌋, so that neighbouring tokens fall on different replicas.
const SPREAD: u32 = 2_654_435_769;

/// The replicas of every logical expert of one layer.
///
/// A *logical* expert is what the router chooses, a *physical* one is a slot on a rank
/// ([`fused_moe_core::MoeConfig::placement`] says which rank). Slots never move; what a rebalance changes is the
/// logical expert in them.
///
/// ```
/// use router::eplb::ReplicaTable;
///
/// // Three experts in four slots: expert 1 has two replicas.
/// let table = ReplicaTable::new(3, vec![0, 1, 2, 1])?;
/// assert_eq!(table.replicas_of(1), [1, 3]);
/// let mut ids = [1, 0, 1, -1, 1, 2];
/// table.map_in_place(2, &mut ids)?;
/// assert_eq!(ids, [1, 0, 3, -1, 1, 2]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaTable {
    /// `[physical]`.
    logical: Vec<u32>,
    /// `[physical]` ids of slots by logical expert, ascending within one.
    replicas: Vec<i32>,
    /// `[logical + 1]`: where in `replicas` an expert's begin.
    starts: Vec<u32>,
}

impl ReplicaTable {
    /// The table in which slot `p` holds expert `physical_to_logical[p]`.
    ///
    /// # Errors
    /// [`TableError`]: a slot with an unknown expert, an expert without a slot.
    pub fn new(num_logical: usize, physical_to_logical: Vec<u32>) -> Result<Self, TableError> {
        let table = Self::with_lost(num_logical, physical_to_logical)?;
        match (0..num_logical).find(|&expert| table.replicas_of(expert).is_empty()) {
            Some(expert) => Err(TableError::NoReplica { expert, slots: table.num_physical() }),
            None => Ok(table),
        }
    }

    /// [`ReplicaTable::new`] in which experts may have no slot. What maps by such a table must see to them.
    pub(crate) fn with_lost(num_logical: usize, physical_to_logical: Vec<u32>) -> Result<Self, TableError> {
        let logical = physical_to_logical;
        if num_logical == 0 {
            return Err(TableError::Empty);
        }
        if i32::try_from(logical.len().max(num_logical)).is_err() {
            return Err(TableError::TooManySlots { slots: logical.len().max(num_logical) });
        }
        let mut starts = vec![0u32; num_logical + 1];
        for (slot, &expert) in logical.iter().enumerate() {
            match starts.get_mut(expert as usize + 1) {
                Some(count) => *count += 1,
                None => return Err(TableError::NoSuchExpert { slot, expert, num_logical }),
            }
        }
        for expert in 0..num_logical {
            starts[expert + 1] += starts[expert];
        }
        let mut next = starts.clone();
        let mut replicas = vec![NO_EXPERT; logical.len()];
        for (slot, &expert) in logical.iter().enumerate() {
            let at = &mut next[expert as usize];
            replicas[*at as usize] = slot as i32;
            *at += 1;
        }
        Ok(Self { logical, replicas, starts })
    }

    /// Slot `p` holds expert `p`; redundant slots behind hold experts 0, 1, … again.
    ///
    /// # Errors
    /// [`TableError`] for no experts and for more than an i32 can name.
    pub fn identity(num_logical: usize, redundant: usize) -> Result<Self, TableError> {
        if num_logical == 0 {
            return Err(TableError::Empty);
        }
        let slots = num_logical.saturating_add(redundant);
        if i32::try_from(slots).is_err() {
            return Err(TableError::TooManySlots { slots });
        }
        Self::new(num_logical, (0..slots).map(|slot| (slot % num_logical) as u32).collect())
    }

    /// Experts that the router chooses from.
    pub fn num_logical(&self) -> usize {
        self.starts.len() - 1
    }

    /// Slots over all ranks.
    pub fn num_physical(&self) -> usize {
        self.logical.len()
    }

    /// `[physical]`: the logical expert in every slot.
    pub fn physical_to_logical(&self) -> &[u32] {
        &self.logical
    }

    /// The slots that hold `logical`, ascending; none for an expert that does not exist.
    pub fn replicas_of(&self, logical: usize) -> &[i32] {
        match (self.starts.get(logical), self.starts.get(logical.saturating_add(1))) {
            (Some(&start), Some(&end)) => &self.replicas[start as usize..end as usize],
            _ => &[],
        }
    }

    /// Replicas of the expert that has most.
    pub fn max_replicas(&self) -> usize {
        (0..self.num_logical()).map(|expert| self.replicas_of(expert).len()).max().unwrap_or(0)
    }

    /// The table as device kernels read it, `[logical, columns]` slots, −1 behind an expert's last.
    ///
    /// # Errors
    /// [`TableError::TooManyReplicas`] if a row is too short.
    pub fn to_rows(&self, columns: usize) -> Result<Vec<i32>, TableError> {
        let mut rows = vec![NO_EXPERT; self.num_logical() * columns];
        for expert in 0..self.num_logical() {
            let replicas = self.replicas_of(expert);
            if replicas.len() > columns {
                return Err(TableError::TooManyReplicas { expert, replicas: replicas.len(), columns });
            }
            rows[expert * columns..][..replicas.len()].copy_from_slice(replicas);
        }
        Ok(rows)
    }

    /// The slots whose logical expert is another one in `next`, ascending: only their weights have to be loaded.
    /// Slots that one of the two does not have count as changed.
    pub fn changed_slots<'t>(&'t self, next: &'t ReplicaTable) -> impl Iterator<Item = usize> + 't {
        let slots = self.num_physical().max(next.num_physical());
        (0..slots).filter(|&slot| self.logical.get(slot) != next.logical.get(slot))
    }

    /// The slot that row `token` of a call goes to for `logical`: replica
    /// `(token · 2654435769 mod 2³²) mod replicas`, as in vLLM. `None` for an expert that does not exist.
    ///
    /// It depends on nothing but its arguments, so a call that is repeated gives the same bits.
    pub fn physical(&self, token: usize, logical: i32) -> Option<i32> {
        let replicas = self.replicas_of(usize::try_from(logical).ok()?);
        let spread = (token as u32).wrapping_mul(SPREAD) as usize;
        replicas.get(spread.checked_rem(replicas.len())?).copied()
    }

    /// Writes to `physical` the slots for `logical`, rows of `top_k` ids each, the first row being token 0; −1
    /// stays −1. Distinct experts of a row become distinct slots. Allocates nothing.
    ///
    /// # Errors
    /// [`MapError`]; `physical` is untouched then.
    pub fn map(&self, top_k: usize, logical: &[i32], physical: &mut [i32]) -> Result<(), MapError> {
        if physical.len() != logical.len() {
            return Err(MapError::Output { output: physical.len(), input: logical.len() });
        }
        self.check(top_k, logical)?;
        physical.copy_from_slice(logical);
        self.replace(top_k, physical);
        Ok(())
    }

    /// [`ReplicaTable::map`] where the logical ids are not needed any more.
    ///
    /// # Errors
    /// [`MapError`]; `ids` are untouched then.
    pub fn map_in_place(&self, top_k: usize, ids: &mut [i32]) -> Result<(), MapError> {
        self.check(top_k, ids)?;
        self.replace(top_k, ids);
        Ok(())
    }

    /// Sums what slots have counted by the expert in them, `[physical]` to `[logical]`. A slot without an entry has
    /// counted nothing.
    pub fn logical_load(&self, load: &[u64]) -> Vec<u64> {
        let mut sums = vec![0; self.num_logical()];
        self.logical.iter().zip(load).for_each(|(&expert, load)| sums[expert as usize] += load);
        sums
    }

    pub(crate) fn check(&self, top_k: usize, ids: &[i32]) -> Result<(), MapError> {
        if top_k == 0 || !ids.len().is_multiple_of(top_k) {
            return Err(MapError::Rows { len: ids.len(), top_k });
        }
        let num_logical = self.num_logical();
        let unknown = |id: i32| id != NO_EXPERT && usize::try_from(id).map_or(true, |id| id >= num_logical);
        match ids.iter().position(|&id| unknown(id)) {
            None => Ok(()),
            Some(at) => {
                let (token, slot) = (at / top_k, at % top_k);
                Err(MapError::NoSuchExpert { token, slot, id: ids[at], num_logical })
            }
        }
    }

    /// Puts the slots in the place of experts that have been checked.
    pub(crate) fn replace(&self, top_k: usize, ids: &mut [i32]) {
        for (token, row) in ids.chunks_exact_mut(top_k).enumerate() {
            for id in row {
                *id = self.physical(token, *id).unwrap_or(NO_EXPERT);
            }
        }
    }
}
