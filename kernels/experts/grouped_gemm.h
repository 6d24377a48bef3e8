// What the grouped GEMMs of this folder are given; crates/moe-kernels/src/experts.rs has the same struct.
#pragma once

#include "../common/platform.h"

namespace moe {
// A product for every expert: weights [experts, n, k] with the rows of `tokens` that are the expert's.
//
// Weights are packed in tiles of 128 rows by 128 bytes of k, [experts, n_tiles, k_tiles, 128, 128 bytes]. For sm_90a, 16-byte
// chunk c of row r is at chunk c ^ (r % 8). For CDNA a tile has 4 slabs of 32 rows, each [8 chunks, 32 rows, 16 bytes], so that
// a wave reads one of them in four pieces of 1 KiB. Before an activation, rows of gate and up alternate in groups of eight.
struct GroupedGemmParams {
    u64 weights;
    u64 weight_scales; // [experts, n_tiles, k_tiles, 2] f32: of the first and the other eight of 16 rows; or [experts, n] f32
    u64 tokens;        // [rows, k]
    u64 token_scales;  // [rows, k_tiles] f32, or [rows] f32
    u64 rows;          // [pairs] u32: which row of `tokens` each pair has; 0 if it is its own number
    u64 offsets;       // [experts + 1] u32: where the pairs of each expert begin
    u64 weights_map;   // a tensor map of `weights`: rows of 128 bytes, in boxes of as many rows as a tile
    u64 out;           // [pairs, n / 2] bf16 behind an activation; or [pairs, n] f32 or bf16
    u32 experts;
    u32 n_tiles;
    u32 k_tiles;
    u32 blocks; // of the grid
    u32 has_activation;
    u32 out_is_bf16; // without an activation
};
static_assert(sizeof(GroupedGemmParams) == 88, "mirrored in Rust");

constexpr u32 TILE_ROWS = 128;
constexpr u32 TILE_ROW_BYTES = 128;
constexpr u32 TILE_BYTES = TILE_ROWS * TILE_ROW_BYTES;
// On sm_90a. Two warpgroups multiply, one fetches.
constexpr u32 GROUPED_GEMM_THREADS = 384;
constexpr u32 MAX_EXPERTS = 256;
// All that a block can have on sm_90a: there is one on each multiprocessor.
constexpr u32 GROUPED_GEMM_SHARED_BYTES = 232448;
} // namespace moe
