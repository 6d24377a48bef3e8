//! A layer with toy experts: expert `e` multiplies by `e + 1`. One case, its inputs, its rounds and its
//! answer.

use ep_transport::{Endpoint, ThreadOptions, run_ranks};
use fused_moe_core::*;
use half::bf16;
use naive_comm::{AllGatherReduceScatter, Local, Naive};
use quant::{Activations, Isa, Quantizer, decode_table};
use rand::{Rng, RngCore, SeedableRng};
use rand_pcg::Pcg64;

pub const EXPERTS: usize = 11;

/// What a test varies.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub comm: &'static str,
    pub ranks: usize,
    pub kind: KernelKind,
    pub quant: QuantScheme,
    pub top_k: usize,
    pub max_tokens: usize,
    pub hidden: usize,
    pub weight_on_input: bool,
    /// Whether the experts write into the backend's buffer, or into one of the test's.
    pub in_place: bool,
    pub seed: u64,
}

impl Case {
    pub fn new(comm: &'static str, ranks: usize) -> Self {
        let seed = rand::rng().next_u64();
        Self {
            comm,
            ranks,
            kind: KernelKind::Modular,
            quant: QuantScheme::Unquantized,
            top_k: 3,
            max_tokens: 9,
            hidden: 200,
            weight_on_input: false,
            in_place: true,
            seed,
        }
    }

    pub fn provider(&self) -> &'static dyn PrepareFinalizeProvider {
        let all: [&dyn PrepareFinalizeProvider; 3] = [&Local, &AllGatherReduceScatter, &Naive];
        all.into_iter().find(|provider| provider.name() == self.comm).expect("a known backend")
    }

    pub fn config(&self) -> MoeConfig {
        // Owners without a pattern, so that neither blocks nor strides of ids can stand in for the table.
        let mut rng = Pcg64::seed_from_u64(self.seed);
        let owners: Vec<usize> = (0..EXPERTS).map(|_| rng.random_range(0..self.ranks)).collect();
        MoeConfig {
            hidden: self.hidden,
            intermediate: 8,
            top_k: self.top_k,
            max_tokens_per_rank: self.max_tokens,
            in_dtype: DType::Bf16,
            quant: self.quant,
            activation: Activation::Silu,
            apply_router_weight_on_input: self.weight_on_input,
            expert_bias: false,
            padding: Default::default(),
            redundant_experts: 0,
            max_received_rows: None,
            combine_wire: Default::default(),
            routing: None,
            placement: ExpertPlacement::from_owners(&owners, self.ranks).expect("ranks exist"),
            ranks_per_node: self.ranks,
            device: DeviceKind::Host,
        }
    }

    pub fn plan(&self, config: &MoeConfig) -> Plan {
        let Support::Supported(mut caps) = self.provider().supports(config, self.kind) else {
            panic!("{self:?} is refused");
        };
        caps.in_place_output = self.in_place;
        let mut experts = ExpertsCaps::host("toy", vec![self.quant.quantized_wire(DType::Bf16)]);
        experts.kind = self.kind;
        negotiate(config, &caps, &experts).expect("a pair that fits")
    }

    /// Runs `body` on every rank, each with a handle, and returns what they return.
    pub fn run<T: Send>(&self, options: ThreadOptions, body: impl Fn(Rig) -> T + Sync) -> Vec<T> {
        println!("{self:?}");
        run_ranks(self.ranks, options, |group| body(Rig::new(*self, group))).expect("threads")
    }
}

/// One rank of a case.
pub struct Rig {
    pub case: Case,
    pub config: MoeConfig,
    pub plan: Plan,
    pub rank: Rank,
    pub group: Endpoint,
    pub comm: PrepareFinalize,
}

/// The tokens that one rank brings to one round.
pub struct Tokens {
    pub count: usize,
    pub hidden: Vec<bf16>,
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
    pub logits: Vec<f32>,
}

