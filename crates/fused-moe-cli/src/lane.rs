//! Where calls of a layer run: on the host, or on a GPU, to which their tensors are uploaded and from which the outputs come
//! back.

#![expect(unsafe_code, reason = "a stream is lent to the calls that are waited for")]

use anyhow::Context;
use fused_moe::device::{DeviceBuffer, Runtime, Stream as DeviceStream};
use fused_moe::{
    Call, DType, Device, DeviceKind, ExpertWeights, ModularKernel, Overlap, Stream, TensorView,
    TensorViewMut, TopK,
};
use half::bf16;

/// The tokens of a call and where they go.
#[derive(Clone, Copy, Debug)]
pub struct Routed<'a> {
    /// `[tokens, hidden]`.
    pub hidden: &'a [bf16],
    /// `[tokens, top_k]`.
    pub ids: &'a [i32],
    /// `[tokens, top_k]`.
    pub weights: &'a [f32],
    /// Tokens, elements of each, and slots of each.
    pub dims: [usize; 3],
}

/// Where calls run.
#[derive(Debug)]
pub struct Lane {
    gpu: Option<(Runtime, DeviceStream)>,
}

impl Lane {
    /// The first device of `kind`, with a stream of its own.
    pub fn open(kind: DeviceKind) -> anyhow::Result<Self> {
        if kind == DeviceKind::Host {
            return Ok(Self { gpu: None });
        }
        let runtime = Runtime::open(Device { kind, index: 0 })?;
        let stream = runtime.stream()?;
        Ok(Self { gpu: Some((runtime, stream)) })
    }

    /// Runs `kernel` on tokens of the host and writes `[tokens, hidden]` to `out`. It has been done when this returns.
    pub fn apply(
        &self,
        kernel: &mut ModularKernel,
        weights: &ExpertWeights,
        routed: Routed<'_>,
        overlap: Overlap<'_>,
        out: &mut [f32],
    ) -> anyhow::Result<()> {
        let [tokens, hidden, top_k] = routed.dims;
        // Wrapped, so that what is lent may be lent for this call alone.
        let Overlap { mut dispatch, mut combine } = overlap;
        let mut in_dispatch = |stream| dispatch.as_mut().map_or(Ok(()), |work| work(stream));
        let mut in_combine = |stream| combine.as_mut().map_or(Ok(()), |work| work(stream));
        let overlap = Overlap { dispatch: Some(&mut in_dispatch), combine: Some(&mut in_combine) };
        let (rows, slots) = ([tokens, hidden], [tokens, top_k]);
        let Some((runtime, stream)) = &self.gpu else {
            let routing = TopK {
                ids: TensorView::from_slice(routed.ids, DType::I32, &slots)?,
                weights: TensorView::from_slice(routed.weights, DType::F32, &slots)?,
            };
            let x = TensorView::from_slice(routed.hidden, DType::Bf16, &rows)?;
            let out = TensorViewMut::from_slice(out, DType::F32, &rows)?;
            kernel.apply(Call { stream: Stream::Host, weights, hidden: x, routing, overlap, out })?;
            return Ok(());
        };
        let upload = |bytes: Vec<u8>| -> anyhow::Result<DeviceBuffer> {
            let mut buffer = runtime.alloc(bytes.len()).context("tokens on the device")?;
            buffer.write(&bytes)?;
            Ok(buffer)
        };
        let x = upload(routed.hidden.iter().flat_map(|x| x.to_ne_bytes()).collect())?;
        let ids = upload(routed.ids.iter().flat_map(|x| x.to_ne_bytes()).collect())?;
        let gates = upload(routed.weights.iter().flat_map(|x| x.to_ne_bytes()).collect())?;
        let mut sums = runtime.alloc(size_of_val(out)).context("outputs on the device")?;
        kernel.apply(Call {
            // SAFETY: the stream outlives the call, which is waited for before what it was lent is dropped or written: a buffer's
            // memory is freed only after what uses it, also where the call fails.
            stream: Stream::Device(unsafe { stream.lend() }),
            weights,
            hidden: x.tensor(DType::Bf16, &rows)?,
            routing: TopK {
                ids: ids.tensor(DType::I32, &slots)?,
                weights: gates.tensor(DType::F32, &slots)?,
            },
            overlap,
            out: sums.tensor_mut(DType::F32, &rows)?,
        })?;
        stream.wait()?;
        let mut bytes = vec![0; sums.bytes()];
        sums.read(&mut bytes)?;
        for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
            *out = f32::from_ne_bytes(*bytes);
        }
        Ok(())
    }
}
