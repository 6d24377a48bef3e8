//! What a code object of AMD says about its kernels, in a note of MessagePack (`NT_AMDGPU_METADATA`, LLVM's "User Guide for
//! AMDGPU Backend").

use object::LittleEndian;
use object::elf::{EM_AMDGPU, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader};
use rmpv::Value;

use crate::arch::Arch;

/// Type of the note, and whose it is.
const NOTE: (u32, &[u8]) = (32, b"AMDGPU");

/// Why the metadata of an object cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// Not a 64-bit little-endian ELF file, or a broken one.
    #[error("not an ELF file of 64 bits: {0}")]
    Elf(String),
    /// For another machine.
    #[error("ELF machine {found}, not AMDGPU ({EM_AMDGPU})")]
    Machine {
        /// `e_machine` of the file.
        found: u16,
    },
    /// For a device of AMD that no kernel here is for.
    #[error("ELF flags {flags:#x} are neither of gfx942 nor of gfx950")]
    UnknownArch {
        /// `e_flags` of the file.
        flags: u32,
    },
    /// There is no note with metadata.
    #[error("no AMDGPU metadata note")]
    NoNote,
    /// The note is not MessagePack.
    #[error("metadata note of {bytes} bytes: {cause}")]
    MessagePack {
        /// Its size.
        bytes: usize,
        /// What is wrong.
        cause: String,
    },
    /// A field is missing, or is of another type.
    #[error("{of}: no {wanted} {field}")]
    Field {
        /// Kernel or map that should have it.
        of: String,
        /// The field.
        field: &'static str,
        /// Its type.
        wanted: &'static str,
    },
}

/// A code object of AMD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeObject {
    /// The device that it is for.
    pub arch: Arch,
    /// Its kernels.
    pub kernels: Vec<KernelMetadata>,
}

/// What an object says about one of its kernels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelMetadata {
    /// By which it is loaded.
    pub name: String,
    /// Bytes of its arguments.
    pub kernarg_bytes: usize,
    /// Its arguments in order, those without a name too.
    pub arguments: Vec<Argument>,
    /// Bytes of static shared memory of a block.
    pub lds_bytes: usize,
    /// Bytes of stack of a lane.
    pub stack_bytes: usize,
    /// Registers that were spilled, scalar and vector. Assemblers do not say; that counts as 0.
    pub spills: usize,
    /// Most threads of a block.
    pub max_block: usize,
    /// Lanes of a wave.
    pub wave: usize,
}

/// An argument of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Empty if the object gives none.
    pub name: String,
    /// Bytes in front of it.
    pub offset: usize,
    /// Its bytes.
    pub size: usize,
}

impl CodeObject {
    /// Reads `image`, a linked code object.
    ///
    /// # Errors
    /// [`MetadataError`].
    pub fn parse(image: &[u8]) -> Result<Self, MetadataError> {
        let elf = |error: object::read::Error| MetadataError::Elf(error.to_string());
        let header = FileHeader64::<LittleEndian>::parse(image).map_err(elf)?;
        let endian = header.endian().map_err(elf)?;
        let machine = header.e_machine(endian);
        if machine != EM_AMDGPU {
            return Err(MetadataError::Machine { found: machine });
        }
        let flags = header.e_flags(endian);
        // The low byte is the processor.
        let arch = match flags & 0xff {
            0x4c => Arch::Gfx942,
            0x4f => Arch::Gfx950,
            _ => return Err(MetadataError::UnknownArch { flags }),
        };
        // What a loader reads; sections may be stripped.
        for segment in header.program_headers(endian, image).map_err(elf)? {
            let Some(mut notes) = segment.notes(endian, image).map_err(elf)? else { continue };
            while let Some(note) = notes.next().map_err(elf)? {
                if (note.n_type(endian), note.name()) == NOTE {
                    return Ok(Self { arch, kernels: kernels(note.desc())? });
                }
            }
        }
        Err(MetadataError::NoNote)
    }

