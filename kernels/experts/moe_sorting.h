// What the kernels of this folder that sort are given; crates/moe-kernels/src/sorting.rs has the same struct.
#pragma once

#include "../common/platform.h"

namespace moe {
struct MoeSortingParams {
    u64 ids;       // [rows, top_k] i32: global experts; negative is none
    u64 map;       // [num_experts] i32: local expert of each global one, negative if it is elsewhere; 0 if they are the same
    u64 offsets;   // [experts + 1] u32, written: where the pairs of each local expert begin
    u64 pair_rows; // [rows * top_k] u32, written: the row of each pair, in ascending order within an expert
    u64 positions; // [rows, top_k] i32, written: the pair of each slot, -1 if its expert is not here
    u64 counts;    // [blocks, experts] u32: pairs of each expert among the slots of each block; written by moe_sorting_count,
                   // read by moe_sorting_place
    u32 slots;     // rows * top_k
    u32 top_k;
    u32 experts; // local
    u32 num_experts;
    u32 blocks; // of the grid, where blocks share the slots out
    u32 unused;
};
static_assert(sizeof(MoeSortingParams) == 72, "mirrored in Rust");

constexpr u32 MOE_SORTING_THREADS = 512;
// Local experts of the two phases: a thread has one.
constexpr u32 MOE_SORTING_EXPERTS = 256;
} // namespace moe
