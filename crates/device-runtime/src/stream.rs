//! Streams and events.

use std::sync::Arc;
use std::time::Duration;

use fused_moe_core::DeviceStream;

use crate::driver::{Driver, Handle};
use crate::error::DeviceResult;
use crate::graph::Graph;

/// The order in which a device works: one's own, or lent by an engine.
#[derive(Debug)]
pub struct Stream {
    pub(crate) driver: Arc<dyn Driver>,
    handle: Handle,
    is_own: bool,
}

impl Stream {
    pub(crate) fn new(driver: &Arc<dyn Driver>) -> DeviceResult<Self> {
        Ok(Self { driver: Arc::clone(driver), handle: driver.create_stream()?, is_own: true })
    }

    pub(crate) fn lent(driver: &Arc<dyn Driver>, handle: u64) -> Self {
        Self { driver: Arc::clone(driver), handle, is_own: false }
    }

    /// The raw handle (`CUstream`, `hipStream_t`).
    pub fn handle(&self) -> u64 {
        self.handle
    }

    /// Waits on the host until all work is done.
    ///
    /// # Errors
    /// Of the driver; failures of kernels come up here.
    pub fn wait(&self) -> DeviceResult<()> {
        // SAFETY: the stream is alive.
        unsafe { self.driver.wait_stream(self.handle) }
    }

    /// The stream as calls of a layer take it.
    ///
    /// # Safety
    /// As [`DeviceStream::new`]: nothing is called with it once `self` is gone.
    pub unsafe fn lend(&self) -> DeviceStream {
        // SAFETY: the handle is of this device's primary context; the caller vouches for the rest.
        unsafe { DeviceStream::new(self.driver.device(), self.handle) }
    }

    /// Copies `rows` rows of `row_bytes` bytes in the device's memory, from and to addresses with their distance from one row
    /// to the next in bytes, which is `row_bytes` at least. Waits for nothing.
    ///
    /// # Errors
    /// Of the driver.
    ///
    /// # Safety
    /// Both are memory of this device that stays there until the copy has been done, and nothing else writes it meanwhile.
    pub unsafe fn copy_rows(
        &self,
        to: (u64, usize),
        from: (u64, usize),
        rows: usize,
        row_bytes: usize,
    ) -> DeviceResult<()> {
        if rows == 0 || row_bytes == 0 {
            return Ok(());
        }
        // One piece is a plain copy, which has no limit to the distance of rows.
        if rows == 1 || (to.1 == row_bytes && from.1 == row_bytes) {
            // SAFETY: the stream is alive; the caller vouches for the memory.
            return unsafe { self.driver.copy(to.0, from.0, rows * row_bytes, self.handle) };
        }
        // SAFETY: as above.
        unsafe { self.driver.copy_rows(to, from, (rows, row_bytes), self.handle) }
    }

    /// Sets `bytes` bytes from `to` on. Waits for nothing.
    ///
    /// # Errors
    /// Of the driver.
    ///
    /// # Safety
    /// As [`Stream::copy_rows`].
    pub unsafe fn fill(&self, to: u64, byte: u8, bytes: usize) -> DeviceResult<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as in `copy_rows`.
        unsafe { self.driver.fill(to, byte, bytes, self.handle) }
    }

    /// Lets later work on this stream wait for `event`, without the host.
    ///
    /// # Errors
    /// Of the driver.
    pub fn wait_for(&self, event: &Event) -> DeviceResult<()> {
        // SAFETY: both are alive.
        unsafe { self.driver.stream_waits(self.handle, event.handle) }
    }

    /// Records the work that `body` puts on this stream, instead of doing it. If `body` fails, so does this.
    ///
    /// # Errors
    /// Of `body`, or of the driver: for one if `body` waits for the device, or allocates.
    pub fn capture<E: From<crate::DeviceError>>(
        &self,
        body: impl FnOnce(&Stream) -> Result<(), E>,
    ) -> Result<Graph, E> {
        // SAFETY: the stream is alive.
        unsafe { self.driver.begin_capture(self.handle)? };
        let done = body(self);
        // SAFETY: the stream is alive and records. It must stop doing so even if `body` has failed.
        let graph = unsafe { self.driver.end_capture(self.handle) };
        match (done, graph) {
            (Ok(()), graph) => Ok(Graph::new(&self.driver, graph?)),
            (Err(error), graph) => {
                drop(graph.map(|handle| Graph::new(&self.driver, handle)));
                Err(error)
            }
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.is_own {
            return;
        }
        // SAFETY: nobody else has the handle; a driver ends the work that is left first.
        if let Err(error) = unsafe { self.driver.destroy_stream(self.handle) } {
            tracing::warn!(%error, "a stream is lost");
        }
    }
}

/// A point in the order of a stream.
#[derive(Debug)]
pub struct Event {
    driver: Arc<dyn Driver>,
    handle: Handle,
}

impl Event {
    pub(crate) fn new(driver: &Arc<dyn Driver>) -> DeviceResult<Self> {
        Ok(Self { driver: Arc::clone(driver), handle: driver.create_event()? })
    }

    /// Sets it behind what is on `stream` now.
    ///
    /// # Errors
    /// Of the driver.
    pub fn record(&mut self, stream: &Stream) -> DeviceResult<()> {
        // SAFETY: both are alive.
        unsafe { self.driver.record(self.handle, stream.handle) }
    }

    /// Waits for both, and says how much later than `earlier` this one came.
    ///
    /// # Errors
    /// Of the driver, for one if one of them was never recorded.
    pub fn elapsed(&self, earlier: &Event) -> DeviceResult<Duration> {
        // SAFETY: both are alive.
        let milliseconds = unsafe { self.driver.elapsed(earlier.handle, self.handle)? };
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: nobody else has the handle.
        if let Err(error) = unsafe { self.driver.destroy_event(self.handle) } {
            tracing::warn!(%error, "an event is lost");
        }
    }
}