    /// The kernel of this name.
    pub fn kernel(&self, name: &str) -> Option<&KernelMetadata> {
        self.kernels.iter().find(|kernel| kernel.name == name)
    }
}

fn kernels(note: &[u8]) -> Result<Vec<KernelMetadata>, MetadataError> {
    let read = rmpv::decode::read_value(&mut &*note);
    let metadata =
        read.map_err(|error| MetadataError::MessagePack { bytes: note.len(), cause: error.to_string() })?;
    Fields { of: "metadata", map: &metadata }.list("amdhsa.kernels")?.iter().map(kernel).collect()
}

fn kernel(map: &Value) -> Result<KernelMetadata, MetadataError> {
    let name = Fields { of: "a kernel", map }.text(".name")?;
    let fields = Fields { of: name, map };
    let argument = |map| {
        let argument = Fields { of: name, map };
        Ok(Argument {
            name: argument.find(".name").and_then(Value::as_str).unwrap_or_default().to_owned(),
            offset: argument.number(".offset")?,
            size: argument.number(".size")?,
        })
    };
    let spilled = |field| if fields.find(field).is_some() { fields.number(field) } else { Ok(0) };
    Ok(KernelMetadata {
        name: name.to_owned(),
        kernarg_bytes: fields.number(".kernarg_segment_size")?,
        arguments: fields.list(".args")?.iter().map(argument).collect::<Result<_, _>>()?,
        lds_bytes: fields.number(".group_segment_fixed_size")?,
        stack_bytes: fields.number(".private_segment_fixed_size")?,
        spills: spilled(".sgpr_spill_count")? + spilled(".vgpr_spill_count")?,
        max_block: fields.number(".max_flat_workgroup_size")?,
        wave: fields.number(".wavefront_size")?,
    })
}

/// A map, and what errors call it.
#[derive(Clone, Copy)]
struct Fields<'v> {
    of: &'v str,
    map: &'v Value,
}

