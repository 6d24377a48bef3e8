//! What can be wrong with a folder of AITER's objects.

use std::path::PathBuf;

use device_runtime::DeviceError;

use crate::arch::Arch;
use crate::metadata::MetadataError;

/// Why AITER's objects cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AiterCoError {
    /// A file cannot be read.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: std::io::Error,
    },
    /// A manifest is not what AITER writes.
    #[error("{}, line {line}: {what}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong there.
        what: String,
    },
    /// There are no objects for this device.
    #[error("AITER has no one-stage objects for {arch}")]
    NoArch {
        /// The device.
        arch: Arch,
    },
    /// No tile divides the intermediate size.
    #[error("intermediate size {intermediate} is a multiple of no tile: there are {tiles:?}")]
    NoTile {
        /// The intermediate size.
        intermediate: usize,
        /// Columns of the tiles.
        tiles: Vec<u32>,
    },
    /// The metadata of an object cannot be had.
    #[error("{}: {cause}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: MetadataError,
    },
    /// An object lacks the kernel that the manifest names.
    #[error("{} has no kernel {kernel}", path.display())]
    NoKernel {
        /// The file.
        path: PathBuf,
        /// The kernel.
        kernel: String,
    },
    /// A kernel takes other arguments than [`FusedMoeParams`](super::FusedMoeParams).
    #[error("{}: {mismatch}", path.display())]
    Arguments {
        /// The file.
        path: PathBuf,
        /// The first difference.
        #[source]
        mismatch: Box<ArgumentMismatch>,
    },
    /// An object is for another device.
    #[error("{} is for {found}, not {wanted}", path.display())]
    WrongArch {
        /// The file.
        path: PathBuf,
        /// What it is for.
        found: Arch,
        /// What it should be for.
        wanted: String,
    },
    /// The driver refuses.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// How the arguments of a kernel differ from what would be passed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArgumentMismatch {
    /// Another number of bytes altogether.
    #[error("{kernel} takes {found} bytes of arguments, not {wanted}")]
    Bytes {
        /// The kernel.
        kernel: String,
        /// What it takes.
        found: usize,
        /// What would be passed.
        wanted: usize,
    },
    /// Another argument at its place.
    #[error(
        "{kernel}: argument {index} is {:?} of {} bytes at {}, not {:?} of {} bytes at {}",
        found.0, found.2, found.1, wanted.0, wanted.2, wanted.1
    )]
    Argument {
        /// The kernel.
        kernel: String,
        /// Counted from 0, without padding.
        index: usize,
        /// Its name, offset and size in bytes.
        found: (String, usize, usize),
        /// Name, offset and size in bytes that would be passed.
        wanted: (String, usize, usize),
    },
    /// More or fewer arguments.
    #[error("{kernel} takes {found} arguments, not {wanted}")]
    Count {
        /// The kernel.
        kernel: String,
        /// How many it takes.
        found: usize,
        /// How many would be passed.
        wanted: usize,
    },
    /// Blocks cannot have as many threads as a launch gives them.
    #[error("blocks of {kernel} have at most {found} threads, not {wanted}")]
    Block {
        /// The kernel.
        kernel: String,
        /// Most threads of a block.
        found: usize,
        /// Threads that a launch gives it.
        wanted: usize,
    },
}
