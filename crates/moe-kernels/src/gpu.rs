//! The device that backends run on: open, with its kernels loaded, and what a call lends of it.

use std::sync::Arc;

use device_runtime::{DeviceError, Runtime, Unavailable};
use fused_moe_core::{Axis, DType, Device, DeviceKind, Stream, TensorView, Unsupported};

use crate::arch::Arch;
use crate::loaded::{Kernels, LoadError};

/// Bytes that kernels read and write at once: what lent addresses are multiples of.
const ALIGN: u64 = 16;

/// Why a device cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// No driver, or no such device.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// No kernels for it.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The driver fails.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// What a call lent and a kernel cannot take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LentError {
    /// A stream of the host or of another device.
    #[error("the stream is {found:?}, needs one of {device}")]
    Stream {
        /// The device that the call runs on.
        device: Device,
        /// What was lent.
        found: Stream,
    },
    /// A tensor of another shape, type or place, or with gaps.
    #[error("the {tensor} are {found}, need {wanted}")]
    Tensor {
        /// Which tensor.
        tensor: &'static str,
        /// What there is.
        found: String,
        /// What the kernels take.
        wanted: String,
    },
}

#[derive(Debug)]
struct Open {
    runtime: Runtime,
    kernels: Kernels,
    compute_units: u32,
}

/// An open device with its kernels. Clones are the same device.
#[derive(Clone, Debug)]
pub struct Gpu {
    open: Arc<Open>,
}

impl Gpu {
    /// Opens `device` and loads its kernels.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(device: Device) -> Result<Self, OpenError> {
        let runtime = Runtime::open(device)?;
        let kernels = Kernels::load(&runtime)?;
        let compute_units = runtime.info()?.compute_units;
        Ok(Self { open: Arc::new(Open { runtime, kernels, compute_units }) })
    }

    /// The device.
    pub fn device(&self) -> Device {
        self.open.runtime.device()
    }

    /// Its memory and streams.
    pub fn runtime(&self) -> &Runtime {
        &self.open.runtime
    }

    /// Its kernels.
    pub fn kernels(&self) -> &Kernels {
        &self.open.kernels
    }

    /// Its multiprocessors.
    pub fn compute_units(&self) -> u32 {
        self.open.compute_units
    }

    /// The stream that a call lends.
    ///
    /// # Errors
    /// [`LentError::Stream`].
    pub fn stream(&self, lent: Stream) -> Result<device_runtime::Stream, LentError> {
        let wrong = LentError::Stream { device: self.device(), found: lent };
        match lent {
            Stream::Device(stream) => self.runtime().borrow_stream(stream).map_err(|_| wrong),
            _ => Err(wrong),
        }
    }

    /// The address of a lent tensor of `dims` elements of `dtype` without gaps, aligned to 16 bytes.
    ///
    /// # Errors
    /// [`LentError::Tensor`].
    pub fn address(
        &self,
        tensor: &'static str,
        view: TensorView<'_>,
        dims: &[usize],
        dtype: DType,
    ) -> Result<u64, LentError> {
        let (address, _) = self.rows(tensor, view, dims, dtype)?;
        if view.layout().is_contiguous() {
            return self.aligned(tensor, address);
        }
        let found = format!("{dims:?} with strides {:?}", view.layout().strides());
        Err(LentError::Tensor { tensor, found, wanted: "no gaps".into() })
    }

    /// `address`, if it is a multiple of 16, as kernels take it.
    ///
    /// # Errors
    /// [`LentError::Tensor`].
    pub fn aligned(&self, tensor: &'static str, address: u64) -> Result<u64, LentError> {
        if address.is_multiple_of(ALIGN) {
            return Ok(address);
        }
        let wanted = format!("an address that is a multiple of {ALIGN}");
        Err(LentError::Tensor { tensor, found: format!("at {address:#x}"), wanted })
    }

    /// The address of a matrix that may have gaps between its rows, at any address, and from one row to the next in elements.
    ///
    /// # Errors
    /// [`LentError::Tensor`].
    pub fn rows(
        &self,
        tensor: &'static str,
        view: TensorView<'_>,
        dims: &[usize],
        dtype: DType,
    ) -> Result<(u64, usize), LentError> {
        let (device, layout) = (self.device(), view.layout());
        let wanted = || format!("{dims:?} of {dtype} on {device}");
        if view.dims() != dims || view.dtype() != dtype || view.device() != device {
            let found = format!("{:?} of {} on {}", view.dims(), view.dtype(), view.device());
            return Err(LentError::Tensor { tensor, found, wanted: wanted() });
        }
        let address = view.address();
        if layout.num_elements() == 0 {
            return Ok((address as u64, 0));
        }
        let (strides, row) = (layout.strides(), dims.last().copied().unwrap_or(1));
        let has_rows = dims.len() == 2 && (row == 1 || strides[1] == 1);
        if !layout.is_contiguous() && !has_rows {
            let found = format!("{dims:?} with strides {strides:?}");
            return Err(LentError::Tensor { tensor, found, wanted: "rows without gaps".into() });
        }
        Ok((address as u64, if dims.len() == 2 { strides[0] } else { row }))
    }
}

/// The device that providers are made for: open, or the reason why it is not, which they refuse with.
#[derive(Clone, Debug)]
pub struct Target {
    kind: DeviceKind,
    gpu: Result<Gpu, OpenError>,
}

impl Target {
    /// Opens `device`. That it cannot be opened is no error here: providers say so when they are asked.
    pub fn open(device: Device) -> Self {
        Self { kind: device.kind, gpu: Gpu::open(device) }
    }

    /// What kind of device it is.
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// The open device.
    ///
    /// # Errors
    /// Why it is not.
    pub fn gpu(&self) -> Result<&Gpu, &OpenError> {
        self.gpu.as_ref()
    }

    /// What is against running there: that it is not open, or not of `arches`.
    pub fn refusal(&self, arches: &[Arch]) -> Option<Unsupported> {
        let names = || arches.iter().map(|arch| arch.name()).collect::<Vec<_>>().join(" or ");
        match &self.gpu {
            Ok(gpu) if arches.contains(&gpu.kernels().arch()) => None,
            Ok(gpu) => Some(Unsupported::new(Axis::Device, names(), gpu.kernels().arch().name())),
            Err(error) => Some(Unsupported::new(Axis::Device, names(), error.to_string())),
        }
    }
}

impl From<Gpu> for Target {
    fn from(gpu: Gpu) -> Self {
        Self { kind: gpu.device().kind, gpu: Ok(gpu) }
    }
}
