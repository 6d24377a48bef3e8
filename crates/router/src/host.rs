//! All routing methods on the host.

use fused_moe_core::{
    Error, ErrorKind, ExecCx, ExpertGroups, Fault, NO_EXPERT, Result, Router, RouterInput, RouterOutput,
    RoutingConfig, Stage, TensorView, TopKMut,
};
use smallvec::{SmallVec, smallvec};

use crate::best::Best;
use crate::config::{RoutingError, check};
use crate::recipe::Recipe;
use crate::score::{best_two_score, max_score, score_all, weigh};
use crate::slots::{HashTable, SharedSlots};

/// Experts, and groups of experts, up to which a call keeps its temporaries on the stack.
const INLINE: usize = 1024;

/// Stage 1 on the host for every [`RoutingMethod`](fused_moe_core::RoutingMethod).
///
/// Arithmetic is f32, of operations that have the same bits everywhere. Methods that choose without a bias choose by the logits themselves, which order as the
/// probabilities do but neither underflow nor saturate; only DeepSeek-V3, which adds up scores of a group,
/// always chooses by scores. Ties go to the lower id. A row whose logits are all −inf gets the lowest
/// admissible ids with weight 0. One call works on one thread and allocates nothing for up to 1024 experts.
#[derive(Clone, Debug)]
pub struct HostRouter {
    config: RoutingConfig,
    recipe: Recipe,
    hash_table: Option<HashTable>,
    shared: SharedSlots,
    zero_experts: usize,
}

impl HostRouter {
    /// A router for `config`.
    ///
    /// `groups` may be `None` for [`RoutingMethod::DeepSeekV3`](fused_moe_core::RoutingMethod::DeepSeekV3)
    /// (one group) and must be for the methods without groups; a missing `correction_bias` is zero.
    /// `renormalize` acts on the methods whose formula names it.
    ///
    /// # Errors
    /// [`RoutingError`] for sizes that contradict each other and for values that are not finite.
    pub fn new(config: RoutingConfig) -> Result<Self, RoutingError> {
        let recipe = check(&config)?;
        let shared = SharedSlots { count: 0, weight: 0.0 };
        Ok(Self { config, recipe, hash_table: None, shared, zero_experts: 0 })
    }

    /// Takes the experts of a token from `table` and leaves only their weights to the method.
    ///
    /// Such a router needs token ids, so it answers [`Router::route_all`] only.
    ///
    /// # Errors
    /// [`RoutingError::HashTableChooses`] beside groups or a bias, which would have nothing to choose;
    /// [`RoutingError::HashTableTopK`] and [`RoutingError::HashTableRow`] for a table that does not fit.
    pub fn with_hash_table(self, table: HashTable) -> Result<Self, RoutingError> {
        if self.config.groups.is_some() || self.config.correction_bias.is_some() {
            return Err(RoutingError::HashTableChooses { method: self.config.method });
        }
        table.check(self.config.top_k, self.config.num_experts)?;
        Ok(Self { hash_table: Some(table), ..self })
    }

    /// Appends `shared` to every row, after the routed experts: ids `[G, G + count)` for `G` routed experts
    /// (zero-experts not counted).
    ///
    /// The experts behind such a router are `G + count` and its rows [`Router::slots`] wide, so that the
    /// layer's [`MoeConfig`](fused_moe_core::MoeConfig) has those numbers and `routing: None`.
    ///
    /// # Errors
    /// [`RoutingError::NonFiniteSharedWeight`], and [`RoutingError::NumExperts`] if the ids leave the i32s.
    pub fn with_shared_slots(self, shared: SharedSlots) -> Result<Self, RoutingError> {
        if !shared.weight.is_finite() {
            return Err(RoutingError::NonFiniteSharedWeight { weight: shared.weight });
        }
        let num_experts = self.config.num_experts.saturating_add(shared.count);
        if i32::try_from(num_experts).is_err() {
            return Err(RoutingError::NumExperts { num_experts });
        }
        Ok(Self { shared, ..self })
    }

    /// Takes the last `count` of the config's experts as zero-experts (LongCat-Flash): they have no weights
    /// and return the token as it is.
    ///
    /// A slot that one of them wins becomes [`NO_EXPERT`] with weight 0; the sum of the weights it takes from
    /// a token, after renormalisation and scaling, is the token's identity weight. The layer adds the token
    /// times that weight to its output. Such a router answers [`Router::route_all`] only, where the identity
    /// weights have a place.
    ///
    /// # Errors
    /// [`RoutingError::ZeroExperts`] if no expert is left.
    pub fn with_zero_experts(self, count: usize) -> Result<Self, RoutingError> {
        if count >= self.config.num_experts {
            return Err(RoutingError::ZeroExperts { count, num_experts: self.config.num_experts });
        }
        Ok(Self { zero_experts: count, ..self })
    }

