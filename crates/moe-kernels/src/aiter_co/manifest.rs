//! The tables in which AITER lists its objects.

use std::path::{Path, PathBuf};

use super::error::AiterCoError;
use super::loaded::AiterObject;
use super::moe::Sizes;
use crate::arch::Arch;

/// The first line of a table.
const HEADER: &str = "knl_name,knl_file,atm,vskip,smf,tg_num_perCU,ps,subGU_m,subGU_n";

/// How weights and activations are quantised. Outputs are bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// PTPC: a scale per row and per output channel.
    PerToken,
    /// The same with the routing weight on the sums of gemm1 (AITER's `tkw1`).
    PerTokenWeightFirst,
    /// A scale per 1x128 of a row and per 128x128 of a matrix.
    Block,
}

/// The activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gate {
    /// [`Activation::Silu`](fused_moe_core::Activation::Silu).
    Silu,
    /// [`Activation::Gelu`](fused_moe_core::Activation::Gelu).
    Gelu,
}

impl Scheme {
    /// All of them.
    pub const ALL: [Self; 3] = [Scheme::PerToken, Scheme::PerTokenWeightFirst, Scheme::Block];
}

impl Gate {
    /// All of them.
    pub const ALL: [Self; 2] = [Gate::Silu, Gate::Gelu];
}

/// What AITER has for one device, scheme and activation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Kernels, in AITER's order; not empty.
    pub tiles: Vec<Tile>,
}

/// A persistent kernel, and how it cuts the work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tile {
    /// The kernel's symbol.
    pub kernel: String,
    /// The object.
    pub path: PathBuf,
    /// What the object is for.
    pub arch: Arch,
    /// How it wants weights and activations.
    pub scheme: Scheme,
    /// Blocks of a compute unit.
    pub blocks_per_unit: u32,
    /// Sorted rows of a block of work: what sorting pads to.
    pub rows: u32,
    /// Columns of the intermediate that a block of work has.
    pub columns: u32,
}

impl Manifest {
    /// Reads a table under `hsa`, the folder of the wheel that has one per device.
    ///
    /// # Errors
    /// [`AiterCoError::NoArch`], [`AiterCoError::Read`], [`AiterCoError::Manifest`].
    pub fn read(hsa: &Path, arch: Arch, scheme: Scheme, gate: Gate) -> Result<Self, AiterCoError> {
        if arch == Arch::Sm90a {
            return Err(AiterCoError::NoArch { arch });
        }
        let gate = match gate {
            Gate::Silu => "silu",
            Gate::Gelu => "gelu",
        };
        let (quant, weight) = match scheme {
            Scheme::PerToken => ("pertokenFp8", ""),
            Scheme::PerTokenWeightFirst => ("pertokenFp8", "_tkw1"),
            Scheme::Block => ("blockscaleFp8", ""),
        };
        let folder = hsa.join(arch.name()).join("fmoe").join(gate);
        let path = folder.join(format!("fmoe_bf16_{quant}_g1u1_{gate}{weight}.csv"));
        let text = std::fs::read_to_string(&path)
            .map_err(|cause| AiterCoError::Read { path: path.clone(), cause })?;
        let wrong = |line, what| AiterCoError::Manifest { path: path.clone(), line, what };
        let mut lines = text.lines().map(str::trim).enumerate().filter(|(_, line)| !line.is_empty());
        match lines.next() {
            Some((_, HEADER)) => {}
            other => {
                let found = other.map_or("", |(_, line)| line);
                return Err(wrong(1, format!("columns are {found:?}, not {HEADER:?}")));
            }
        }
        let mut tiles = Vec::new();
        for (index, line) in lines {
            let row = Row::parse(line).map_err(|what| wrong(index + 1, what))?;
            tiles.extend(row.tile(arch, scheme, &folder));
        }
        if tiles.is_empty() {
            return Err(wrong(1, "no persistent kernel without smoothing".to_owned()));
        }
        Ok(Self { tiles })
    }

    /// The tile for these sizes on a device with `compute_units`, as AITER chooses among its persistent kernels: fewest rounds
    /// of blocks, then fewest units that idle in the last, then the first.
    ///
    /// # Errors
    /// [`AiterCoError::NoTile`] if none divides the intermediate size.
    pub fn choose(&self, sizes: &Sizes, compute_units: u32) -> Result<&Tile, AiterCoError> {
        let units = u64::from(compute_units.max(1));
        let cost = |tile: &Tile| {
            let work = (sizes.intermediate / tile.columns as usize * sizes.blocks(tile.rows)) as u64;
            let rounds = work.div_ceil(units);
            (rounds, rounds * units - work)
        };
        let divides = |tile: &&Tile| sizes.intermediate.is_multiple_of(tile.columns as usize);
        self.tiles.iter().filter(divides).min_by_key(|tile| cost(tile)).ok_or_else(|| AiterCoError::NoTile {
            intermediate: sizes.intermediate,
            tiles: self.tiles.iter().map(|tile| tile.columns).collect(),
        })
    }
}

impl Tile {
    /// Reads the object and checks that its kernel takes what would be passed.
    ///
    /// # Errors
    /// All of [`AiterCoError`] that name a path.
    pub fn object(&self) -> Result<AiterObject, AiterCoError> {
        AiterObject::read(self)
    }
}

struct Row<'t> {
    kernel: &'t str,
    file: &'t str,
    /// Whether the kernel skips masked rows; AITER's choice unless told otherwise.
    skips: bool,
    /// Kind of smoothing: 0 is none.
    smoothing: u32,
    blocks_per_unit: u32,
    is_persistent: bool,
    rows: u32,
    columns: u32,
}

