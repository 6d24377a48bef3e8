// The end of stage 3: the outputs of a token's experts, weighted and summed in the order of its slots.

#include "weighted_sum.h"

using namespace moe;

MOE_KERNEL(weighted_sum, WeightedSumParams, WEIGHTED_SUM_THREADS) {
    const u32 row = block_index() / p.blocks_per_row;
    const u32 column = (block_index() % p.blocks_per_row * WEIGHTED_SUM_THREADS + thread_index()) * 4;
    if (column >= p.hidden) return;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (u32 slot = 0; slot < p.top_k; slot++) {
        const i32 pair = ptr<const i32>(p.positions)[row * p.top_k + slot];
        if (pair < 0) continue;
        const float weight = ptr<const float>(p.weights)[row * p.top_k + slot];
        const u32x4 words = load_once(ptr<const u32x4>(p.products + 4 * (u64(pair) * p.hidden + column)));
        MOE_UNROLL for (u32 i = 0; i < 4; i++) sum[i] = sum[i] + from_bits(words.v[i]) * weight;
    }
    u32x4 words;
    MOE_UNROLL for (u32 i = 0; i < 4; i++) words.v[i] = to_bits(sum[i]);
    *ptr<u32x4>(p.out + 4 * (u64(row) * p.hidden + column)) = words;
}
