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
    u32 rows;
    u32 hidden; // a multiple of 8
    u32 groups; // of a row: ceil(hidden / 128); the last may be short
    u32 input_stride; // elements, a multiple of 8
    u32 scale_row_stride;
    u32 scale_group_stride;
    float max;         // the largest magnitude that is coded
    float inverse_max; // 1 / max, rounded once
};
static_assert(sizeof(Quantize1x128Params) == 56, "mirrored in Rust");

constexpr u32 QUANTIZE_1X128_THREADS = 256;
} // namespace moe
