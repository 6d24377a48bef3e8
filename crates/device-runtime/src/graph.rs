//! Recorded work.

use std::sync::Arc;

use crate::driver::{Driver, Handle};
use crate::error::DeviceResult;
use crate::stream::Stream;

/// Work that was recorded once, with the addresses that it had then, and can be done again and again.
#[derive(Debug)]
pub struct Graph {
    driver: Arc<dyn Driver>,
    handle: Handle,
}

impl Graph {
    pub(crate) fn new(driver: &Arc<dyn Driver>, handle: Handle) -> Self {
        Self { driver: Arc::clone(driver), handle }
    }

    /// Puts the work on `stream`. Waits for nothing.
    ///
    /// # Errors
    /// Of the driver.
    ///
    /// # Safety
    /// What was recorded is still what it was: memory and kernels are there.
    pub unsafe fn replay(&self, stream: &Stream) -> DeviceResult<()> {
        // SAFETY: graph and stream are alive; the caller vouches for the rest.
        unsafe { self.driver.replay(self.handle, stream.handle()) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: nobody else has the handle.
        if let Err(error) = unsafe { self.driver.destroy_graph(self.handle) } {
            tracing::warn!(%error, "a graph is lost");
        }
    }
}
