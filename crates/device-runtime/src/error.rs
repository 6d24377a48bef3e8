//! What goes wrong with devices.

use fused_moe_core::{Device, DeviceKind};

/// A device cannot be used: no driver, no such device, or not this build.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no {kind:?} device: {cause} (tried {})", tried.join(", "))]
pub struct Unavailable {
    /// What kind was asked for.
    pub kind: DeviceKind,
    /// What was tried, in order.
    pub tried: Vec<String>,
    /// Why none of it worked.
    pub cause: String,
}

/// A call of a driver failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{device}: {call}: {text} ({code})")]
pub struct DeviceError {
    /// The device.
    pub device: Device,
    /// The call, as the driver names it.
    pub call: &'static str,
    /// Its code, as the driver numbers them.
    pub code: i32,
    /// What the driver says of the code.
    pub text: String,
}

/// Result of a call of a driver.
pub type DeviceResult<T> = Result<T, DeviceError>;