impl<'v> Fields<'v> {
    fn find(self, field: &str) -> Option<&'v Value> {
        self.map.as_map()?.iter().find(|(key, _)| key.as_str() == Some(field)).map(|(_, value)| value)
    }

    fn get<T>(
        self,
        field: &'static str,
        wanted: &'static str,
        read: impl FnOnce(&'v Value) -> Option<T>,
    ) -> Result<T, MetadataError> {
        let value = self.find(field).and_then(read);
        value.ok_or_else(|| MetadataError::Field { of: self.of.to_owned(), field, wanted })
    }

    fn number(self, field: &'static str) -> Result<usize, MetadataError> {
        self.get(field, "number", |value| usize::try_from(value.as_u64()?).ok())
    }

    fn text(self, field: &'static str) -> Result<&'v str, MetadataError> {
        self.get(field, "text", Value::as_str)
    }

    fn list(self, field: &'static str) -> Result<&'v [Value], MetadataError> {
        self.get(field, "list", |value| value.as_array().map(Vec::as_slice))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const GFX942: u32 = 0x54c;
    const AT_NOTE: usize = 64 + 56;

    /// An object with nothing but a note: `[header, program header, note]`.
    pub(crate) fn object(flags: u32, metadata: &Value) -> Vec<u8> {
        let mut desc = Vec::new();
        rmpv::encode::write_value(&mut desc, metadata).unwrap();
        let mut note = Vec::new();
        for word in [7, desc.len() as u32, NOTE.0] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"AMDGPU\0\0");
        note.extend(&desc);
        note.resize(note.len().next_multiple_of(4), 0);

        let mut image = b"\x7fELF\x02\x01\x01\x40".to_vec();
        image.resize(16, 0);
        image.extend(3u16.to_le_bytes());
        image.extend(EM_AMDGPU.to_le_bytes());
        image.extend(1u32.to_le_bytes());
        // Entry, then where program headers and section headers are.
        for word in [0u64, 64, 0] {
            image.extend(word.to_le_bytes());
        }
        image.extend(flags.to_le_bytes());
        for half in [64u16, 56, 1, 0, 0, 0] {
            image.extend(half.to_le_bytes());
        }
        // Type 4 (notes), flags; offset, two addresses, two sizes, alignment.
        for word in [4u32, 4] {
            image.extend(word.to_le_bytes());
        }
        for word in [AT_NOTE as u64, 0, 0, note.len() as u64, note.len() as u64, 4] {
            image.extend(word.to_le_bytes());
        }
        assert_eq!(image.len(), AT_NOTE);
        image.extend(&note);
        image
    }

    /// A map of MessagePack.
    pub(crate) fn map(entries: Vec<(&str, Value)>) -> Value {
        Value::Map(entries.into_iter().map(|(key, value)| (key.into(), value)).collect())
    }

    /// Metadata of one kernel with these arguments: name, offset, size.
    pub(crate) fn one_kernel(name: &str, kernarg_bytes: usize, arguments: &[(&str, usize, usize)]) -> Value {
        let argument = |&(name, offset, size): &(&str, usize, usize)| {
            map(vec![(".name", name.into()), (".offset", offset.into()), (".size", size.into())])
        };
        let kernel = map(vec![
            (".name", name.into()),
            (".kernarg_segment_size", kernarg_bytes.into()),
            (".args", Value::Array(arguments.iter().map(argument).collect())),
            (".group_segment_fixed_size", 65536.into()),
            (".private_segment_fixed_size", 0.into()),
            (".vgpr_spill_count", 3.into()),
            (".max_flat_workgroup_size", 256.into()),
            (".wavefront_size", 64.into()),
        ]);
        map(vec![("amdhsa.kernels", Value::Array(vec![kernel]))])
    }

    #[test]
    fn what_is_written_is_read() {
        let metadata = one_kernel("k", 24, &[("x", 0, 8), ("", 8, 8), ("n", 16, 4)]);
        for (flags, arch) in [(GFX942, Arch::Gfx942), (0x54f, Arch::Gfx950)] {
            let read = CodeObject::parse(&object(flags, &metadata)).unwrap();
            assert_eq!(read.arch, arch);
            let kernel = read.kernel("k").unwrap();
            assert_eq!((kernel.kernarg_bytes, kernel.lds_bytes, kernel.stack_bytes), (24, 65536, 0));
            assert_eq!((kernel.spills, kernel.max_block, kernel.wave), (3, 256, 64));
            let last = Argument { name: "n".to_owned(), offset: 16, size: 4 };
            assert_eq!(kernel.arguments[2], last);
            assert_eq!(read.kernel("other"), None);
        }
    }

    #[test]
    fn what_is_not_an_object_of_amd_is_refused_with_what_it_is() {
        let metadata = one_kernel("k", 0, &[]);
        assert!(matches!(CodeObject::parse(b"MZ"), Err(MetadataError::Elf(_))));
        let unknown = CodeObject::parse(&object(0x530, &metadata));
        assert_eq!(unknown, Err(MetadataError::UnknownArch { flags: 0x530 }));
        let mut other = object(GFX942, &metadata);
        other[18] = 62;
        assert_eq!(CodeObject::parse(&other), Err(MetadataError::Machine { found: 62 }));
        let mut renamed = object(GFX942, &metadata);
        renamed[AT_NOTE + 12] = b'B';
        assert_eq!(CodeObject::parse(&renamed), Err(MetadataError::NoNote));
        let error = CodeObject::parse(&object(GFX942, &map(vec![]))).unwrap_err();
        assert_eq!(error.to_string(), "metadata: no list amdhsa.kernels");
    }

    /// No length in a damaged file leads outside it.
    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let image = object(GFX942, &one_kernel("k", 8, &[("x", 0, 8)]));
        for len in 0..image.len() {
            assert!(CodeObject::parse(&image[..len]).is_err(), "{len} of {} bytes", image.len());
        }
    }
}
