//! Calls that do not fit are refused with their values, and nothing is stored.

use std::ops::Range;

use grouped_gemm::{
    Activation, ActivationScale, Activations, Bf16Rows, Epilogue, Executor, Fp8Kind, GemmError, Group,
    GroupedGemm, PackedBf16, PackedF32, Rows, Weight, WeightKind,
};
use half::bf16;
use rstest::rstest;

const N: usize = 6;
const K: usize = 5;

/// A call that fits, for tests to spoil: 4 tokens, 5 sorted rows, 2 experts.
struct Call {
    weights: Vec<PackedBf16>,
    gather: Option<Vec<u32>>,
    groups: Vec<Group>,
    router_weights: Vec<f32>,
    epilogue: Epilogue,
    pitch: usize,
    fp8_scales: Option<usize>,
    scratch: usize,
    columns: usize,
    rows: usize,
}

fn weight(n: usize) -> PackedBf16 {
    PackedBf16::pack(Weight { values: &vec![bf16::ONE; n * K], n, k: K }).unwrap()
}

fn group(rows: Range<usize>, expert: usize) -> Group {
    Group { rows, expert }
}

impl Call {
    fn new() -> Self {
        Call {
            weights: vec![weight(N), weight(N)],
            gather: Some(vec![3, 0, 1, 2, 3]),
            groups: vec![group(0..2, 1), group(2..2, 0), group(2..5, 0)],
            router_weights: vec![1.0; 5],
            epilogue: Epilogue::Products,
            pitch: K,
            fp8_scales: None,
            scratch: Executor::detect().scratch_bytes(),
            columns: N,
            rows: 5,
        }
    }

    fn run(&self) -> Result<(), GemmError> {
        let tokens = [bf16::ONE; 4 * K];
        let codes = [0x38; 4 * K];
        let scales = vec![1.0; self.fp8_scales.unwrap_or(0)];
        let gemm = GroupedGemm {
            weights: &self.weights,
            activations: match self.fp8_scales {
                None => Activations::Bf16(Rows { values: &tokens, pitch: self.pitch }),
                Some(_) => Activations::Fp8 {
                    codes: Rows { values: &codes, pitch: self.pitch },
                    kind: Fp8Kind::E4M3Fn,
                    scale: ActivationScale::PerToken(&scales),
                },
            },
            gather: self.gather.as_deref(),
            groups: &self.groups,
            router_weights: Some(&self.router_weights),
            epilogue: self.epilogue,
        };
        let mut out = vec![bf16::MAX; self.columns * self.rows];
        let mut scratch = vec![0; self.scratch];
        let sink = Bf16Rows::new(&mut out, self.columns, self.columns).unwrap();
        let result = Executor::detect().run(&gemm, &mut scratch, &sink);
        let stored = out.iter().filter(|&&value| value != bf16::MAX).count();
        assert_eq!(stored, if result.is_ok() { self.columns * self.rows } else { 0 });
        result
    }
}

#[test]
fn the_unspoiled_call_is_accepted() {
    assert_eq!(Call::new().run(), Ok(()));
    let mut call = Call::new();
    call.fp8_scales = Some(4);
    assert_eq!(call.run(), Ok(()));
}

#[rstest]
#[case(|c: &mut Call| c.weights[1] = weight(N + 1), "expert 1 is [7, 5] in plain columns, expert 0 is [6, 5] in plain columns")]
#[case(|c: &mut Call| c.groups[2].expert = 2, "group 2 names expert 2 of 2")]
#[case(|c: &mut Call| c.groups[2].rows = 1..5, "group 2 covers rows 1..5, which do not ascend from row 2")]
#[case(|c: &mut Call| c.groups[2].rows = Range { start: 5, end: 2 }, "group 2 covers rows 5..2, which do not ascend from row 2")]
#[case(|c: &mut Call| c.gather.as_mut().unwrap()[2] = 4, "gather maps row 2 to activation row 4 of 4")]
#[case(|c: &mut Call| c.gather.as_mut().unwrap().truncate(4), "gather has 4 rows, the groups need 5")]
#[case(|c: &mut Call| c.gather = None, "activation has 4 rows, the groups need 5")]
#[case(|c: &mut Call| c.router_weights.truncate(4), "router weight has 4 rows, the groups need 5")]
#[case(|c: &mut Call| c.pitch = 4, "activation pitch 4 is smaller than its 5 columns")]
#[case(|c: &mut Call| c.fp8_scales = Some(3), "per-token activation scale needs 4 values, found 3")]
#[case(|c: &mut Call| c.columns = 7, "sink has 7 columns, the result has 6")]
#[case(|c: &mut Call| c.rows = 4, "sink has 4 rows, the groups need 5")]
#[case(|c: &mut Call| c.scratch = 64, &format!("scratch has 64 bytes, {} are needed", Executor::detect().scratch_bytes()))]
#[case(
    |c: &mut Call| c.epilogue = Epilogue::GateUp(Activation::Silu),
    "weights are packed as plain columns but the call asks for an activation of gate and up"
)]
fn a_spoiled_call_is_refused(#[case] spoil: fn(&mut Call), #[case] message: &str) {
    let mut call = Call::new();
    spoil(&mut call);
    assert_eq!(call.run().unwrap_err().to_string(), message);
}

#[rstest]
#[case(vec![])]
#[case(vec![group(0..0, 7), group(9..9, 0)])]
fn no_rows_are_fine(#[case] groups: Vec<Group>) {
    let mut call = Call::new();
    (call.groups, call.rows) = (groups, 0);
    assert_eq!(call.run(), Ok(()));
    call.weights.clear();
    assert_eq!(call.run(), Ok(()));
}

/// f32 operands meet each other only.
#[test]
fn f32_with_another_operand() {
    let executor = Executor::detect();
    let mut scratch = vec![0; executor.scratch_bytes()];
    let groups = [group(0..1, 0)];
    let mut out = [bf16::ZERO; N];
    let (halves, floats) = ([bf16::ONE; K], [1.0; K]);
    let of_floats = [PackedF32::pack(Weight { values: &[1.0; N * K], n: N, k: K }).unwrap()];
    let of_halves = [weight(N)];
    let sink = Bf16Rows::new(&mut out, N, N).unwrap();
    let gemm = GroupedGemm {
        weights: &of_floats,
        activations: Activations::Bf16(Rows { values: &halves, pitch: K }),
        gather: None,
        groups: &groups,
        router_weights: None,
        epilogue: Epilogue::Products,
    };
    let refused = |weights, f32_activations| Err(GemmError::Operands { weights, f32_activations });
    assert_eq!(executor.run(&gemm, &mut scratch, &sink), refused(WeightKind::F32, false));
    let gemm = GroupedGemm {
        weights: &of_halves,
        activations: Activations::F32(Rows { values: &floats, pitch: K }),
        gather: None,
        groups: &groups,
        router_weights: None,
        epilogue: Epilogue::Products,
    };
    assert_eq!(executor.run(&gemm, &mut scratch, &sink), refused(WeightKind::Bf16, true));
}
