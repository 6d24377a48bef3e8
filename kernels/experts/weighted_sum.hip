// The end of stage 3: the outputs of a token's experts, weighted and summed in f32 in the order of its slots.

#include "../common/numbers.h"
#include "weighted_sum.h"

using namespace moe;

namespace {
constexpr u32 COLUMNS = 8;

MOE_DEVICE void load(const WeightedSumParams &p, u64 at, float (&x)[COLUMNS]) {
    if (p.products_are_bf16) {
        const u32x4 words = load_once(ptr<const u32x4>(p.products + 2 * at));
        MOE_UNROLL for (u32 i = 0; i < COLUMNS; i++) x[i] = i % 2 ? high_bf16(words.v[i / 2]) : low_bf16(words.v[i / 2]);
        return;
    }
    MOE_UNROLL for (u32 half = 0; half < 2; half++) {
        const u32x4 words = load_once(ptr<const u32x4>(p.products + 4 * at) + half);
        MOE_UNROLL for (u32 i = 0; i < 4; i++) x[half * 4 + i] = from_bits(words.v[i]);
    }
}

MOE_DEVICE void store(const WeightedSumParams &p, u64 at, const float (&x)[COLUMNS]) {
    u32x4 words;
    if (p.out_is_bf16) {
        MOE_UNROLL for (u32 i = 0; i < 4; i++) words.v[i] = two_bf16(x[2 * i], x[2 * i + 1]);
        *ptr<u32x4>(p.out + 2 * at) = words;
        return;
    }
    MOE_UNROLL for (u32 half = 0; half < 2; half++) {
        MOE_UNROLL for (u32 i = 0; i < 4; i++) words.v[i] = to_bits(x[half * 4 + i]);
        ptr<u32x4>(p.out + 4 * at)[half] = words;
    }
}
} // namespace

MOE_KERNEL(weighted_sum, WeightedSumParams, WEIGHTED_SUM_THREADS) {
    const u32 row = block_index() / p.blocks_per_row;
    const u32 column = (block_index() % p.blocks_per_row * WEIGHTED_SUM_THREADS + thread_index()) * COLUMNS;
    if (column >= p.hidden) return;
    float sum[COLUMNS] = {};
    for (u32 slot = 0; slot < p.top_k; slot++) {
        const i32 pair = ptr<const i32>(p.positions)[row * p.top_k + slot];
        if (pair < 0) continue;
        const float weight = ptr<const float>(p.weights)[row * p.top_k + slot];
        float x[COLUMNS];
        load(p, u64(pair) * p.hidden + column, x);
        MOE_UNROLL for (u32 i = 0; i < COLUMNS; i++) sum[i] = sum[i] + x[i] * weight;
    }
    store(p, u64(row) * p.hidden + column, sum);
}
