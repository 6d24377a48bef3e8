//! Stage 3: a product for every expert.

use crate::arch::Arch;
use crate::launch::{BadLaunch, Float, KernelParams, Launch};
use crate::pack::{TILE_ROW_BYTES, TILE_ROWS};

/// On sm_90a: all dynamic shared memory that a block can have. Elsewhere it is static.
pub(crate) const SHARED_BYTES: u32 = 232_448;
const MAX_EXPERTS: usize = 256;

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GemmScheme {
    /// bf16 weights and tokens.
    Bf16,
    /// FP8 with one scale per 128 columns of a token and per 128x128 weights.
    Fp8Block,
    /// FP8 with one scale per token and one per weight row (PTPC).
    Fp8Row,
}

impl GemmScheme {
    /// All of them.
    pub const ALL: [GemmScheme; 3] = [GemmScheme::Bf16, GemmScheme::Fp8Block, GemmScheme::Fp8Row];

    /// Bytes of a code.
    pub const fn bytes(self) -> usize {
        match self {
            GemmScheme::Bf16 => 2,
            GemmScheme::Fp8Block | GemmScheme::Fp8Row => 1,
        }
    }

    /// Its object for `arch`, and the kernels of it by tokens of a tile. The smallest tile of CDNA has 16.
    pub const fn kernels(self, arch: Arch) -> (&'static str, [&'static str; 5]) {
        macro_rules! kernels {
            ($scheme:literal) => {{
                let object = match arch {
                    Arch::Sm90a => concat!("grouped_gemm_", $scheme, "_sm90"),
                    Arch::Gfx942 => concat!("grouped_gemm_", $scheme, "_gfx942"),
                    Arch::Gfx950 => concat!("grouped_gemm_", $scheme, "_gfx950"),
                };
                let smallest = match arch {
                    Arch::Sm90a => concat!("grouped_gemm_", $scheme, "_8"),
                    Arch::Gfx942 | Arch::Gfx950 => concat!("grouped_gemm_", $scheme, "_16"),
                };
                let of_tiles = [
                    smallest,
                    concat!("grouped_gemm_", $scheme, "_16"),
                    concat!("grouped_gemm_", $scheme, "_32"),
                    concat!("grouped_gemm_", $scheme, "_64"),
                    concat!("grouped_gemm_", $scheme, "_128"),
                ];
                (object, of_tiles)
            }};
        }
        match self {
            GemmScheme::Bf16 => kernels!("bf16"),
            GemmScheme::Fp8Block => kernels!("fp8_block"),
            GemmScheme::Fp8Row => kernels!("fp8_row"),
        }
    }
}

/// Tokens of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TokenTile {
    /// 8.
    T8,
    /// 16.
    T16,
    /// 32.
    T32,
    /// 64.
    T64,
    /// 128.
    T128,
}

impl TokenTile {
    /// All of them.
    pub const ALL: [TokenTile; 5] =
        [TokenTile::T8, TokenTile::T16, TokenTile::T32, TokenTile::T64, TokenTile::T128];

    /// How many tokens.
    pub const fn tokens(self) -> usize {
        8 << self as usize
    }

    /// For `pairs` expected over `experts`: the smallest tile that holds what most experts get, since a second tile of an expert
    /// reads its weights again. Drawn uniformly, an expert has its mean and two standard deviations at most, nearly always. Beyond
    /// 32 tokens it is 128 at once, which read twice the weights per step: on an H200 that takes 4 to 8 % less time than 64 do
    /// (benches/record/h200).
    pub fn for_pairs(pairs: usize, experts: usize) -> Self {
        let mean = pairs as f64 / experts.max(1) as f64;
        let wanted = mean + 2.0 * mean.sqrt();
        let narrow = [TokenTile::T8, TokenTile::T16, TokenTile::T32];
        narrow.into_iter().find(|tile| tile.tokens() as f64 >= wanted).unwrap_or(TokenTile::T128)
    }
}

/// A product for every expert: `[pairs of the expert, k] · [n, k]ᵀ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupedGemm {
    /// Where it runs.
    pub arch: Arch,
    /// What is multiplied.
    pub scheme: GemmScheme,
    /// Experts, at most 256.
    pub experts: usize,
    /// Weight rows of an expert, gate and up together; a multiple of 128.
    pub n: usize,
    /// Columns; their bytes are a multiple of 128.
    pub k: usize,
    /// SiLU(gate) · up in bf16 is written instead of the products.
    pub has_activation: bool,
    /// What products are written as.
    pub products: Float,
    /// Tokens of a tile.
    pub tile: TokenTile,
    /// Multiprocessors, or compute units, of the device. As many blocks stay on sm_90a, an even number of the largest tile, and
    /// twice as many on CDNA.
    pub compute_units: u32,
}

/// Addresses in the device's memory, aligned to 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmBuffers {
    /// As [`crate::pack`] packs them.
    pub weights: u64,
    /// Their map, see [`crate::pack::map`]; only the largest tile of sm_90a reads it.
    pub weights_map: u64,
    /// f32: `[experts, n / 128, k bytes / 128, 2]` for blocks, `[experts, n]` in packed order for rows, nothing for bf16.
    pub weight_scales: u64,
    /// `[rows, k]`.
    pub tokens: u64,
    /// f32: `[rows, k / 128]` for blocks, `[rows]` for rows, nothing for bf16.
    pub token_scales: u64,
    /// `[pairs]` u32: the row of each pair. 0 if a pair's row is its number.
    pub pair_rows: u64,
    /// `[experts + 1]` u32: where the pairs of each expert begin.
    pub offsets: u64,
    /// Written: `[pairs, n / 2]` bf16 behind the activation, else `[pairs, n]` as [`GroupedGemm::products`] says.
    pub out: u64,
}