/// One row's experts and their weights, in the order in which they are added up.
type Contributions = Vec<(usize, f32)>;

impl Tokens {
    /// The same on every rank that asks.
    pub fn of(case: &Case, rank: usize, round: u64) -> Self {
        let stream = u128::from(round) << 64 | rank as u128;
        let mut rng = Pcg64::new(u128::from(case.seed), stream);
        // The first round is full everywhere, so that all that a later, smaller one leaves alone is stale.
        let count = match rng.random_range(0..4) {
            _ if round == 1 => case.max_tokens,
            0 => 0,
            _ => rng.random_range(1..=case.max_tokens),
        };
        let mut ids = Vec::new();
        for _ in 0..count {
            let mut chosen: Vec<i32> = Vec::new();
            while chosen.len() < case.top_k {
                let id = rng.random_range(-2..EXPERTS as i32).max(NO_EXPERT);
                if id == NO_EXPERT || !chosen.contains(&id) {
                    chosen.push(id);
                }
            }
            ids.extend(chosen);
        }
        let mut random = |n: usize| (0..n).map(|_| rng.random_range(-2.0f32..2.0)).collect::<Vec<_>>();
        let hidden = random(count * case.hidden).into_iter().map(bf16::from_f32).collect();
        let (weights, logits) = (random(count * case.top_k), random(count * EXPERTS));
        Self { count, hidden, ids, weights, logits }
    }

    pub fn input(&self, case: &Case) -> PrepareInput<'_> {
        let dims = [self.count, case.top_k];
        let ids = TensorView::from_slice(&self.ids, DType::I32, &dims).unwrap();
        let weights = TensorView::from_slice(&self.weights, DType::F32, &dims).unwrap();
        PrepareInput {
            hidden: self.hidden(case),
            topk: TopK { ids, weights },
            input_scale: None,
            fault: None,
        }
    }

    pub fn monolithic_input(&self, case: &Case) -> MonolithicInput<'_> {
        let logits = TensorView::from_slice(&self.logits, DType::F32, &[self.count, EXPERTS]).unwrap();
        MonolithicInput { hidden: self.hidden(case), logits, input_scale: None, fault: None }
    }

    pub fn hidden(&self, case: &Case) -> TensorView<'_> {
        TensorView::from_slice(&self.hidden, DType::Bf16, &[self.count, case.hidden]).unwrap()
    }

    /// Payload and scales that must arrive, as `quant` writes them.
    pub fn on_the_wire(&self, case: &Case) -> (Vec<u8>, Vec<f32>) {
        let wire = case.quant.quantized_wire(DType::Bf16);
        let mut payload = vec![0; self.count * wire.payload_bytes(case.hidden)];
        let mut scales = vec![0.0; self.count * wire.scales_per_token(case.hidden)];
        let mut rows = Activations::of(self.hidden(case));
        if case.weight_on_input {
            rows = rows.weighted(&self.weights);
        }
        let quantizer = Quantizer::for_scheme_with(Isa::SCALAR, case.quant);
        quantizer.quantize_rows(rows, &mut payload, &mut scales).unwrap();
        (payload, scales)
    }

    fn contributions(&self, case: &Case, row: usize) -> Contributions {
        match case.kind {
            KernelKind::Modular => {
                let weights = self.weights[row * case.top_k..][..case.top_k].iter();
                let weights = weights.map(|&w| if case.weight_on_input { 1.0 } else { w });
                top_k(&self.ids[row * case.top_k..][..case.top_k], weights)
            }
            KernelKind::Monolithic => dense(&self.logits[row * EXPERTS..][..EXPERTS]),
        }
    }

    /// What must come back: per rank f32 products rounded to bf16, summed over the ranks in rank order in
    /// f32.
    pub fn answer(&self, case: &Case, config: &MoeConfig) -> Vec<f32> {
        let (payload, scales) = self.on_the_wire(case);
        let scales_per_token = scales.len() / self.count.max(1);
        let payload_bytes = payload.len() / self.count.max(1);
        let mut answer = Vec::new();
        for row in 0..self.count {
            let x = dequantized(
                case,
                &payload[row * payload_bytes..][..payload_bytes],
                &scales[row * scales_per_token..][..scales_per_token],
            );
            let all = self.contributions(case, row);
            let mut sums = vec![0.0; case.hidden];
            for rank in 0..case.ranks {
                let partial = partial_sum(&x, &all, config, Rank(rank as u32));
                sums.iter_mut().zip(partial).for_each(|(sum, x)| *sum += x.to_f32());
            }
            answer.extend(sums);
        }
        answer
    }
}