    /// Experts of the config that have weights; the appended ones are not among them.
    fn real_experts(&self) -> usize {
        self.config.num_experts - self.zero_experts
    }

    /// Writes the experts of highest score among the admissible ones.
    fn choose(&self, logits: &[f32], best: Best<'_>) {
        let groups = self.config.groups.unwrap_or(ExpertGroups { n_group: 1, topk_group: 1 });
        let bias = self.config.correction_bias.as_deref();
        if !self.recipe.chooses_by_score(bias.is_some()) {
            return best_in_groups(logits, groups, max_score, best);
        }
        let mut choice: SmallVec<[f32; INLINE]> = smallvec![0.0; logits.len()];
        score_all(self.recipe.score, logits, &mut choice);
        choice.iter_mut().zip(bias.unwrap_or_default()).for_each(|(c, b)| *c += b);
        best_in_groups(&choice, groups, best_two_score, best);
    }

    /// Writes one row of logits, none of which is NaN or +inf, and returns its identity weight.
    fn route_row(&self, row: Row<'_>, ids: &mut [i32], weights: &mut [f32]) -> f32 {
        let (ids, shared_ids) = ids.split_at_mut(self.config.top_k);
        let (weights, shared_weights) = weights.split_at_mut(self.config.top_k);
        match row.experts {
            Some(experts) => ids.copy_from_slice(experts),
            None => self.choose(row.logits, Best::new(ids, weights)),
        }
        let how = (self.recipe.score, self.recipe.division);
        weigh(how, self.config.renormalize, row.logits, (ids, weights));
        let factor = self.config.routed_scaling_factor;
        if factor != 1.0 {
            weights.iter_mut().for_each(|w| *w *= factor);
        }

        let real = self.real_experts();
        let mut identity = 0.0;
        if self.zero_experts > 0 {
            for (id, weight) in ids.iter_mut().zip(weights).filter(|(id, _)| **id as usize >= real) {
                identity += *weight;
                (*id, *weight) = (NO_EXPERT, 0.0);
            }
        }
        for (slot, id) in shared_ids.iter_mut().enumerate() {
            *id = (real + slot) as i32;
        }
        shared_weights.fill(self.shared.weight);
        identity
    }

    fn contract(&self, why: String) -> Error {
        Error::contract(Stage::Router, self.name(), why)
    }

    /// Whether the tensors have the shapes that this router works on; their number of tokens.
    fn tokens(&self, input: &RouterInput<'_>, out: &RouterOutput<'_>) -> Result<usize> {
        let &[tokens, experts] = input.logits.dims() else {
            let dims = input.logits.dims();
            return Err(self.contract(format!("logits {dims:?} are not [tokens, num_experts]")));
        };
        if experts != self.config.num_experts {
            let wanted = self.config.num_experts;
            return Err(self.contract(format!("logits are of {experts} experts, the router of {wanted}")));
        }
        for (what, dims) in [("ids", out.topk.ids.dims()), ("weights", out.topk.weights.dims())] {
            let wanted = [tokens, self.slots()];
            if dims != wanted {
                return Err(self.contract(format!("top-k {what} are {dims:?}, wanted {wanted:?}")));
            }
        }
        match (self.zero_experts, &out.identity) {
            (0, None) => {}
            (0, Some(_)) => {
                let why = "identity weights are asked of a router without zero-experts";
                return Err(self.contract(why.into()));
            }
            (count, None) => {
                let why = format!("the router has {count} zero-experts and no place for identity weights");
                return Err(self.contract(why));
            }
            (_, Some(identity)) if identity.dims() != [tokens] => {
                let dims = identity.dims();
                return Err(self.contract(format!("identity weights are {dims:?}, wanted [{tokens}]")));
            }
            _ => {}
        }
        Ok(tokens)
    }

