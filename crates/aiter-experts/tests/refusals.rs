//! What is refused, and that the refusal says what is wrong.

mod common;

use std::error::Error as _;

use aiter_experts::AiterExperts;
use common::*;
use fused_moe_core::QuantScheme::{self, *};
use fused_moe_core::*;
use half::{bf16, f16};
use rand::Rng;
use rstest::rstest;

/// The error of this backend underneath, after a look at the frame around it.
fn cause<T>(result: Result<T>) -> String {
    let Err(error) = result else { panic!("was accepted") };
    assert_eq!(
        (error.kind.clone(), error.stage, error.backend),
        (ErrorKind::Contract, Stage::Experts, "aiter")
    );
    error.source().expect("has a source").to_string()
}

#[test]
fn a_configuration_is_refused_with_every_reason() {
    let mut config = on_one_rank(Unquantized, Shape { experts: 400, top_k: 300, ..RAGGED });
    config.device = DeviceKind::Cuda;
    config.in_dtype = DType::F16;
    config.max_tokens_per_rank = 1 << 24;
    let Support::Unsupported(reasons) = AiterExperts::new().supports(&config) else { panic!("supported") };
    let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
    let wanted = [
        "device: needs the host, found Cuda",
        "element type: needs bf16 hidden states, found f16",
        "shape: needs top_k of at most 255, found 300",
        "shape: needs fewer than 16777216 tokens over all ranks, found 16777216",
    ];
    assert_eq!(reasons, wanted);
}

#[rstest]
fn capabilities_say_the_contract(
    #[values(Unquantized, Fp8Block(FN), Fp8PerTensor(FNUZ))] quant: QuantScheme,
) {
    let config = on_one_rank(quant, RAGGED);
    let Support::Supported(caps) = AiterExperts::new().supports(&config) else { panic!("refused") };
    let unquantized = WireFormat::unquantized(DType::Bf16);
    let wires = match quant {
        Unquantized => vec![unquantized],
        _ => vec![quant.quantized_wire(DType::Bf16), unquantized],
    };
    assert_eq!((caps.name, caps.format, caps.accepts), ("aiter", ActivationFormat::Standard, wires));
    assert!(caps.weight_and_reduce.is_no_op() && caps.weight_on_input);
    let built = build(&AiterExperts::new(), &config, &plan(&config, 4, Arrival::Bf16), Rank(0));
    assert_eq!(built.caps().name, "aiter");
}

#[test]
fn foreign_plans_and_contradictions_are_not_built() {
    let config = on_one_rank(Fp8Block(FN), RAGGED);
    let build = |config: &MoeConfig, plan: &Plan| AiterExperts::new().build(config, plan, Rank(0));
    let wires = vec![Fp8Block(FN).quantized_wire(DType::Bf16)];
    let comm = PrepareCaps::host("test", KernelKind::Modular, wires.clone(), 4);
    let others = negotiate(&config, &comm, &ExpertsCaps::host("other", wires)).unwrap();
    assert_eq!(cause(build(&config, &others)), "the plan is for the experts other, needs aiter");

    let block = plan(&config, 4, Arrival::Quantised);
    let ptpc = on_one_rank(Fp8Ptpc(FN), RAGGED);
    let wanted = "the plan dispatches fp8_e4m3fn + dynamic f32 scale per 1x128, \
                  needs fp8_e4m3fn + dynamic f32 scale per token or bf16";
    assert_eq!(cause(build(&ptpc, &block)), wanted);

    let empty = MoeConfig { hidden: 0, ..config.clone() };
    let wanted = "the configuration is not supported: shape: needs hidden of at least 1, found 0";
    assert_eq!(cause(build(&empty, &block)), wanted);
}

/// Whoever can do it earlier weights the input: a dispatch that can, else the experts (AITER's `doweight_stage1`).
#[test]
fn the_input_is_weighted_by_dispatch_or_by_the_experts() {
    let shape = Shape { top_k: 1, ..RAGGED };
    let config = MoeConfig { apply_router_weight_on_input: true, ..on_one_rank(Unquantized, shape) };
    let Support::Supported(caps) = AiterExperts::new().supports(&config) else { panic!("refused") };
    let wires = vec![WireFormat::unquantized(DType::Bf16)];
    let mut comm = PrepareCaps::host("test", KernelKind::Modular, wires, 4);
    for (early, wanted) in [(false, RouterWeight::OnInputByExperts), (true, RouterWeight::OnInputByPrepare)] {
        comm.weight_on_input = early;
        let plan = negotiate(&config, &comm, &caps).unwrap();
        assert_eq!(plan.router_weight(), wanted);
        assert!(AiterExperts::new().build(&config, &plan, Rank(0)).is_ok());
    }
}

