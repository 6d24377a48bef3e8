// Stage 3 on Hopper: the main loop of the grouped GEMMs.
//
// A block takes tiles of 128 weight rows by TOKENS tokens of one expert, over all of k. Weights are the first operand of wgmma
// and tokens the second, so few tokens waste nothing: at decode this is a machine that streams weights. Blocks are as many
// as multiprocessors and stay; tiles go round among them, those that share weights next to each other.
//
// Warpgroup 2 fetches, up to STAGES steps of 128 bytes of k ahead and across tiles, so that memory is busy while others store:
// one thread copies the weight tile in one piece, all of them gather rows of tokens. Warpgroups 0 and 1 multiply 64 rows each.
#pragma once

#include "../common/numbers.h"
#include "../common/wgmma.h"
#include "grouped_gemm.h"

namespace moe::sm90 {
// How codes become numbers.
enum class Scales {
    NONE,  // they are bf16
    BLOCK, // one scale per 128 columns of a token, and per 128x128 weights; products of 128 columns are scaled and summed in f32
    ROW,   // one per token and one per weight row
};

template <class T, Scales SCALES, u32 TOKENS> struct Stage {
    alignas(1024) u8 weights[TILE_BYTES];
    alignas(1024) u8 tokens[TOKENS * TILE_ROW_BYTES];
};

template <class T, Scales SCALES, u32 TOKENS, u32 STAGES> struct Memory {
    Stage<T, SCALES, TOKENS> stages[STAGES];
    float token_scales[STAGES][TOKENS];
    float weight_scales[STAGES][2];
    u32 offsets[MAX_EXPERTS + 1];
    u32 first_tile[MAX_EXPERTS + 1];
    Barrier full[STAGES];
    Barrier empty[STAGES];
};

// A tile of work.
struct Work {
    u32 expert, n_tile, first, count; // pairs [first, first + count)
};

template <u32 TOKENS> MOE_DEVICE Work work(u32 tile, const u32 *first_tile, const u32 *offsets, u32 n_tiles, u32 experts) {
    u32 low = 0, high = experts;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (first_tile[middle] <= tile) low = middle;
        else high = middle;
    }
    const u32 in_expert = tile - first_tile[low];
    const u32 pairs = offsets[low + 1] - offsets[low];
    const u32 token_tiles = (pairs + TOKENS - 1) / TOKENS;
    const u32 n_tile = in_expert / token_tiles, token_tile = in_expert % token_tiles;
    const u32 left = pairs - token_tile * TOKENS;
    return {low, n_tile, offsets[low] + token_tile * TOKENS, left < TOKENS ? left : TOKENS};
}