fn top_k(ids: &[i32], weights: impl Iterator<Item = f32>) -> Contributions {
    ids.iter().zip(weights).filter(|(id, _)| **id >= 0).map(|(&id, w)| (id as usize, w)).collect()
}

fn dense(logits: &[f32]) -> Contributions {
    logits.iter().copied().enumerate().collect()
}

fn dequantized(case: &Case, payload: &[u8], scales: &[f32]) -> Vec<f32> {
    let Some(format) = case.quant.fp8() else {
        return payload.as_chunks::<2>().0.iter().map(|x| bf16::from_ne_bytes(*x).to_f32()).collect();
    };
    let (table, group) = (decode_table(format), if scales.len() == 1 { case.hidden } else { BLOCK });
    let scaled = payload.iter().enumerate();
    scaled.map(|(i, &code)| table[usize::from(code)] * scales[i / group]).collect()
}

fn partial_sum(x: &[f32], all: &Contributions, config: &MoeConfig, rank: Rank) -> Vec<bf16> {
    let held = |id: usize| config.placement.rank_of(GlobalExpertId(id as u32)) == Some(rank);
    let mine: Vec<_> = all.iter().filter(|(id, _)| held(*id)).collect();
    let sum = |x: &f32| mine.iter().fold(0.0, |sum, (id, w)| sum + w * (id + 1) as f32 * x);
    x.iter().map(|x| bf16::from_f32(sum(x))).collect()
}

/// What has arrived, of either kind.
pub struct Arrival<'p> {
    pub payload: TensorView<'p>,
    pub scale: Option<TensorView<'p>>,
    pub rows: usize,
    /// Ids and weights, or logits.
    pub routing: Vec<TensorView<'p>>,
    pub output: Option<TensorViewMut<'p>>,
}

impl<'p> Arrival<'p> {
    fn modular(dispatched: Dispatched<'p>) -> Self {
        let Dispatched { hidden: payload, scale, arrived, output } = dispatched;
        let Arrived::Standard { topk, rows } = arrived else { panic!("batched rows") };
        let routing = vec![topk.ids, topk.weights];
        Self { payload, scale, rows: rows.on_host().unwrap(), routing, output }
    }

    fn monolithic(dispatched: DispatchedMonolithic<'p>) -> Self {
        let DispatchedMonolithic { hidden: payload, scale, logits, rows, output } = dispatched;
        Self { payload, scale, rows: rows.on_host().unwrap(), routing: vec![logits], output }
    }