#[rstest]
fn misfit_weights_are_named(#[values(0, 1, 2)] which: usize) {
    let name = ["gate", "up", "down"][which];
    let dims = [[96, 160], [96, 160], [160, 96]][which];
    let blocks = [[1, 2], [1, 2], [2, 1]][which];
    // Rank 1 of 2 holds the odd experts; its second is expert 3.
    let placement = ExpertPlacement::from_owners(&[0, 1, 0, 1, 0, 1, 0, 1], 2).unwrap();
    let values = vec![0u8; dims[0] * dims[1] * 4];
    let view = |dtype: DType, dims: &[usize]| {
        let base = values.as_ptr().cast_mut();
        let allocation = Allocation { base, bytes: values.len(), dtype, device: Device::HOST };
        // SAFETY: zero bytes of a living vector are values of every type.
        unsafe { TensorView::from_allocation(allocation, Layout::contiguous(dims)).unwrap() }
    };
    let ones = vec![1.0f32; 160 * 2];
    let scales =
        |dims: &[usize]| TensorView::from_slice(&ones[..dims.iter().product()], DType::F32, dims).unwrap();
    let infinite = [f32::INFINITY; 2];
    let infinite = TensorView::from_slice(&infinite, DType::F32, &blocks).unwrap();
    let fp8 = view(FN.dtype(), &dims);
    let fewer = [dims[0], dims[1] - 1];
    let channel = format!("a scale per output channel, [{}]", dims[0]);
    let per_block = format!("a scale per 128x128 block, {blocks:?}");
    let bf16_values = view(DType::Bf16, &dims);
    let weight = |values, scale| WeightMatrix { values, scale, bias: None, input_scale: None };
    let table = [
        (
            Unquantized,
            weight(view(DType::Bf16, &fewer), None),
            "",
            format!("{dims:?} of bf16 or f32, found {fewer:?} of bf16"),
        ),
        (
            Unquantized,
            weight(view(DType::F16, &dims), None),
            "",
            format!("{dims:?} of bf16 or f32, found {dims:?} of f16"),
        ),
        (
            Unquantized,
            weight(bf16_values, Some(WeightScale::Tensor(2.0))),
            " scale",
            "no scale, found one scale (2)".into(),
        ),
        (
            Unquantized,
            weight(fp8, Some(WeightScale::Tensor(2.0))),
            "",
            format!("{dims:?} of bf16 or f32, found {dims:?} of fp8_e4m3fn"),
        ),
        (
            Fp8Block(FN),
            weight(bf16_values, None),
            "",
            format!("{dims:?} of fp8_e4m3fn, found {dims:?} of bf16"),
        ),
        (
            Fp8Block(FNUZ),
            weight(fp8, None),
            "",
            format!("{dims:?} of fp8_e4m3fnuz, found {dims:?} of fp8_e4m3fn"),
        ),
        (Fp8Block(FN), weight(fp8, None), " scale", format!("{per_block}, found no scale")),
        (
            Fp8Block(FN),
            weight(fp8, Some(WeightScale::Channel(scales(&[dims[0]])))),
            " scale",
            format!("{per_block}, found {channel}"),
        ),
        (
            Fp8Block(FN),
            weight(fp8, Some(WeightScale::Block128(scales(&[2, 2])))),
            " scale",
            format!("{blocks:?} of f32, found [2, 2] of f32"),
        ),
        (
            Fp8Block(FN),
            weight(fp8, Some(WeightScale::Block128(view(DType::Bf16, &blocks)))),
            " scale",
            format!("{blocks:?} of f32, found {blocks:?} of bf16"),
        ),
        (
            Fp8Block(FN),
            weight(fp8, Some(WeightScale::Block128(infinite))),
            " scale",
            "finite scales, found inf at 0".into(),
        ),
        (
            Fp8Ptpc(FN),
            weight(fp8, Some(WeightScale::Channel(scales(&[7])))),
            " scale",
            format!("{:?} of f32, found [7] of f32", [dims[0]]),
        ),
        (
            Fp8Ptpc(FN),
            weight(fp8, Some(WeightScale::Tensor(1.0))),
            " scale",
            format!("{channel}, found one scale (1)"),
        ),
        (
            Fp8PerTensor(FN),
            weight(fp8, Some(WeightScale::Tensor(f32::NAN))),
            " scale",
            "one finite scale, found one scale (NaN)".into(),
        ),
        (
            Fp8PerTensor(FN),
            weight(fp8, Some(WeightScale::Channel(scales(&[dims[0]])))),
            " scale",
            format!("one finite scale, found {channel}"),
        ),
    ];
    for (quant, wrong, suffix, wanted) in table {
        let config = config(quant, RAGGED, placement.clone());
        let layer = Layer::random(&mut fresh_rng(), &config);
        let mut experts: Vec<_> = [1, 3, 5, 7].map(|id: usize| layer.experts[id].lend()).into();
        let matrices = &mut experts[1];
        *[&mut matrices.gate, &mut matrices.up, &mut matrices.down][which] = wrong;
        let found = cause(AiterExperts::new().pack(&config, Rank(1), &experts));
        assert_eq!(found, format!("{name}{suffix} of expert 3 needs {wanted}"), "{quant}");
    }
}