    /// The token ids, all of them in the vocabulary, if this router has a table; empty if not.
    fn token_ids<'a>(&self, input: &RouterInput<'a>, tokens: usize) -> Result<&'a [i32]> {
        let Some(table) = &self.hash_table else { return Ok(&[]) };
        let Some(ids) = input.token_ids else {
            return Err(self.contract("the router looks experts up by token id and has got none".into()));
        };
        if ids.dims() != [tokens] {
            return Err(self.contract(format!("token ids are {:?}, wanted [{tokens}]", ids.dims())));
        }
        let ids = ids.as_slice::<i32>().map_err(|e| Error::contract(Stage::Router, self.name(), e))?;
        if let Some(token) = ids.iter().position(|&id| table.row(id).is_none()) {
            let (id, vocabulary) = (ids[token], table.vocabulary());
            return Err(self.contract(format!("id {id} of token {token} is not in 0..{vocabulary}")));
        }
        Ok(ids)
    }
}

impl Router for HostRouter {
    fn name(&self) -> &'static str {
        "host"
    }

    fn config(&self) -> &RoutingConfig {
        &self.config
    }

    fn slots(&self) -> usize {
        self.config.top_k + self.shared.count
    }

    /// [`Router::route_all`] without token ids and identity weights.
    fn route(&self, cx: &mut ExecCx<'_>, logits: TensorView<'_>, out: TopKMut<'_>) -> Result<()> {
        let input = RouterInput { logits, token_ids: None };
        self.route_all(cx, input, RouterOutput { topk: out, identity: None })
    }

    /// As the trait says; all tensors are on the host, rows contiguous. +inf is refused like NaN, since it
    /// has no softmax. All input is checked before anything is written, so `out` is untouched after an error.
    fn route_all(
        &self,
        _cx: &mut ExecCx<'_>,
        input: RouterInput<'_>,
        mut out: RouterOutput<'_>,
    ) -> Result<()> {
        let view = |e| Error::contract(Stage::Router, self.name(), e);
        let tokens = self.tokens(&input, &out)?;
        let token_ids = self.token_ids(&input, tokens)?;
        for token in 0..tokens {
            let row = input.logits.row::<f32>(token).map_err(view)?;
            if let Some(expert) = row.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
                let fault = Fault::NonFiniteLogit { token: token as u32, expert: expert as u32 };
                let why = format!("logit of token {token} for expert {expert} is {}", row[expert]);
                return Err(Error::new(ErrorKind::BadInput(fault), Stage::Router, self.name()).caused_by(why));
            }
            if token == 0 {
                // The output views are asked once before the first row is written.
                out.topk.ids.row_mut::<i32>(0).map_err(view)?;
                out.topk.weights.row_mut::<f32>(0).map_err(view)?;
            }
        }
        let mut identity = match &mut out.identity {
            Some(identity) => Some(identity.as_mut_slice::<f32>().map_err(view)?),
            None => None,
        };
        for token in 0..tokens {
            let experts = match (&self.hash_table, token_ids.get(token)) {
                (Some(table), Some(&id)) => table.row(id),
                _ => None,
            };
            let row = Row { logits: input.logits.row::<f32>(token).map_err(view)?, experts };
            let ids = out.topk.ids.row_mut::<i32>(token).map_err(view)?;
            let weights = out.topk.weights.row_mut::<f32>(token).map_err(view)?;
            let kept = self.route_row(row, ids, weights);
            if let Some(identity) = &mut identity {
                identity[token] = kept;
            }
        }
        Ok(())
    }
}

/// What is known of one token.
struct Row<'a> {
    /// Of all experts.
    logits: &'a [f32],
    /// Its experts, where they are not chosen.
    experts: Option<&'a [i32]>,
}

/// Offers `best` the experts of the `topk_group` best groups. The experts of the others are out, whatever
/// their scores: masking with 0 instead would let them win over negative biased scores.
fn best_in_groups(
    scores: &[f32],
    groups: ExpertGroups,
    group_score: impl Fn(&[f32]) -> f32,
    mut best: Best<'_>,
) {
    if groups.topk_group == groups.n_group {
        scores.iter().enumerate().for_each(|(id, &score)| best.offer(id, score));
        return;
    }
    let size = scores.len() / groups.n_group;
    let mut kept: SmallVec<[i32; INLINE]> = smallvec![0; groups.topk_group];
    let mut kept_scores: SmallVec<[f32; INLINE]> = smallvec![0.0; groups.topk_group];
    let mut best_groups = Best::new(&mut kept, &mut kept_scores);
    for (group, members) in scores.chunks_exact(size).enumerate() {
        best_groups.offer(group, group_score(members));
    }
    kept.sort_unstable();
    for &group in &kept {
        let first = group as usize * size;
        for (offset, &score) in scores[first..first + size].iter().enumerate() {
            best.offer(first + offset, score);
        }
    }
}