template <class T, Scales SCALES, u32 TOKENS, u32 STAGES>
MOE_DEVICE void fetch(const GroupedGemmParams &p, Memory<T, SCALES, TOKENS, STAGES> &m) {
    // A copy group per step. So many may be on their way before the oldest is handed on.
    constexpr u32 AHEAD = STAGES > 4 ? 4 : STAGES - 1;
    constexpr u32 THREADS = 128, CHUNKS = TILE_ROW_BYTES / 16, ROUNDS = (TOKENS * CHUNKS + THREADS - 1) / THREADS;
    const u32 thread = thread_index() % THREADS, tiles = m.first_tile[p.experts];
    const u64 row_bytes = u64(p.k_tiles) * TILE_ROW_BYTES;
    u32 step = 0;
    for (u32 tile = block_index(); tile < tiles; tile += p.blocks) {
        const Work w = work<TOKENS>(tile, m.first_tile, m.offsets, p.n_tiles, p.experts);
        const u64 weights = p.weights + (u64(w.expert) * p.n_tiles + w.n_tile) * p.k_tiles * TILE_BYTES;
        u64 from[ROUNDS];
        u32 to[ROUNDS];
        bool valid[ROUNDS];
        MOE_UNROLL for (u32 i = 0; i < ROUNDS; i++) {
            const u32 row = (i * THREADS + thread) / CHUNKS, chunk = thread % CHUNKS;
            valid[i] = row < w.count;
            u32 source = w.first + (valid[i] ? row : 0);
            if (p.rows) source = ptr<const u32>(p.rows)[source];
            from[i] = p.tokens + source * row_bytes + chunk * 16;
            to[i] = row * TILE_ROW_BYTES + (chunk ^ row % 8) * 16;
        }
        u64 token_scale = 0;
        if (SCALES == Scales::BLOCK && thread < TOKENS) {
            u32 source = w.first + (thread < w.count ? thread : 0);
            if (p.rows) source = ptr<const u32>(p.rows)[source];
            token_scale = p.token_scales + 4 * (u64(source) * p.k_tiles);
        }
        const u64 weight_scale = p.weight_scales + 8 * ((u64(w.expert) * p.n_tiles + w.n_tile) * p.k_tiles);
        for (u32 k = 0; k < p.k_tiles; k++, step++) {
            const u32 at = step % STAGES, turn = step / STAGES;
            m.empty[at].wait((turn & 1) ^ 1);
            auto &stage = m.stages[at];
            if (thread == 0) {
                m.full[at].arrive_expecting(TILE_BYTES);
                bulk_copy(stage.weights, weights + u64(k) * TILE_BYTES, TILE_BYTES, m.full[at]);
            }
            const u32 tokens = shared_address(stage.tokens);
            MOE_UNROLL for (u32 i = 0; i < ROUNDS; i++) {
                if (TOKENS * CHUNKS % THREADS == 0 || i * THREADS + thread < TOKENS * CHUNKS) {
                    copy16(tokens + to[i], from[i] + k * TILE_ROW_BYTES, valid[i]);
                }
            }
            if (SCALES == Scales::BLOCK) {
                if (thread < TOKENS) copy4(shared_address(&m.token_scales[at][thread]), token_scale + 4 * k, true);
                if (thread == THREADS - 1) copy8(shared_address(m.weight_scales[at]), weight_scale + 8 * k);
            }
            close_copies();
            if (step >= AHEAD) {
                wait_copies<AHEAD>();
                fence_async();
                m.full[(step - AHEAD) % STAGES].arrive();
            }
        }
    }
    wait_copies<0>();
    fence_async();
    for (u32 i = step < AHEAD ? 0 : step - AHEAD; i < step; i++) m.full[i % STAGES].arrive();
}