#[test]
fn as_many_experts_are_packed_as_the_rank_holds() {
    let config = on_one_rank(Unquantized, RAGGED);
    let layer = Layer::random(&mut fresh_rng(), &config);
    let seven: Vec<_> = layer.experts[..7].iter().map(Expert::lend).collect();
    let found = cause(AiterExperts::new().pack(&config, Rank(0), &seven));
    assert_eq!(found, "rank 0 holds 8 experts, 7 were given");
}

#[rstest]
fn fp8_weights_stay_one_byte(#[values(Fp8Block(FN), Fp8Ptpc(FNUZ), Fp8PerTensor(FN))] quant: QuantScheme) {
    let shape = Shape { hidden: 256, intermediate: 128, experts: 3, top_k: 1 };
    let config = on_one_rank(quant, shape);
    let weights = Layer::random(&mut fresh_rng(), &config).pack(&config, Rank(0));
    let (codes, channels) = (3 * 3 * 256 * 128, 3 * (256 + 2 * 128));
    assert!((codes..=codes + 4 * channels).contains(&weights.bytes()), "{} bytes", weights.bytes());
}

/// f32 values are rounded once, and rows may have gaps.
#[test]
fn f32_and_gapped_weights_pack_like_bf16() {
    let mut rng = fresh_rng();
    let config = on_one_rank(Unquantized, RAGGED);
    let layer = Layer::random(&mut rng, &config);
    let batch = Batch::random(&mut rng, &config, [9, 9]);
    let wanted = bits(&run(&config, &layer, &batch, Arrival::Bf16));
    let wide = |matrix: &Matrix| -> Vec<f32> {
        let rows = matrix.bf16.chunks(matrix.dims[1]);
        rows.flat_map(|row| row.iter().map(|v| v.to_f32()).chain([f32::NAN; 3])).collect()
    };
    let values: Vec<_> = layer.experts.iter().map(|e| [wide(&e.gate), wide(&e.up), wide(&e.down)]).collect();
    fn lend(values: &[f32], [n, k]: [usize; 2]) -> TensorView<'_> {
        let layout = Layout::contiguous(&[n, k]).strided(&[k + 3, 1], 0);
        TensorView::from_slice_with(values, DType::F32, layout).unwrap()
    }
    let mut experts = Vec::new();
    for (expert, [gate, up, down]) in layer.experts.iter().zip(&values) {
        let matrix = |values, dims| WeightMatrix::unquantized(lend(values, dims));
        experts.push(ExpertMatrices {
            gate: matrix(gate, expert.gate.dims),
            up: matrix(up, expert.up.dims),
            down: matrix(down, expert.down.dims),
        });
    }
    let provider = AiterExperts::new();
    let weights = provider.pack(&config, Rank(0), &experts).unwrap();
    let kernel = build(&provider, &config, &plan(&config, 9, Arrival::Bf16), Rank(0));
    let mut out = vec![bf16::NAN; 9 * config.hidden];
    let view = TensorViewMut::from_slice(&mut out, DType::Bf16, &[9, config.hidden]).unwrap();
    Lent::new(&config, &batch, None).apply(&*kernel, &weights, 9, view).unwrap();
    assert_eq!(bits(&out), wanted);
}

/// What a call lends when it is right.
struct Fixture<'l> {
    config: &'l MoeConfig,
    batch: &'l Batch,
    payload: &'l Payload,
    kernel: &'l dyn ExpertsModular,
}