    /// Runs the toy experts of `rank`; rows behind the valid ones become NaN.
    fn run_experts(self, rig: &Rigged<'_>, lent: &mut [bf16]) -> bool {
        let max_rows = rig.plan.max_rows();
        let dims = [max_rows, rig.case.hidden];
        let in_place = self.output.is_some();
        assert_eq!(in_place, rig.case.in_place);
        let mut output = match self.output {
            Some(output) => output,
            None => TensorViewMut::from_slice(lent, DType::Bf16, &dims).unwrap(),
        };
        assert_eq!((output.dims(), self.payload.dims()), (&dims[..], &dims[..]));
        output.as_mut_slice::<bf16>().unwrap().fill(bf16::NAN);
        for row in 0..self.rows {
            let scales = self.scale.map_or(&[][..], |scale| scale.row::<f32>(row).unwrap());
            let x = dequantized(rig.case, self.payload.row_bytes(row).unwrap(), scales);
            let all = match self.routing[..] {
                [logits] => dense(logits.row(row).unwrap()),
                [ids, weights] => {
                    top_k(ids.row(row).unwrap(), weights.row::<f32>(row).unwrap().iter().copied())
                }
                _ => unreachable!(),
            };
            let partial = partial_sum(&x, &all, rig.config, rig.rank);
            output.row_mut(row).unwrap().copy_from_slice(&partial);
        }
        in_place
    }
}

/// What the experts of a rig need to know, apart from its handle.
struct Rigged<'r> {
    case: &'r Case,
    config: &'r MoeConfig,
    plan: &'r Plan,
    rank: Rank,
}

impl Rig {
    pub fn new(case: Case, group: Endpoint) -> Self {
        let config = case.config();
        let plan = case.plan(&config);
        let comm = case.provider().build(&config, &plan, &group).expect("a handle");
        Self { case, config, plan, rank: group.rank(), group, comm }
    }

    pub fn modular(&mut self) -> &mut dyn PrepareAndFinalizeModular {
        match &mut self.comm {
            PrepareFinalize::Modular(comm) => &mut **comm,
            PrepareFinalize::Monolithic(_) => panic!("a monolithic handle"),
        }
    }

    pub fn tokens(&self, round: u64) -> Tokens {
        Tokens::of(&self.case, self.rank.index(), round)
    }

    /// Runs a whole round on `tokens` into `out`; `look` sees what has arrived.
    pub fn round_into(
        &mut self,
        tokens: &Tokens,
        out: TensorViewMut<'_>,
        look: impl Fn(&Arrival<'_>),
    ) -> Result<()> {
        let mut lent = vec![bf16::NAN; self.plan.max_rows() * self.case.hidden];
        let rig = Rigged { case: &self.case, config: &self.config, plan: &self.plan, rank: self.rank };
        let mut workspace = Workspace::new(DeviceKind::Host, 0).unwrap();
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        macro_rules! round {
            ($comm:ident, $input:ident, $arrival:ident) => {{
                let sent = $comm.prepare_send(&mut cx, tokens.$input(rig.case))?;
                let (dispatched, routed) = $comm.prepare_recv(&mut cx, sent)?;
                let arrival = Arrival::$arrival(dispatched);
                look(&arrival);
                let in_place = arrival.run_experts(&rig, &mut lent);
                let dims = [rig.plan.max_rows(), rig.case.hidden];
                let lent = ExpertOut::Lent(TensorView::from_slice(&lent, DType::Bf16, &dims).unwrap());
                let expert_out = if in_place { ExpertOut::InPlace } else { lent };
                let sent = $comm.finalize_send(&mut cx, routed, expert_out)?;
                $comm.finalize_recv(&mut cx, sent, out)
            }};
        }
        match &mut self.comm {
            PrepareFinalize::Modular(comm) => round!(comm, input, modular),
            PrepareFinalize::Monolithic(comm) => round!(comm, monolithic_input, monolithic),
        }
    }

    /// Runs a whole round on the tokens of `round` and checks the answer, bit for bit.
    pub fn good_round(&mut self, round: u64) {
        let tokens = self.tokens(round);
        let mut sums = vec![f32::NAN; tokens.count * self.case.hidden];
        let out = TensorViewMut::from_slice(&mut sums, DType::F32, &[tokens.count, self.case.hidden]);
        self.round_into(&tokens, out.unwrap(), |_| {}).expect("a good round");
        let want = tokens.answer(&self.case, &self.config);
        assert_eq!(sums, want, "{} in round {round}", self.rank);
    }
}
