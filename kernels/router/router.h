// What the kernels of this folder are given; crates/moe-kernels/src/router.rs has the same struct.
#pragma once

#include "../common/platform.h"

namespace moe {
struct RouterParams {
    u64 logits;    // [rows, num_experts] f32 or bf16, aligned to 16 bytes
    u64 bias;      // [num_experts] f32, aligned to 16 bytes; 0 for none
    u64 ids;       // [rows, top_k] i32, written; -1 in rows with a logit that is NaN or infinity
    u64 weights;   // [rows, top_k] f32, written
    u64 fault;     // u32, written: row * num_experts + expert of the first such logit; ~0 if there is none
    u64 map;       // [num_experts] i32: local expert of each global one, negative if it is elsewhere; 0 if they are the same
    u64 offsets;   // these three as in MoeSortingParams
    u64 pair_rows;
    u64 positions;
    u64 workspace; // RouterWorkspace, zero before the first launch
    u32 rows;
    u32 num_experts;
    u32 top_k; // at most ROUTER_TOP_K
    u32 n_group;
    u32 topk_group; // n_group if no group is left out
    u32 lane_experts_32; // experts of a lane where a warp is 32 lanes, in a row; they divide a group if some are left out
    u32 lane_experts_64; // where it is 64
    u32 group_lanes_32;  // lanes that have a group, if some are left out
    u32 group_lanes_64;
    u32 score;           // Score
    u32 by_score;        // whether scores plus bias choose, and groups by their best two; otherwise logits, and the best
    u32 is_divided;      // whether weights are divided by their sum plus `epsilon`
    float epsilon;
    float factor;
    u32 logits_are_bf16;
    u32 experts; // local ones, at most ROUTER_EXPERTS; 0 if nothing is to be sorted
    u32 blocks;  // at most ROUTER_BLOCKS if there is to be sorting
    u32 block_rows; // at most ROUTER_BLOCK_ROWS, likewise
};
static_assert(sizeof(RouterParams) == 152, "mirrored in Rust");

enum Score : u32 { SOFTMAX, SOFTMAX_OF_CHOSEN, SIGMOID, SQRT_SOFTPLUS, LOGIT };

constexpr u32 ROUTER_BLOCKS = 128;

// Behind it, [blocks / 4, experts] u32: a byte for each of four blocks, how many of its rows go to the expert.
struct RouterWorkspace {
    u32 arrived;  // of sync_blocks
    u32 before;   // what it was before this launch
    u32 fault;    // the complement of what is told
    u32 finished; // blocks that do not sort
};

constexpr u32 ROUTER_THREADS = 256;
constexpr u32 ROUTER_TOP_K = 32;
constexpr u32 ROUTER_EXPERTS = 1024;
// The bits of a mask.
constexpr u32 ROUTER_BLOCK_ROWS = 32;
} // namespace moe
