// The tiles of work of a grouped GEMM, which its blocks share.
#pragma once

#include "grouped_gemm.h"

namespace moe::tiles {
// In shared memory.
struct Table {
    u32 offsets[MAX_EXPERTS + 1];
    u32 first_tile[MAX_EXPERTS + 1]; // of an expert; those before it have as many
};

// A tile of work: a tile of weights, and pairs [first, first + count).
struct Work {
    u32 expert, n_tile, first, count;
};

// Fills the table by all threads of the block, and returns how many tiles of so many tokens there are.
template <u32 TOKENS, u32 THREADS> MOE_DEVICE u32 count(const GroupedGemmParams &p, Table &table) {
    for (u32 i = thread_index(); i <= p.experts; i += THREADS) table.offsets[i] = ptr<const u32>(p.offsets)[i];
    sync_block();
    if (thread_index() == 0) {
        u32 tiles = 0;
        for (u32 e = 0; e < p.experts; e++) {
            table.first_tile[e] = tiles;
            tiles += (table.offsets[e + 1] - table.offsets[e] + TOKENS - 1) / TOKENS * p.n_tiles;
        }
        table.first_tile[p.experts] = tiles;
    }
    sync_block();
    return table.first_tile[p.experts];
}

// Tile number `tile`. Those that share weights are next to each other.
template <u32 TOKENS> MOE_DEVICE Work find(u32 tile, const Table &table, u32 experts) {
    u32 low = 0, high = experts;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (table.first_tile[middle] <= tile) low = middle;
        else high = middle;
    }
    const u32 in_expert = tile - table.first_tile[low];
    const u32 pairs = table.offsets[low + 1] - table.offsets[low];
    const u32 token_tiles = (pairs + TOKENS - 1) / TOKENS;
    const u32 token_tile = in_expert % token_tiles, left = pairs - token_tile * TOKENS;
    return {low, in_expert / token_tiles, table.offsets[low] + token_tile * TOKENS, left < TOKENS ? left : TOKENS};
}
} // namespace moe::tiles
