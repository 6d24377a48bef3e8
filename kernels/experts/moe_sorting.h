// What the kernel of this folder that sorts is given; crates/moe-kernels/src/sorting.rs has the same struct.
#pragma once

#include "../common/platform.h"

namespace moe {
struct MoeSortingParams {
    u64 ids;       // [rows, top_k] i32: global experts; negative is none
    u64 map;       // [num_experts] i32: local expert of each global one, negative if it is elsewhere; 0 if they are the same
    u64 offsets;   // [experts + 1] u32, written: where the pairs of each local expert begin
    u64 pair_rows; // [rows * top_k] u32, written: the row of each pair, in ascending order within an expert
    u64 positions; // [rows, top_k] i32, written: the pair of each slot, -1 if its expert is not here
    u32 slots;     // rows * top_k
    u32 top_k;
    u32 experts; // local
    u32 num_experts;
};
static_assert(sizeof(MoeSortingParams) == 56, "mirrored in Rust");

constexpr u32 MOE_SORTING_THREADS = 512;
} // namespace moe