impl<'l> Fixture<'l> {
    /// The refusal of a call with something spoiled: what is lent, the weights, the number of rows, the
    /// columns of the output.
    fn call(
        &self,
        spoil: &dyn Fn(&mut Lent<'l>),
        weights: &ExpertWeights,
        rows: usize,
        columns: usize,
    ) -> String {
        let mut lent = Lent::new(self.config, self.batch, Some(self.payload));
        spoil(&mut lent);
        let mut out = vec![bf16::ZERO; 6 * columns];
        let view = TensorViewMut::from_slice(&mut out, DType::Bf16, &[6, columns]).unwrap();
        cause(lent.apply(self.kernel, weights, rows, view))
    }
}

/// Everything that can be lent wrongly to a call.
#[test]
fn misfit_calls_are_refused() {
    let mut rng = fresh_rng();
    let config = on_one_rank(Fp8Block(FN), RAGGED);
    let layer = Layer::random(&mut rng, &config);
    let batch = Batch::random(&mut rng, &config, [4, 6]);
    let payload = Payload::quantize(&config, &batch);
    let plan = plan(&config, 6, Arrival::Quantised);
    let kernel = build(&AiterExperts::new(), &config, &plan, Rank(0));
    let weights = layer.pack(&config, Rank(0));
    let fixture = Fixture { config: &config, batch: &batch, payload: &payload, kernel: &*kernel };
    let fine = |_: &mut Lent<'_>| {};
    assert_eq!(fixture.call(&fine, &weights, 7, 160), "7 rows were received, at most 6 are possible");
    let out = fixture.call(&fine, &weights, 4, 159);
    assert!(out.starts_with("the output is [6, 159] of bf16, needs [4 or more, 160]"), "{out}");

    let mut ids = batch.ids.clone();
    ids[4] = 8;
    let ids = TensorView::from_slice(&ids, DType::I32, &[6, 3]).unwrap();
    let text = fixture.call(&|lent| lent.ids = ids, &weights, 4, 160);
    assert_eq!(text, "expert id 8 of row 1 slot 1 is neither -1 nor below 8");

    let text = fixture.call(&|lent| lent.scale = None, &weights, 4, 160);
    assert_eq!(text, "the received scale tensor is absent, needs there");
    let unscaled = vec![1.0f32; 6];
    let unscaled = TensorView::from_slice(&unscaled, DType::F32, &[6, 1]).unwrap();
    let text = fixture.call(&|lent| lent.scale = Some(unscaled), &weights, 4, 160);
    assert!(text.starts_with("the received scale tensor is [6, 1] of f32, needs [4 or more, 2]"), "{text}");
    let half = vec![f16::ZERO; 6 * 160];
    let half = TensorView::from_slice(&half, DType::F16, &[6, 160]).unwrap();
    let text = fixture.call(&|lent| lent.hidden = half, &weights, 4, 160);
    assert_eq!(text, "the received tensor is [6, 160] of f16, needs fp8_e4m3fn");

    let ptpc = on_one_rank(Fp8Ptpc(FN), RAGGED);
    let other = Layer::random(&mut rng, &ptpc).pack(&ptpc, Rank(0));
    let wanted = "the weights were packed for fp8_e4m3fn weights with a scale per output channel \
                  of 8 experts, hidden 160, intermediate 96, this kernel runs fp8_e4m3fn weights \
                  with a scale per 128x128 block of 8 experts, hidden 160, intermediate 96";
    assert_eq!(fixture.call(&fine, &other, 4, 160), wanted);
    let foreign = ExpertWeights::new("other", rng.random::<u8>(), 1);
    assert!(fixture.call(&fine, &foreign, 4, 160).starts_with("the weights were packed for backend other"));

    let mut workspace = Workspace::new(DeviceKind::Host, kernel.workspace_bytes() - 1024).unwrap();
    let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
    let count = [4];
    let lent = Lent::new(&config, &batch, Some(&payload));
    let rows = ReceivedRows(TensorView::from_slice(&count, DType::I32, &[1]).unwrap());
    let topk = TopK { ids: lent.ids, weights: lent.weights };
    let arrived = Arrived::Standard { topk, rows };
    let input = Dispatched { hidden: lent.hidden, scale: lent.scale, arrived, output: None };
    let mut out = vec![bf16::ZERO; 6 * 160];
    let view = TensorViewMut::from_slice(&mut out, DType::Bf16, &[6, 160]).unwrap();
    assert!(cause(kernel.apply(&mut cx, &weights, &input, view)).contains("reaches element"));
}