// gate·sigmoid(gate)·up, each step rounded as the host does it.
MOE_DEVICE float silu_mul(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

MOE_DEVICE u16 to_bf16(float x) {
    const u32 bits = to_bits(x);
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T, Scales SCALES, u32 TOKENS>
MOE_DEVICE void store(const GroupedGemmParams &p, const Work &w, const float (&d)[TOKENS / 2]) {
    const u32 thread = thread_index() % 128, half = thread_index() / 128;
    const u32 slab = half * 4 + thread / 32, row = thread % 32 / 4, column = thread % 4 * 2;
    const u32 n = p.n_tiles * TILE_ROWS, packed = w.n_tile * TILE_ROWS + slab * 16 + row;
    float first_scale = 1.0f, other_scale = 1.0f;
    if (SCALES == Scales::ROW) {
        const float *scales = ptr<const float>(p.weight_scales) + u64(w.expert) * n;
        first_scale = scales[packed];
        other_scale = scales[packed + 8];
    }
    MOE_UNROLL for (u32 j = 0; j < TOKENS / 8; j++) {
        MOE_UNROLL for (u32 i = 0; i < 2; i++) {
            const u32 token = j * 8 + column + i;
            if (token >= w.count) continue;
            const u64 pair = w.first + token;
            float first = d[4 * j + i], other = d[4 * j + 2 + i];
            if (SCALES == Scales::ROW) {
                const u32 source = p.rows ? ptr<const u32>(p.rows)[pair] : u32(pair);
                const float scale = ptr<const float>(p.token_scales)[source];
                first *= first_scale * scale;
                other *= other_scale * scale;
            }
            if (p.has_activation) {
                const u32 output = w.n_tile * (TILE_ROWS / 2) + slab * 8 + row;
                ptr<u16>(p.out)[pair * (n / 2) + output] = to_bf16(silu_mul(first, other));
            } else {
                float *out = ptr<float>(p.out) + pair * n + packed;
                out[0] = first;
                out[8] = other;
            }
        }
    }
}

template <class T, Scales SCALES, u32 TOKENS, u32 STAGES>
MOE_DEVICE void multiply(const GroupedGemmParams &p, Memory<T, SCALES, TOKENS, STAGES> &m) {
    const u32 tiles = m.first_tile[p.experts], half = thread_index() / 128;
    u32 step = 0;
    for (u32 tile = block_index(); tile < tiles; tile += p.blocks) {
        const Work w = work<TOKENS>(tile, m.first_tile, m.offsets, p.n_tiles, p.experts);
        float sum[TOKENS / 2];
        MOE_UNROLL for (u32 i = 0; i < TOKENS / 2; i++) sum[i] = 0.0f;
        for (u32 k = 0; k < p.k_tiles; k++, step++) {
            const u32 at = step % STAGES, phase = step / STAGES & 1;
            m.full[at].wait(phase);
            const u32 a = shared_address(m.stages[at].weights) + half * (TILE_BYTES / 2);
            const u32 b = shared_address(m.stages[at].tokens);
            if constexpr (SCALES == Scales::NONE) {
                begin_products();
                MOE_UNROLL for (u32 i = 0; i < 4; i++) Product<T, TOKENS>::run(sum, operand(a + 32 * i), operand(b + 32 * i), true);
                close_products();
                // The step before this one is done, and its memory can be filled again.
                wait_products<1>();
                if (k > 0 && thread_index() % 128 == 0) m.empty[(step - 1) % STAGES].arrive();
            } else {
                float part[TOKENS / 2];
                begin_products();
                MOE_UNROLL for (u32 i = 0; i < 4; i++) Product<T, TOKENS>::run(part, operand(a + 32 * i), operand(b + 32 * i), i > 0);
                close_products();
                float first_scale = 1.0f, other_scale = 1.0f;
                if (SCALES == Scales::BLOCK) {
                    first_scale = m.weight_scales[at][0];
                    other_scale = m.weight_scales[at][1];
                }
                const u32 column = thread_index() % 4 * 2;
                float scale[TOKENS / 4];
                if (SCALES == Scales::BLOCK) {
                    MOE_UNROLL for (u32 j = 0; j < TOKENS / 4; j++) scale[j] = m.token_scales[at][j / 2 * 8 + column + j % 2];
                }
                wait_products<0>();
                __syncwarp();
                if (thread_index() % 32 == 0) m.empty[at].arrive();
                MOE_UNROLL for (u32 j = 0; j < TOKENS / 8; j++) {
                    MOE_UNROLL for (u32 i = 0; i < 2; i++) {
                        if (SCALES == Scales::BLOCK) {
                            const float s = scale[2 * j + i];
                            sum[4 * j + i] = fmaf(part[4 * j + i], first_scale * s, sum[4 * j + i]);
                            sum[4 * j + 2 + i] = fmaf(part[4 * j + 2 + i], other_scale * s, sum[4 * j + 2 + i]);
                        } else {
                            sum[4 * j + i] += part[4 * j + i];
                            sum[4 * j + 2 + i] += part[4 * j + 2 + i];
                        }
                    }
                }
            }
        }
        if constexpr (SCALES == Scales::NONE) {
            wait_products<0>();
            if (thread_index() % 128 == 0) m.empty[(step - 1) % STAGES].arrive();
        }
        store<T, SCALES, TOKENS>(p, w, sum);
    }
}

template <class T, Scales SCALES, u32 TOKENS, u32 STAGES> MOE_DEVICE void grouped_gemm(const GroupedGemmParams &p) {
    extern __shared__ __align__(1024) u8 raw[];
    auto &m = *reinterpret_cast<Memory<T, SCALES, TOKENS, STAGES> *>(raw);
    static_assert(sizeof(m) <= GROUPED_GEMM_SHARED_BYTES, "fewer stages");
    // Sums of so many tokens need the registers that fetching does not. The block starts with 168 of each thread.
    constexpr bool WIDE = TOKENS >= 128;
    const u32 thread = thread_index();
    for (u32 i = thread; i <= p.experts; i += GROUPED_GEMM_THREADS) m.offsets[i] = ptr<const u32>(p.offsets)[i];
    if (thread == 0) {
        for (u32 i = 0; i < STAGES; i++) {
            m.full[i].init(1 + 128);
            // A thread of each warpgroup that multiplies, or of each of its warps.
            m.empty[i].init(SCALES == Scales::NONE ? 2 : 8);
        }
        fence_barriers();
    }
    sync_block();
    if (thread == 0) {
        u32 tiles = 0;
        for (u32 e = 0; e < p.experts; e++) {
            m.first_tile[e] = tiles;
            tiles += (m.offsets[e + 1] - m.offsets[e] + TOKENS - 1) / TOKENS * p.n_tiles;
        }
        m.first_tile[p.experts] = tiles;
    }
    sync_block();
    if (thread / 128 == 2) {
        if constexpr (WIDE) give_registers<64>();
        fetch(p, m);
    } else {
        if constexpr (WIDE) take_registers<216>();
        multiply(p, m);
    }
}
} // namespace moe::sm90
