//! Batches with garbage behind their rows, and what is refused.

use std::error::Error as _;
use std::num::NonZeroUsize;

use batched_experts::BatchedExperts;
use fused_moe_core::*;
use grouped_gemm::{Executor, Isa};
use half::bf16;
use moe_conformance::{Case, Seed};
use rand::Rng;
use rstest::rstest;

const FN: Fp8Format = Fp8Format::E4M3Fn;
const MAX_ROWS: usize = 6;

/// Negotiated with a comm that carries `wire`.
fn plan(config: &MoeConfig, wire: WireFormat) -> Plan {
    let Support::Supported(experts) = BatchedExperts::new().supports(config) else { panic!("refused") };
    let mut comm = PrepareCaps::host("test", KernelKind::Modular, vec![wire], MAX_ROWS);
    (comm.format, comm.combine) = (ActivationFormat::BatchedExperts, CombineKind::WeightAndReduce);
    negotiate(config, &comm, &experts).unwrap()
}

fn kernel(provider: &BatchedExperts, config: &MoeConfig, plan: &Plan) -> Box<dyn ExpertsModular> {
    match provider.build(config, plan, Rank(0)) {
        Ok(Experts::Modular(kernel)) => kernel,
        other => panic!("{other:?}"),
    }
}

/// What a call lends: bf16 batches in which all that is not valid is NaN.
#[derive(Clone)]
struct Batches {
    rows: Vec<bf16>,
    counts: Vec<i32>,
    dims: [usize; 3],
}

impl Batches {
    fn random(config: &MoeConfig, counts: &[i32]) -> Self {
        let dims = [counts.len(), MAX_ROWS, config.hidden];
        let mut rows = vec![bf16::NAN; dims.iter().product()];
        for (batch, &count) in rows.chunks_mut(MAX_ROWS * config.hidden).zip(counts) {
            batch[..count.max(0) as usize * config.hidden]
                .fill_with(|| bf16::from_f32(rand::rng().random_range(-1.0..1.0)));
        }
        Self { rows, counts: counts.to_vec(), dims }
    }

    fn apply(&self, kernel: &dyn ExpertsModular, weights: &ExpertWeights) -> Result<Vec<bf16>> {
        let tokens = TensorView::from_slice(&self.counts, DType::I32, &[self.counts.len()]).unwrap();
        let input = Dispatched {
            hidden: TensorView::from_slice(&self.rows, DType::Bf16, &self.dims).unwrap(),
            scale: None,
            arrived: Arrived::Batched { tokens: TokensPerExpert(tokens) },
            output: None,
        };
        let mut workspace = Workspace::new(DeviceKind::Host, kernel.workspace_bytes()).unwrap();
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        // Leftovers of other calls lie in the workspace.
        cx.workspace.reborrow().take::<u8>(kernel.workspace_bytes()).unwrap().fill(0xff);
        let mut out = vec![UNTOUCHED; self.rows.len()];
        let view = TensorViewMut::from_slice(&mut out, DType::Bf16, &self.dims).unwrap();
        kernel.apply(&mut cx, weights, &input, view)?;
        Ok(out)
    }
}

/// A value that no expert computes here.
const UNTOUCHED: bf16 = bf16::from_bits(0x7f00);

fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn pack(case: &Case) -> ExpertWeights {
    BatchedExperts::new().pack(&case.config(), Rank(0), &case.weights().matrices()).unwrap()
}

#[rstest]
fn valid_rows_are_computed_and_no_others(
    #[values(
        QuantScheme::Unquantized,
        QuantScheme::Fp8Block(FN),
        QuantScheme::Fp8Ptpc(FN),
        QuantScheme::Fp8PerTensor(FN)
    )]
    quant: QuantScheme,
) {
    let case = Case::small(quant, 1, Seed::fresh());
    let config = case.config();
    let plan = plan(&config, WireFormat::unquantized(DType::Bf16));
    let weights = pack(&case);
    let mut counts = vec![0; config.num_experts()];
    (counts[0], counts[2]) = (2, MAX_ROWS as i32);
    let batches = Batches::random(&config, &counts);
    let out = batches.apply(&*kernel(&BatchedExperts::new(), &config, &plan), &weights).unwrap();
    for (row, values) in out.chunks(config.hidden).enumerate() {
        let is_valid = row % MAX_ROWS < counts[row / MAX_ROWS] as usize;
        let right = |x: &bf16| if is_valid { x.to_f32().abs() < 1e30 } else { *x == UNTOUCHED };
        assert!(values.iter().all(right), "row {row}, valid: {is_valid}, of {case}");
    }

    // Neither the number of threads nor, but for a scale per tensor, the other rows change a bit.
    let one_thread = Executor::new(Isa::detect(), NonZeroUsize::MIN).unwrap();
    let same = batches.apply(&*kernel(&BatchedExperts::with_executor(one_thread), &config, &plan), &weights);
    assert_eq!(bits(&same.unwrap()), bits(&out), "{case}");
    if !matches!(quant, QuantScheme::Fp8PerTensor(_)) {
        let mut fewer = batches.clone();
        fewer.counts[2] = 3;
        let part = fewer.apply(&*kernel(&BatchedExperts::new(), &config, &plan), &weights).unwrap();
        let valid = 2 * MAX_ROWS * config.hidden..(2 * MAX_ROWS + 3) * config.hidden;
        assert_eq!(bits(&part[valid.clone()]), bits(&out[valid]), "{case}");
    }
    let empty = Batches::random(&config, &vec![0; config.num_experts()]);
    let out = empty.apply(&*kernel(&BatchedExperts::new(), &config, &plan), &weights).unwrap();
    assert!(out.iter().all(|&x| x == UNTOUCHED));
}

