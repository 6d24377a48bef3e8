// What the kernel of this folder that sums the experts of a token is given; crates/moe-kernels/src/experts.rs has the same
// struct.
#pragma once

#include "../common/platform.h"

namespace moe {
struct WeightedSumParams {
    u64 products;  // [pairs, hidden] f32 or bf16
    u64 positions; // [rows, top_k] i32: the pair of each slot; negative if the expert is not here
    u64 weights;   // [rows, top_k] f32
    u64 out;       // [rows, hidden] f32 or bf16
    u32 rows;
    u32 top_k;
    u32 hidden; // a multiple of 8
    u32 blocks_per_row;
    u32 products_are_bf16;
    u32 out_is_bf16;
};
static_assert(sizeof(WeightedSumParams) == 56, "mirrored in Rust");

constexpr u32 WEIGHTED_SUM_THREADS = 256;
} // namespace moe
