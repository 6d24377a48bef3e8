//! The code objects that were there when this crate was built.

use crate::arch::Arch;

struct Object {
    arch: &'static str,
    name: &'static str,
    image: &'static [u8],
}

static OBJECTS: &[Object] = &include!(concat!(env!("OUT_DIR"), "/objects.rs"));

/// A code object is not in this build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no code object {name} for {arch} in this build: run `cargo xtask kernels build --arch {arch}` and build again"
)]
pub struct NoObject {
    /// Its name, that of a source file.
    pub name: &'static str,
    /// The device.
    pub arch: Arch,
}

/// The image of code object `name`: what `cuModuleLoadData` or `hipModuleLoadData` loads.
///
/// # Errors
/// [`NoObject`] if it was not there when this crate was built.
pub fn object(arch: Arch, name: &'static str) -> Result<&'static [u8], NoObject> {
    let found = OBJECTS.iter().find(|object| object.arch == arch.name() && object.name == name);
    found.map(|object| object.image).ok_or(NoObject { name, arch })
}

/// Names of all objects for `arch`.
pub fn objects(arch: Arch) -> impl Iterator<Item = &'static str> {
    OBJECTS.iter().filter(move |object| object.arch == arch.name()).map(|object| object.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_that_is_not_there_says_how_to_make_it() {
        let error = object(Arch::Gfx942, "no_such_kernel").unwrap_err().to_string();
        assert!(error.contains("no_such_kernel for gfx942"), "{error}");
        assert!(error.contains("cargo xtask kernels build --arch gfx942"), "{error}");
    }

    /// A build may have any of them, and every one can be had by its name.
    #[test]
    fn what_is_listed_is_there() {
        for arch in Arch::ALL {
            for name in objects(arch) {
                let image = object(arch, name).unwrap();
                assert_eq!(&image[..4], b"\x7fELF", "{name} for {arch}");
            }
        }
    }
}
