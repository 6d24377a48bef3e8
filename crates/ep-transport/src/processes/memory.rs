//! Memory that processes share: anonymous files, which vanish with the last process that has them.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::watch::Watch;
use crate::segment::Segment;
use crate::shared::{Group, Offer, Substrate};
use crate::symmetric::HeapSize;

/// How often a group can shrink. Control segments lie one behind the other in one file, of which only those in use
/// cost memory.
const GENERATIONS: u32 = 256;

/// Where other processes find an anonymous file of this one.
///
/// The way is `/proc/PID/fd/N`: it needs no connection between two ranks, so nothing that blocks or is left behind,
/// and only processes of the same user can go it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileAddress {
    pid: u32,
    fd: u32,
    device: u64,
    inode: u64,
}

impl FileAddress {
    /// Bytes of an encoded address.
    pub(super) const BYTES: usize = 24;

    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.pid.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.fd.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.device.to_le_bytes());
        bytes[16..].copy_from_slice(&self.inode.to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (pid, rest) = bytes.split_first_chunk()?;
        let (fd, rest) = rest.split_first_chunk()?;
        let (device, rest) = rest.split_first_chunk()?;
        let inode = rest.first_chunk()?;
        Some(Self {
            pid: u32::from_le_bytes(*pid),
            fd: u32::from_le_bytes(*fd),
            device: u64::from_le_bytes(*device),
            inode: u64::from_le_bytes(*inode),
        })
    }

    /// Opens the file.
    pub(super) fn open(self) -> io::Result<File> {
        let path = format!("/proc/{}/fd/{}", self.pid, self.fd);
        let is_it =
            |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino()) == (self.device, self.inode);
        // Once before opening, as opening what the number now stands for might block or worse; and once after, as
        // it might have changed meanwhile.
        if !is_it(std::fs::metadata(&path)?) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let file = File::options().read(true).write(true).open(&path)?;
        if is_it(file.metadata()?) { Ok(file) } else { Err(io::ErrorKind::NotFound.into()) }
    }
}

/// A zeroed anonymous file of `bytes`. No process can change its size, so no access to a mapping can fail for that.
pub(super) fn create_file(bytes: u64) -> io::Result<OwnedFd> {
    let fd = memfd_create("fused-moe", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, bytes)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// Where other processes find `file` as long as it is open.
pub(super) fn address_of(file: &OwnedFd) -> io::Result<FileAddress> {
    let stat = rustix::fs::fstat(file)?;
    Ok(FileAddress {
        pid: std::process::id(),
        fd: file.as_raw_fd() as u32,
        device: stat.st_dev,
        inode: stat.st_ino,
    })
}

/// Bytes of the file with the control segments of a group that begins with segments of `size`.
pub(super) fn control_bytes(size: HeapSize) -> u64 {
    (size.required_bytes() as u64).saturating_mul(u64::from(GENERATIONS))
}

/// What the processes of a group have of each other.
#[derive(Debug)]
pub(super) struct Processes {
    /// The file with the control segments.
    control: File,
    /// Bytes from one control segment to the next.
    stride: usize,
    /// The processes, by their rank in the first generation.
    pidfds: Arc<[OwnedFd]>,
}

impl Processes {
    /// The group with the file `control` for segments of `size` and the processes `pidfds`.
    pub(super) fn new(control: File, size: HeapSize, pidfds: Arc<[OwnedFd]>) -> Self {
        Self { control, stride: size.required_bytes(), pidfds }
    }
}

impl Substrate for Processes {
    fn offer(&self, size: HeapSize) -> Option<Offer> {
        let offered = || -> io::Result<Offer> {
            let bytes = size.required_bytes();
            if bytes > isize::MAX as usize {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            let file = create_file(bytes as u64)?;
            let segment = Arc::new(Segment::map_shared(file.as_fd(), 0, size)?);
            let address = address_of(&file)?.to_bytes().to_vec();
            Ok(Offer { segment, address, _keep: Box::new(file) })
        };
        offered().inspect_err(|error| tracing::warn!(%size, %error, "no memory for a heap")).ok()
    }

    fn take(&self, address: &[u8], size: HeapSize) -> io::Result<Arc<Segment>> {
        let address = FileAddress::from_bytes(address).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Arc::new(Segment::map_shared(address.open()?.as_fd(), 0, size)?))
    }

    fn control(&self, generation: u32, size: HeapSize) -> io::Result<Arc<Segment>> {
        if generation >= GENERATIONS {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let offset = u64::from(generation) * self.stride as u64;
        Ok(Arc::new(Segment::map_shared(self.control.as_fd(), offset, size)?))
    }

    fn watch(&self, group: &Arc<Group>) -> io::Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(Watch::start(Arc::clone(group), Arc::clone(&self.pidfds))?))
    }
}
