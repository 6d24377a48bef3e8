//! Backends whose tensors lie on a device: inputs are uploaded, outputs poisoned there and downloaded.

use fused_moe_core::{DType, DeviceAllocator, Source, Stream, TensorView, TensorViewMut, Workspace};

use crate::outcome::{Check, chain, fail};

/// A device that the suite can run on. Everything but a replay waits until it has been done.
pub trait TestDevice: Send + Sync + std::fmt::Debug {
    /// What allocates there.
    fn memory(&self) -> &dyn DeviceAllocator;

    /// The stream that calls are given.
    fn stream(&self) -> Stream;

    /// Copies `bytes` to the front of `to`.
    ///
    /// # Errors
    /// Of the device.
    fn write(&self, to: &mut Workspace, bytes: &[u8]) -> Result<(), Source>;

    /// Waits for the stream, and copies the front of `from`.
    ///
    /// # Errors
    /// Of the device, and of what ran before.
    fn read(&self, from: &Workspace, bytes: &mut [u8]) -> Result<(), Source>;

    /// Records what `body` puts on the stream, without running it.
    ///
    /// # Errors
    /// Of `body`, and of the device: for one if `body` waits or allocates there.
    fn record(&self, body: &mut dyn FnMut() -> Result<(), Source>) -> Result<Box<dyn Replay + '_>, Source>;
}

/// Work that was recorded.
pub trait Replay {
    /// Puts it on the stream.
    ///
    /// # Errors
    /// Of the device.
    fn replay(&self) -> Result<(), Source>;
}

/// A tensor on a device.
pub(crate) struct Placed {
    memory: Workspace,
    dtype: DType,
    dims: Vec<usize>,
}

/// Ends a check with an error of the device.
pub(crate) fn on_device<T>(result: Result<T, Source>) -> Check<T> {
    result.or_else(|error| fail(format!("the device fails: {}", chain(&*error))))
}

impl Placed {
    /// `bytes`, uploaded as a contiguous tensor.
    pub(crate) fn upload(
        device: &dyn TestDevice,
        bytes: &[u8],
        (dtype, dims): (DType, &[usize]),
    ) -> Check<Self> {
        let mut memory = Workspace::on(device.memory(), bytes.len()).or_else(|e| fail(chain(&e)))?;
        on_device(device.write(&mut memory, bytes))?;
        Ok(Self { memory, dtype, dims: dims.to_vec() })
    }

    /// A tensor all of whose bytes are `byte`.
    pub(crate) fn filled(device: &dyn TestDevice, byte: u8, (dtype, dims): (DType, &[usize])) -> Check<Self> {
        Self::upload(device, &vec![byte; bytes(dtype, dims)], (dtype, dims))
    }

    /// Overwrites it.
    pub(crate) fn write(&mut self, device: &dyn TestDevice, bytes: &[u8]) -> Check {
        on_device(device.write(&mut self.memory, bytes))
    }

    /// Its bytes, once all work on the stream has been done.
    pub(crate) fn download(&self, device: &dyn TestDevice) -> Check<Vec<u8>> {
        let mut found = vec![0; bytes(self.dtype, &self.dims)];
        on_device(device.read(&self.memory, &mut found))?;
        Ok(found)
    }

    pub(crate) fn view(&self) -> Check<TensorView<'_>> {
        self.memory.tensor(self.dtype, &self.dims).or_else(fail)
    }

    pub(crate) fn view_mut(&mut self) -> Check<TensorViewMut<'_>> {
        self.memory.tensor_mut(self.dtype, &self.dims).or_else(fail)
    }
}

fn bytes(dtype: DType, dims: &[usize]) -> usize {
    dims.iter().product::<usize>() * dtype.size_bytes()
}

/// The bytes of elements, as they lie in memory.
pub(crate) trait Bytes {
    fn to_bytes(&self) -> Vec<u8>;
}

macro_rules! bytes_of {
    ($($element:ty),*) => {
        $(impl Bytes for [$element] {
            fn to_bytes(&self) -> Vec<u8> {
                self.iter().flat_map(|x| x.to_ne_bytes()).collect()
            }
        })*
    };
}

bytes_of!(f32, i32, u8, half::bf16);
