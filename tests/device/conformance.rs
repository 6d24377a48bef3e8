//! The conformance suite on the GPU: stage 3 on made-up batches, and whole layers of the pair for devices, against the oracle
//! element by element.

use std::sync::atomic::{AtomicUsize, Ordering};

use device_runtime::{Graph, Runtime, Stream};
use fused_moe::{ExpertsProvider, MakeError, Registry, Selection, SingleRank, kernels};
use fused_moe_core::{DType, DeviceAllocator, DeviceKind, ExpertPlacement, Source, TensorView, Workspace};
use gpu_experts::GpuExperts;
use libtest_mimic::{Failed, Trial};
use moe_conformance::{Case, Outcome, Replay, SCHEMES, Seed, Settings, Suite, TestDevice, layer};
use moe_kernels::grouped_gemm::TokenTile;
use moe_kernels::{Gpu, Target};

use crate::FIRST;

/// Cases of the suite, and layers, that must pass at least: what did when they were counted.
const FLOOR: usize = 140;
static PASSED: AtomicUsize = AtomicUsize::new(0);

/// The GPU as the suite uses it, with a stream of its own.
#[derive(Debug)]
pub struct OnStream {
    runtime: Runtime,
    stream: Stream,
}

impl OnStream {
    /// It lives as long as the program, since settings refer to it.
    pub fn new(gpu: &Gpu) -> Result<&'static Self, Failed> {
        let (runtime, stream) = (gpu.runtime().clone(), gpu.runtime().stream()?);
        Ok(Box::leak(Box::new(Self { runtime, stream })))
    }

    /// The bytes of a tensor without gaps on the device, once the stream has come to its end.
    pub fn bytes_of(&self, view: TensorView<'_>) -> Result<Vec<u8>, Source> {
        let mut bytes = vec![0; view.layout().num_elements() * view.dtype().size_bytes()];
        let (download, row) = (self.runtime.alloc(bytes.len())?, bytes.len());
        // SAFETY: the view is of this device's memory and that long; the copy is waited for.
        unsafe { self.stream.copy_rows((download.address(), row), (view.address() as u64, row), 1, row)? };
        self.stream.wait()?;
        download.read(&mut bytes)?;
        Ok(bytes)
    }
}

impl OnStream {
    /// Copies what `from` is to `to`, both without gaps and on the device, and waits.
    pub fn copy(&self, to: TensorView<'_>, from: TensorView<'_>) -> Result<(), Source> {
        let row = from.layout().num_elements() * from.dtype().size_bytes();
        assert!(row <= to.layout().num_elements() * to.dtype().size_bytes(), "{row} bytes do not fit");
        // SAFETY: both are of this device's memory and that long, and nobody else uses them; the copy is waited for.
        unsafe { self.stream.copy_rows((to.address() as u64, row), (from.address() as u64, row), 1, row)? };
        Ok(self.stream.wait()?)
    }
}

struct Recorded<'s> {
    graph: Graph,
    stream: &'s Stream,
}

impl Replay for Recorded<'_> {
    fn replay(&self) -> Result<(), Source> {
        // SAFETY: the suite keeps the tensors and the kernel of a recorded call until it has waited for its replays.
        unsafe { self.graph.replay(self.stream)? };
        Ok(())
    }
}

impl TestDevice for OnStream {
    fn memory(&self) -> &dyn DeviceAllocator {
        &self.runtime
    }

    fn stream(&self) -> fused_moe_core::Stream {
        // SAFETY: the stream is never destroyed, and memory of the device is freed only after what uses it.
        fused_moe_core::Stream::Device(unsafe { self.stream.lend() })
    }

    fn write(&self, to: &mut Workspace, bytes: &[u8]) -> Result<(), Source> {
        assert!(bytes.len() <= to.bytes(), "{} bytes into {}", bytes.len(), to.bytes());
        let mut upload = self.runtime.alloc(bytes.len())?;
        upload.write(bytes)?;
        let to = to.tensor(DType::U8, &[bytes.len()])?.address() as u64;
        let row = bytes.len();
        // SAFETY: both are that long, and nothing else is on the way: the copy is waited for.
        unsafe { self.stream.copy_rows((to, row), (upload.address(), row), 1, row)? };
        Ok(self.stream.wait()?)
    }

    fn read(&self, from: &Workspace, bytes: &mut [u8]) -> Result<(), Source> {
        bytes.copy_from_slice(&self.bytes_of(from.tensor(DType::U8, &[bytes.len()])?)?);
        Ok(())
    }

    fn record(&self, body: &mut dyn FnMut() -> Result<(), Source>) -> Result<Box<dyn Replay + '_>, Source> {
        let graph = self.stream.capture::<Source>(|_| body())?;
        Ok(Box::new(Recorded { graph, stream: &self.stream }))
    }
}