/// The error of this backend underneath, after a look at the frame around it.
fn cause<T: std::fmt::Debug>(result: Result<T>) -> String {
    let error = result.unwrap_err();
    assert_eq!(
        (error.kind.clone(), error.stage, error.backend),
        (ErrorKind::Contract, Stage::Experts, "batched")
    );
    error.source().expect("has a source").to_string()
}

#[test]
fn misfits_are_refused() {
    let case = Case { top_k: 1, ..Case::small(QuantScheme::Fp8Block(FN), 1, Seed::fresh()) };
    let config = case.config();
    let plan = plan(&config, WireFormat::unquantized(DType::Bf16));
    let kernel = kernel(&BatchedExperts::new(), &config, &plan);
    let weights = pack(&case);
    let experts = config.num_experts();
    let with = |expert: usize, count: i32| {
        let mut batches = Batches::random(&config, &vec![0; experts]);
        batches.counts[expert] = count;
        cause(batches.apply(&*kernel, &weights))
    };
    assert_eq!(with(1, 7), "local expert 1 has 7 rows, its batch has room for 6");
    assert_eq!(with(0, -1), "local expert 0 has -1 rows, its batch has room for 6");

    let fits = Batches::random(&config, &vec![0; experts]);
    let short = Batches { counts: vec![0; experts - 1], ..fits.clone() };
    let wanted = format!("tokens per expert is [{}], needs [{experts}]", experts - 1);
    assert_eq!(cause(short.apply(&*kernel, &weights)), wanted);
    let flat = Batches { dims: [1, experts * MAX_ROWS, config.hidden], ..fits.clone() };
    assert!(cause(flat.apply(&*kernel, &weights)).starts_with("the output is [1, "));

    // A token reaches an expert once, so all batches are never full.
    let most = config.max_tokens_per_rank;
    let full = Batches { counts: vec![MAX_ROWS as i32; experts], ..fits.clone() };
    if experts * MAX_ROWS > most {
        let wanted = format!("{} rows were received, at most {most} are possible", experts * MAX_ROWS);
        assert_eq!(cause(full.apply(&*kernel, &weights)), wanted);
    }

    let other = Case::small(QuantScheme::Fp8Ptpc(FN), 1, Seed::fresh());
    assert!(cause(fits.apply(&*kernel, &pack(&other))).starts_with("the weights were packed for fp8_e4m3fn"));
    let foreign = ExpertWeights::new("aiter", 0u8, 1);
    assert!(cause(fits.apply(&*kernel, &foreign)).starts_with("the weights were packed for backend aiter"));

    let mut caps = ExpertsCaps::host("other", vec![WireFormat::unquantized(DType::Bf16)]);
    let comm = PrepareCaps::host("test", KernelKind::Modular, caps.accepts.clone(), MAX_ROWS);
    let others = negotiate(&config, &comm, &caps).unwrap();
    let built = BatchedExperts::new().build(&config, &others, Rank(0));
    assert_eq!(cause(built), "the plan is for the experts other, needs batched");
    caps.name = "batched";
    let standard = negotiate(&config, &comm, &caps).unwrap();
    let built = BatchedExperts::new().build(&config, &standard, Rank(0));
    assert_eq!(cause(built), "the plan has the activation format standard, needs batched");
}

#[test]
fn a_configuration_is_refused_with_every_reason() {
    let case = Case::small(QuantScheme::Unquantized, 1, Seed::fresh());
    let config = MoeConfig {
        device: DeviceKind::Cuda,
        in_dtype: DType::F16,
        max_tokens_per_rank: usize::MAX,
        ..case.config()
    };
    let Support::Unsupported(reasons) = BatchedExperts::new().supports(&config) else { panic!("supported") };
    let axes: Vec<_> = reasons.iter().map(|reason| reason.axis).collect();
    assert_eq!(axes, [Axis::Device, Axis::DType, Axis::Shape]);
}
