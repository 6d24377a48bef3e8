//! Checks the one-stage objects of AITER in a folder: that each is there, is for its device, and takes what would be passed.
//!
//! ```sh
//! pip download --no-deps amd-aiter && unzip -q amd_aiter-*.whl -d aiter
//! cargo run -p moe-kernels --features aiter-co --example check_aiter_co -- aiter/aiter_meta/hsa
//! ```

use std::error::Error;
use std::path::PathBuf;

use moe_kernels::Arch;
use moe_kernels::aiter_co::{Gate, Manifest, Scheme};

fn main() -> Result<(), Box<dyn Error>> {
    let hsa: PathBuf = std::env::args_os().nth(1).ok_or("usage: check_aiter_co HSA_FOLDER")?.into();
    for arch in [Arch::Gfx942, Arch::Gfx950] {
        for scheme in Scheme::ALL {
            for gate in Gate::ALL {
                let manifest = Manifest::read(&hsa, arch, scheme, gate)?;
                let mut columns = Vec::new();
                for tile in &manifest.tiles {
                    tile.object()?;
                    columns.push(tile.columns);
                }
                columns.sort_unstable();
                println!(
                    "{arch} {scheme:?} {gate:?}: {} objects, tiles of {columns:?} columns",
                    columns.len()
                );
            }
        }
    }
    println!("compiled and checked, not run");
    Ok(())
}