/// The argument of the kernels: `GroupedGemmParams` in `kernels/experts/grouped_gemm.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupedGemmParams {
    weights: u64,
    weight_scales: u64,
    tokens: u64,
    token_scales: u64,
    rows: u64,
    offsets: u64,
    weights_map: u64,
    out: u64,
    experts: u32,
    n_tiles: u32,
    k_tiles: u32,
    blocks: u32,
    has_activation: u32,
    out_is_bf16: u32,
}

const _: () = assert!(size_of::<GroupedGemmParams>() == 88);

// SAFETY: `repr(C)`, eight fields of 8 bytes and six of 4, 88 bytes in all, so there is no padding; the struct in
// `kernels/experts/grouped_gemm.h` has the same fields in the same order.
unsafe impl KernelParams for GroupedGemmParams {}

impl GroupedGemm {
    /// The call.
    ///
    /// # Errors
    /// [`BadLaunch`] for sizes that do not fill tiles, and for more than 256 experts.
    pub fn launch(&self, buffers: GemmBuffers) -> Result<Launch<GroupedGemmParams>, BadLaunch> {
        let (_, kernels) = self.scheme.kernels(self.arch);
        let kernel = kernels[self.tile as usize];
        let narrow = |what, size| BadLaunch::narrow(kernel, what, size);
        let n = BadLaunch::multiple(kernel, "weight rows", self.n, TILE_ROWS)?;
        let k_bytes =
            BadLaunch::multiple(kernel, "bytes of k", self.k * self.scheme.bytes(), TILE_ROW_BYTES)?;
        if self.experts > MAX_EXPERTS {
            let (what, size) = ("local experts", self.experts);
            return Err(BadLaunch::TooLarge { kernel, what, size, limit: MAX_EXPERTS });
        }
        let GemmBuffers {
            weights,
            weights_map,
            weight_scales,
            tokens,
            token_scales,
            pair_rows,
            offsets,
            out,
        } = buffers;
        let (blocks, block, shared_bytes) = match self.arch {
            // Blocks of the largest tile go in pairs.
            Arch::Sm90a if self.tile == TokenTile::T128 => {
                ((self.compute_units & !1).max(2), 384, SHARED_BYTES)
            }
            Arch::Sm90a => (self.compute_units, 384, SHARED_BYTES),
            Arch::Gfx942 | Arch::Gfx950 => (2 * self.compute_units, 256, 0),
        };
        Ok(Launch {
            kernel,
            grid: blocks,
            block,
            shared_bytes,
            params: GroupedGemmParams {
                weights,
                weight_scales,
                tokens,
                token_scales,
                rows: pair_rows,
                offsets,
                weights_map,
                out,
                experts: narrow("local experts", self.experts)?,
                n_tiles: narrow("weight rows", n / TILE_ROWS)?,
                k_tiles: narrow("bytes of k", k_bytes / TILE_ROW_BYTES)?,
                blocks,
                has_activation: u32::from(self.has_activation),
                out_is_bf16: self.products.is_bf16(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_holds_what_an_expert_is_expected_to_get() {
        for (pairs, experts, tile) in [
            (0, 32, TokenTile::T8),
            (128, 32, TokenTile::T8),
            (512, 32, TokenTile::T32),
            (1024, 32, TokenTile::T128),
            (4096, 32, TokenTile::T128),
            (1 << 20, 1, TokenTile::T128),
        ] {
            assert_eq!(TokenTile::for_pairs(pairs, experts), tile, "{pairs} pairs, {experts} experts");
        }
    }

    #[test]
    fn sizes_that_do_not_fill_tiles_are_refused() {
        let gemm = GroupedGemm {
            arch: Arch::Sm90a,
            scheme: GemmScheme::Fp8Block,
            experts: 8,
            n: 4096,
            k: 7168,
            has_activation: true,
            products: Float::F32,
            tile: TokenTile::T8,
            compute_units: 132,
        };
        let nowhere = GemmBuffers {
            weights: 0,
            weights_map: 0,
            weight_scales: 0,
            tokens: 0,
            token_scales: 0,
            pair_rows: 0,
            offsets: 0,
            out: 0,
        };
        let refused = |gemm: GroupedGemm| gemm.launch(nowhere).unwrap_err().to_string();
        assert!(gemm.launch(nowhere).is_ok());
        let kernel = "(grouped_gemm_fp8_block_8)";
        assert_eq!(
            refused(GroupedGemm { n: 4000, ..gemm }),
            format!("weight rows 4000 is not a multiple of 128 {kernel}")
        );
        assert_eq!(
            refused(GroupedGemm { k: 7000, ..gemm }),
            format!("bytes of k 7000 is not a multiple of 128 {kernel}")
        );
        assert_eq!(
            refused(GroupedGemm { experts: 257, ..gemm }),
            format!("local experts 257 is more than 256 {kernel}")
        );
    }
}
