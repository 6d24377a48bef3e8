//! What a router does beside its method: experts looked up by token, slots of shared experts.

use std::sync::Arc;

use crate::config::RoutingError;

/// The experts of every token of the vocabulary, fixed by the model instead of chosen (the hash layers of
/// DeepSeek-V4). The method only weighs them. Clones share the table.
#[derive(Clone, Debug, PartialEq)]
pub struct HashTable {
    ids: Arc<[i32]>,
    top_k: usize,
}

impl HashTable {
    /// A table `ids`, `[vocabulary, top_k]` row by row.
    ///
    /// # Errors
    /// [`RoutingError::HashTableLength`] if the rows are empty or not all of `top_k` ids.
    /// [`HostRouter::with_hash_table`](crate::HostRouter::with_hash_table) checks the ids.
    pub fn new(ids: impl Into<Arc<[i32]>>, top_k: usize) -> Result<Self, RoutingError> {
        let ids = ids.into();
        if top_k == 0 || ids.is_empty() || !ids.len().is_multiple_of(top_k) {
            return Err(RoutingError::HashTableLength { len: ids.len(), top_k });
        }
        Ok(Self { ids, top_k })
    }

    /// Tokens that the table knows.
    pub fn vocabulary(&self) -> usize {
        self.ids.len() / self.top_k
    }

    /// The experts of a token, `None` outside the vocabulary.
    pub fn row(&self, token_id: i32) -> Option<&[i32]> {
        let first = usize::try_from(token_id).ok()?.checked_mul(self.top_k)?;
        self.ids.get(first..first.checked_add(self.top_k)?)
    }

    /// Checks every row against the router that it is for.
    pub(crate) fn check(&self, top_k: usize, num_experts: usize) -> Result<(), RoutingError> {
        if self.top_k != top_k {
            return Err(RoutingError::HashTableTopK { table: self.top_k, top_k });
        }
        for (row, ids) in self.ids.chunks_exact(top_k).enumerate() {
            for (slot, &id) in ids.iter().enumerate() {
                if usize::try_from(id).map_or(true, |id| id >= num_experts) || ids[..slot].contains(&id) {
                    return Err(RoutingError::HashTableRow { row, id, num_experts });
                }
            }
        }
        Ok(())
    }
}

/// Shared experts that every token takes, appended to its row as slots with ids after the routed experts'.
///
/// The weight is constant: neither renormalisation nor `routed_scaling_factor` touches it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedSlots {
    /// Shared experts, one slot each.
    pub count: usize,
    /// Weight of every one of them.
    pub weight: f32,
}