/// The settings of one trial: trials run beside each other, each on a stream of its own.
pub fn settings(gpu: &Gpu) -> Result<Settings, Failed> {
    Ok(Settings::default().with_device(OnStream::new(gpu)?))
}

fn judged(outcome: Outcome) -> Result<(), Failed> {
    match outcome {
        Outcome::Fail(why) => Err(why.into()),
        Outcome::Pass => {
            PASSED.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        Outcome::Refused(_) => Ok(()),
    }
}

/// Cases of the suite for experts, and layers of every scheme.
pub fn trials() -> Vec<Trial> {
    let gpu = match Gpu::open(FIRST) {
        Ok(gpu) => gpu,
        Err(error) => return vec![Trial::test("cuda::opens", move || Err(error.into()))],
    };
    let mut trials = Vec::new();
    for &case in Suite::experts(GpuExperts::new(gpu.clone())).cases() {
        let gpu = gpu.clone();
        trials.push(Trial::test(format!("cuda::experts::{case}"), move || {
            let suite = Suite::experts(GpuExperts::new(gpu.clone())).with_settings(settings(&gpu)?);
            judged(suite.outcome(case))
        }));
    }
    // Other tiles than what the rows of a case make likely.
    for tile in TokenTile::ALL {
        for case in ["oracle_none_ep1", "oracle_block_ep1", "oracle_ptpc_ep1", "oracle_block_ep3"] {
            let gpu = gpu.clone();
            trials.push(Trial::test(format!("cuda::tiles::{tile:?}::{case}"), move || {
                let experts = GpuExperts::new(gpu.clone()).with_tile(tile);
                judged(Suite::experts(experts).with_settings(settings(&gpu)?).outcome(case))
            }));
        }
    }
    for (name, quant) in SCHEMES {
        let seed = Seed::fresh();
        let plain = Case::plain(quant, 1, seed);
        let cases = Case::covering(quant, 1, seed).into_iter().chain([plain.clone(), plain.padded()]);
        for (index, case) in cases.enumerate() {
            let gpu = gpu.clone();
            trials.push(Trial::test(format!("cuda::layer::{name}::{index}"), move || {
                let registry = fused_moe::device_backends(Target::from(gpu.clone()));
                let case = case.on(DeviceKind::Cuda);
                judged(layer::run(&registry, &case, Selection::default(), settings(&gpu)?))
            }));
        }
    }
    // Sums as long as those of a model, of which tensor cores cut off more.
    for (name, quant) in &SCHEMES[..3] {
        let gpu = gpu.clone();
        let placement = ExpertPlacement::linear(16, 1).expect("one rank holds them");
        let sizes = Case {
            hidden: 2048,
            intermediate: 768,
            num_experts: 16,
            top_k: 8,
            ..Case::plain(*quant, 1, Seed::fresh())
        };
        let case = Case { placement, tokens: vec![37], ..sizes };
        trials.push(Trial::test(format!("cuda::layer::{name}::large"), move || {
            let registry = fused_moe::device_backends(Target::from(gpu.clone()));
            judged(layer::run(&registry, &case.on(DeviceKind::Cuda), Selection::default(), settings(&gpu)?))
        }));
    }
    trials.extend(crate::saboteurs::trials(&gpu));
    trials
}

/// Whether as much passes as did.
pub fn floor() -> Result<(), String> {
    let passed = PASSED.load(Ordering::Relaxed);
    if device_runtime::device_count(DeviceKind::Cuda).unwrap_or(0) == 0 {
        return Ok(());
    }
    println!("{passed} cases and layers pass");
    if passed >= FLOOR {
        Ok(())
    } else {
        Err(format!("{passed} cases and layers pass, the floor is {FLOOR}"))
    }
}

/// A layer for the first GPU is built where there is one, and refused with the reason where there is none.
pub fn refused_or_run() -> Result<(), Failed> {
    let target = Target::open(FIRST);
    let is_open = target.gpu().is_ok();
    let registry: Registry = fused_moe::device_backends(target);
    let case = Case::plain(SCHEMES[1].1, 1, Seed::fresh()).on(DeviceKind::Cuda);
    let config = case.config();
    match registry.build(&config, Selection::default(), &SingleRank) {
        Ok(_) if is_open => Ok(()),
        Err(MakeError::NoneFits(pairs)) if !is_open => {
            let experts = GpuExperts::new(kernels::Target::open(FIRST));
            let weights = case.weights();
            if experts.pack(&config, fused_moe::Rank(0), &weights.matrices()).is_ok() {
                return Err("weights were packed for a device that is not there".into());
            }
            let text = MakeError::NoneFits(pairs).to_string();
            if text.contains("device: needs sm_90a, found") { Ok(()) } else { Err(text.into()) }
        }
        other => Err(format!("open: {is_open}, build: {other:?}").into()),
    }
}
