//! Objects of AITER, read, checked and loaded.

use device_runtime::{Dims, Kernel, Runtime, Stream};

use super::arguments::{THREADS, check_arguments};
use super::error::AiterCoError;
use super::manifest::Tile;
use super::moe::OneStageLaunch;
use crate::launch::KernelParams;
use crate::metadata::CodeObject;

/// An object whose kernel takes a [`FusedMoeParams`](super::FusedMoeParams).
#[derive(Clone, Debug)]
pub struct AiterObject {
    tile: Tile,
    image: Vec<u8>,
}

impl AiterObject {
    pub(super) fn read(tile: &Tile) -> Result<Self, AiterCoError> {
        let path = || tile.path.clone();
        let image = std::fs::read(&tile.path).map_err(|cause| AiterCoError::Read { path: path(), cause })?;
        let object =
            CodeObject::parse(&image).map_err(|cause| AiterCoError::Metadata { path: path(), cause })?;
        if object.arch != tile.arch {
            let wanted = tile.arch.name().to_owned();
            return Err(AiterCoError::WrongArch { path: path(), found: object.arch, wanted });
        }
        let kernel = object
            .kernel(&tile.kernel)
            .ok_or_else(|| AiterCoError::NoKernel { path: path(), kernel: tile.kernel.clone() })?;
        check_arguments(kernel)
            .map_err(|mismatch| AiterCoError::Arguments { path: path(), mismatch: Box::new(mismatch) })?;
        Ok(Self { tile: tile.clone(), image })
    }
}

/// A kernel of AITER on one device. Launching it allocates nothing and waits for nothing.
#[derive(Clone, Debug)]
pub struct OneStageKernel {
    kernel: Kernel,
}

impl OneStageKernel {
    /// Loads an object.
    ///
    /// # Errors
    /// [`AiterCoError::WrongArch`] if the device is not what it is for, and of the driver.
    pub fn load(runtime: &Runtime, object: &AiterObject) -> Result<Self, AiterCoError> {
        let Tile { arch, path, kernel, .. } = &object.tile;
        let device = runtime.info()?.arch;
        // Features such as `:sramecc+` follow the name.
        if device.split(':').next() != Some(arch.name()) {
            return Err(AiterCoError::WrongArch { path: path.clone(), found: *arch, wanted: device });
        }
        Ok(Self { kernel: runtime.load(&object.image)?.kernel(kernel)? })
    }

    /// Puts a run on `stream`.
    ///
    /// # Errors
    /// Of the driver.
    ///
    /// # Safety
    /// The launch is of the tile that this was loaded from; its buffers are as [`MoeBuffers`](super::MoeBuffers) says, in memory
    /// of this device, stay there until it has run, and nothing else uses them meanwhile.
    pub unsafe fn launch(&self, launch: &OneStageLaunch, stream: &Stream) -> Result<(), AiterCoError> {
        let dims = Dims { grid: launch.grid, block: THREADS, shared_bytes: 0 };
        // SAFETY: `check_arguments` has held the params against the object; the caller vouches for the memory.
        unsafe { self.kernel.launch(dims, stream, launch.params.as_bytes())? };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::arguments::tests::metadata;
    use super::super::manifest::tests::{folder, read};
    use super::*;
    use crate::metadata::tests::object;

    const TABLE: &str =
        "knl_name,knl_file,atm,vskip,smf,tg_num_perCU,ps,subGU_m,subGU_n\nk,k.co,0,1,0,1,1,32,256\n";

    /// What becomes of an object with this image, which the table says is for gfx942 and has kernel `k`.
    fn read_object(image: &[u8]) -> Result<AiterObject, AiterCoError> {
        let hsa = folder(TABLE);
        let tile = read(&hsa).unwrap().tiles.remove(0);
        fs::write(&tile.path, image).unwrap();
        tile.object()
    }

    #[test]
    fn an_object_is_checked_before_it_is_loaded() {
        let image = object(0x54c, &metadata("k", 448, |_| ()));
        assert_eq!(read_object(&image).unwrap().image, image);
        for (image, said) in [
            (b"".to_vec(), "not an ELF file"),
            (object(0x54f, &metadata("k", 448, |_| ())), "k.co is for gfx950, not gfx942"),
            (object(0x54c, &metadata("l", 448, |_| ())), "k.co has no kernel k"),
            (object(0x54c, &metadata("k", 464, |_| ())), "k.co: k takes 464 bytes of arguments, not 448"),
        ] {
            let error = read_object(&image).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn an_object_that_is_not_there_is_named() {
        let tile = read(&folder(TABLE)).unwrap().tiles.remove(0);
        let error = tile.object().unwrap_err().to_string();
        assert!(error.starts_with("cannot read ") && error.contains("k.co"), "{error}");
    }
}