impl<'t> Row<'t> {
    fn parse(line: &'t str) -> Result<Self, String> {
        let cells: Vec<&str> = line.split(',').map(str::trim).collect();
        let &[kernel, file, _, skips, smoothing, blocks_per_unit, persistent, rows, columns] = &cells[..]
        else {
            return Err(format!("{} columns, not {}", cells.len(), HEADER.split(',').count()));
        };
        let number = |name: &str, cell: &str| {
            cell.parse::<u32>().map_err(|_| format!("{name} is {cell:?}, not a number"))
        };
        let positive = |name: &str, cell: &str| match number(name, cell)? {
            0 => Err(format!("{name} is 0")),
            value => Ok(value),
        };
        if Path::new(file).file_name().is_none_or(|name| name != file) {
            return Err(format!("knl_file is {file:?}, not a file of the same folder"));
        }
        Ok(Self {
            kernel,
            file,
            skips: number("vskip", skips)? != 0,
            smoothing: number("smf", smoothing)?,
            blocks_per_unit: positive("tg_num_perCU", blocks_per_unit)?,
            is_persistent: number("ps", persistent)? != 0,
            rows: positive("subGU_m", rows)?,
            columns: positive("subGU_n", columns)?,
        })
    }

    /// None for a kernel that is not used.
    fn tile(&self, arch: Arch, scheme: Scheme, folder: &Path) -> Option<Tile> {
        let is_used = self.is_persistent && self.skips && self.smoothing == 0;
        is_used.then(|| Tile {
            kernel: self.kernel.to_owned(),
            path: folder.join(self.file),
            arch,
            scheme,
            blocks_per_unit: self.blocks_per_unit,
            rows: self.rows,
            columns: self.columns,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    /// A folder `hsa` with one table.
    pub(crate) fn folder(table: &str) -> TempDir {
        let hsa = TempDir::new().unwrap();
        let silu = hsa.path().join("gfx942/fmoe/silu");
        fs::create_dir_all(&silu).unwrap();
        fs::write(silu.join("fmoe_bf16_pertokenFp8_g1u1_silu.csv"), table).unwrap();
        hsa
    }

    pub(crate) fn read(hsa: &TempDir) -> Result<Manifest, AiterCoError> {
        Manifest::read(hsa.path(), Arch::Gfx942, Scheme::PerToken, Gate::Silu)
    }

    fn rows(rows: &[&str]) -> TempDir {
        folder(&format!("{HEADER}\n{}\n", rows.join("\n")))
    }

    #[test]
    fn only_persistent_kernels_without_smoothing_are_used() {
        let hsa = rows(&[
            "a,a.co,0,1,0,1,0,32,128",
            "b,b.co,0,1,0,2,1,32,256",
            "c,c.co,0,1,2,1,1,32,256",
            "d,d.co,0,0,0,1,1,32,256",
        ]);
        let manifest = read(&hsa).unwrap();
        let [tile] = &manifest.tiles[..] else { panic!("{manifest:?}") };
        assert_eq!(tile.kernel, "b");
        assert_eq!(tile.path, hsa.path().join("gfx942/fmoe/silu/b.co"));
        assert_eq!((tile.blocks_per_unit, tile.rows, tile.columns), (2, 32, 256));
    }

    /// 32 experts, 128 rows with 8 experts each: at most 1024 / 32 + 32 - 1 full blocks of rows, 63 in all.
    #[test]
    fn the_tile_with_the_fewest_rounds_is_chosen() {
        let hsa = rows(&["n,n.co,0,1,0,1,1,32,128", "w,w.co,0,1,0,1,1,32,512", "x,x.co,0,1,0,1,1,32,384"]);
        let manifest = read(&hsa).unwrap();
        let sizes = Sizes { rows: 128, hidden: 7168, intermediate: 2048, experts: 32, top_k: 8 };
        assert_eq!(sizes.blocks(32), 63);
        // 63 · 16 / 304 are 4 rounds, 63 · 4 / 304 is one.
        assert_eq!(manifest.choose(&sizes, 304).unwrap().kernel, "w");
        // 16 rounds of 63 units either way round: as many idle, the first wins.
        assert_eq!(manifest.choose(&Sizes { intermediate: 128, ..sizes }, 304).unwrap().kernel, "n");
        let error = manifest.choose(&Sizes { intermediate: 200, ..sizes }, 304).unwrap_err();
        assert_eq!(
            error.to_string(),
            "intermediate size 200 is a multiple of no tile: there are [128, 512, 384]"
        );
    }

    #[test]
    fn a_table_of_another_kind_is_refused_with_its_line() {
        for (table, said) in [
            ("name,file\n".to_owned(), "line 1: columns are \"name,file\""),
            (format!("{HEADER}\na,a.co\n"), "line 2: 2 columns, not 9"),
            (format!("{HEADER}\n\na,a.co,0,1,0,x,1,32,256\n"), "line 3: tg_num_perCU is \"x\""),
            (format!("{HEADER}\na,a.co,0,1,0,1,1,32,0\n"), "line 2: subGU_n is 0"),
            (format!("{HEADER}\na,../a.co,0,1,0,1,1,32,256\n"), "line 2: knl_file is \"../a.co\""),
            (format!("{HEADER}\n"), "line 1: no persistent kernel"),
        ] {
            let error = read(&folder(&table)).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        let missing = Manifest::read(Path::new("/nowhere"), Arch::Gfx950, Scheme::Block, Gate::Gelu);
        let missing = missing.unwrap_err().to_string();
        assert!(missing.contains("gelu/fmoe_bf16_blockscaleFp8_g1u1_gelu.csv"), "{missing}");
        let nvidia = Manifest::read(Path::new("/nowhere"), Arch::Sm90a, Scheme::Block, Gate::Gelu);
        assert!(matches!(nvidia, Err(AiterCoError::NoArch { arch: Arch::Sm90a })));
    }
}
