// What the kernels of this folder are given; crates/moe-kernels/src/quantize.rs has the same structs.
#pragma once

#include "../common/platform.h"

namespace moe {
// bf16 rows to FP8 codes with one f32 scale per 128 columns. Group g of row r has its scale at
// `scales[r * scale_row_stride + g * scale_group_stride]`, so both orders of the scales are one kernel.
struct Quantize1x128Params {
    u64 input;  // [rows, hidden] bf16, rows `input_stride` apart
    u64 codes;  // [rows, hidden] FP8
    u64 scales; // f32
    u64 count;  // u32: how many rows there are, if less than `rows`; 0 if there is no such number
    u32 rows;
    u32 hidden; // a multiple of 8
    u32 groups; // of a row: ceil(hidden / 128); the last may be short
    u32 input_stride; // elements, a multiple of 8
    u32 scale_row_stride;
    u32 scale_group_stride;
    float max;         // the largest magnitude that is coded
    float inverse_max; // 1 / max, rounded once
    u32 blocks;        // of the grid
    u32 unused;
};
static_assert(sizeof(Quantize1x128Params) == 72, "mirrored in Rust");

// bf16 rows to FP8 codes with one f32 scale per row.
struct QuantizePerTokenParams {
    u64 input;  // [rows, hidden] bf16, rows `input_stride` apart
    u64 codes;  // [rows, hidden] FP8
    u64 scales; // [rows] f32
    u64 count;  // as above
    u32 rows;
    u32 hidden; // a multiple of 8
    u32 input_stride; // elements, a multiple of 8
    float max;
    float inverse_max;
    u32 blocks;
};
static_assert(sizeof(QuantizePerTokenParams) == 56, "mirrored in Rust");

// Rows that there are.
MOE_DEVICE u32 row_count(u32 rows, u64 count) {
    if (!count) return rows;
    const u32 found = *ptr<const u32>(count);
    return found < rows ? found : rows;
}

constexpr u32 QUANTIZE_1X128_THREADS = 256;
constexpr u32 QUANTIZE_PER_TOKEN_THREADS = 256;
} // namespace moe
