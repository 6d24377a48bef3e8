// Stage 3 on CDNA: the main loop of the grouped GEMMs of gfx942 and gfx950.
//
// A block takes tiles of 128 weight rows by TOKENS tokens of one expert, over all of k. Blocks are some per compute unit and
// stay; tiles go round among them, those that share weights next to each other.
//
// Each of the four waves multiplies 32 weight rows, which it alone needs and reads into registers, DEPTH steps of 128 bytes of k
// ahead. Tokens are for all waves: the block gathers their rows through registers into one of two buffers of shared memory while
// the other one is read.
#pragma once

#include "../common/mfma.h"
#include "../common/numbers.h"
#include "grouped_gemm_tiles.h"

namespace moe::cdna {
// How codes become numbers.
enum class Scales {
    NONE,  // they are bf16
    BLOCK, // one scale per 128 columns of a token, and per 128x128 weights; products of 128 columns are scaled and summed in f32
    ROW,   // one per token and one per weight row
};

constexpr u32 THREADS = 256, WAVES = THREADS / WARP, WAVE_ROWS = TILE_ROWS / WAVES;
static_assert(WAVE_ROWS == 32 && WAVE_ROWS * TILE_ROW_BYTES == 4 * 16 * WARP, "a lane has four chunks of 16 bytes of a step");

template <u32 TOKENS> struct Memory {
    // 16-byte chunk c of row r at chunk c ^ (r % 8): lanes that read a chunk of rows next to each other meet all banks.
    Chunk tokens[2][TOKENS][TILE_ROW_BYTES / 16];
    float token_scales[2][TOKENS];
    tiles::Table table;
};

// gate·sigmoid(gate)·up.
MOE_DEVICE float silu_mul(float gate, float up) { return near_quotient(gate, 1.0f + near_exp(-gate)) * up; }

// The work of a block on a tile.
template <class T, Scales SCALES, u32 TOKENS> struct Tile {
    // Products are of SIDE rows. A wave has 32 rows, so one or two of them; where there are two, one has the rows of gate and the
    // other those of up, as one of 32 rows has them in sums 8h + r and 8h + 4 + r.
    static constexpr u32 SIDE = TOKENS >= 32 ? 32 : 16, PRODUCTS = WAVE_ROWS / SIDE, COLUMNS = TOKENS / SIDE;
    static constexpr u32 GROUPS = WARP / SIDE, ROUNDS = (TOKENS * 8 + THREADS - 1) / THREADS;
    // Few tokens wait for weights alone, and their sums leave registers for more of them.
    static constexpr u32 DEPTH = TOKENS >= 64 ? 2 : 4;

    // What a wave multiplies with in a step.
    struct Weights {
        Chunk chunks[PRODUCTS][CHUNKS<SIDE>];
        float scales[2];
    };

    // What a thread carries of the tokens of a step.
    struct Carried {
        Chunk chunks[ROUNDS];
        float scale;
    };

    const GroupedGemmParams &p;
    Memory<TOKENS> &m;
    const tiles::Work w;
    u64 weights;       // of the first step, in units of tiles
    u64 rows[ROUNDS];  // addresses of the rows that this thread carries, at its chunk
    u64 token_scales;  // those of this thread's token
    Sums<SIDE> sum[PRODUCTS][COLUMNS];

    MOE_DEVICE Tile(const GroupedGemmParams &params, Memory<TOKENS> &memory, tiles::Work work) : p(params), m(memory), w(work) {
        weights = (u64(w.expert) * p.n_tiles + w.n_tile) * p.k_tiles;
        MOE_UNROLL for (u32 i = 0; i < ROUNDS; i++) {
            const u64 row = source(i * (THREADS / 8) + thread_index() / 8);
            rows[i] = p.tokens + row * p.k_tiles * TILE_ROW_BYTES + thread_index() % 8 * 16;
        }
        token_scales = p.token_scales + 4 * (source(thread_index()) * u64(p.k_tiles));
        MOE_UNROLL for (u32 i = 0; i < PRODUCTS; i++) {
            MOE_UNROLL for (u32 c = 0; c < COLUMNS; c++) sum[i][c] = Sums<SIDE>{};
        }
    }

    // The row of `tokens` that token `row` of the tile is; that of the first one where there is none.
    MOE_DEVICE u32 source(u32 row) const {
        const u32 pair = w.first + (row < w.count ? row : 0);
        return p.rows ? ptr<const u32>(p.rows)[pair] : pair;
    }

    // The weight row, of the wave's 32, that is row `i` of product `product`.
    static MOE_DEVICE u32 weight_row(u32 product, u32 i) { return PRODUCTS == 1 ? i : i / 8 * 16 + product * 8 + i % 8; }

    MOE_DEVICE void fetch_weights(Weights &to, u32 k) const {
        const u32 wave = thread_index() / WARP, group = lane() / SIDE;
        const Chunk *tile = ptr<const Chunk>(p.weights + (weights + k) * TILE_BYTES) + wave * (WAVE_ROWS * TILE_ROW_BYTES / 16);
        MOE_UNROLL for (u32 i = 0; i < PRODUCTS; i++) {
            MOE_UNROLL for (u32 s = 0; s < CHUNKS<SIDE>; s++) {
                to.chunks[i][s] = tile[(s * GROUPS + group) * WAVE_ROWS + weight_row(i, lane() % SIDE)];
            }
        }
        if (SCALES == Scales::BLOCK) {
            const float *scales = ptr<const float>(p.weight_scales) + 2 * (weights + k);
            to.scales[0] = scales[0];
            to.scales[1] = scales[1];
        }
    }

    MOE_DEVICE void fetch_tokens(Carried &to, u32 k) const {
        MOE_UNROLL for (u32 i = 0; i < ROUNDS; i++) {
            to.chunks[i] = *ptr<const Chunk>(rows[i] + u64(k) * TILE_ROW_BYTES);
        }
        if (SCALES == Scales::BLOCK) to.scale = ptr<const float>(token_scales)[k];
    }

    // Puts what was fetched into buffer `at`.
    MOE_DEVICE void share_tokens(const Carried &from, u32 at) const {
        const u32 chunk = thread_index() % 8;
        MOE_UNROLL for (u32 i = 0; i < ROUNDS; i++) {
            const u32 row = i * (THREADS / 8) + thread_index() / 8;
            if (TOKENS * 8 % THREADS == 0 || row < TOKENS) m.tokens[at][row][chunk ^ row % 8] = from.chunks[i];
        }
        if (SCALES == Scales::BLOCK && thread_index() < TOKENS) m.token_scales[at][thread_index()] = from.scale;
    }

    // The products of a step with the tokens of buffer `at`.
    MOE_DEVICE void step(const Weights &weights, u32 at) {
        const u32 group = lane() / SIDE;
        MOE_UNROLL for (u32 c = 0; c < COLUMNS; c++) {
            const u32 token = c * SIDE + lane() % SIDE;
            Chunk tokens[CHUNKS<SIDE>];
            MOE_UNROLL for (u32 s = 0; s < CHUNKS<SIDE>; s++) {
                tokens[s] = m.tokens[at][token][(s * GROUPS + group) ^ token % 8];
            }
            if constexpr (SCALES == Scales::BLOCK) {
                const float scale = m.token_scales[at][token];
                const float scales[2] = {weights.scales[0] * scale, weights.scales[1] * scale};
                MOE_UNROLL for (u32 i = 0; i < PRODUCTS; i++) {
                    Sums<SIDE> part = {};
                    multiply<T, SIDE>(part, weights.chunks[i], tokens);
                    MOE_UNROLL for (u32 r = 0; r < SIDE * SIDE / WARP; r++) {
                        sum[i][c][r] = fused(part[r], scales[PRODUCTS == 2 ? i : r / 4 % 2], sum[i][c][r]);
                    }
                }
            } else {
                MOE_UNROLL for (u32 i = 0; i < PRODUCTS; i++) multiply<T, SIDE>(sum[i][c], weights.chunks[i], tokens);
            }
        }
    }

    // A step, and what is fetched meanwhile. Behind the last one its own bytes are fetched again: a branch would make the
    // compiler wait for all that is under way.
    MOE_DEVICE void round(Weights &weights, Carried &carried, u32 k) {
        const u32 last = p.k_tiles - 1;
        auto ahead = [&](u32 steps) { return k + steps < last ? k + steps : last; };
        // Tokens of this step are there, and those of the one before it have been read.
        sync_block();
        share_tokens(carried, (k + 1) % 2);
        fetch_tokens(carried, ahead(2));
        step(weights, k % 2);
        fetch_weights(weights, ahead(DEPTH));
    }

    MOE_DEVICE void run() {
        Weights weights[DEPTH];
        Carried carried;
        const u32 last = p.k_tiles - 1;
        fetch_tokens(carried, 0);
        MOE_UNROLL for (u32 d = 0; d < DEPTH; d++) fetch_weights(weights[d], d < last ? d : last);
        // The tile before this one has read what is overwritten here.
        sync_block();
        share_tokens(carried, 0);
        fetch_tokens(carried, last < 1 ? last : 1);
        u32 k = 0;
        for (; k + DEPTH <= p.k_tiles; k += DEPTH) {
            MOE_UNROLL for (u32 d = 0; d < DEPTH; d++) round(weights[d], carried, k + d);
        }
        MOE_UNROLL for (u32 d = 0; d + 1 < DEPTH; d++) {
            if (k + d < p.k_tiles) round(weights[d], carried, k + d);
        }
    }

    // Four results in rows next to each other, and the four that are eight rows further, of a pair. `slab` is the first of the
    // sixteen rows that they are among.
    MOE_DEVICE void store(u32 pair, u32 slab, u32 row, float (&first)[4], float (&other)[4], float token_scale) const {
        const u32 n = p.n_tiles * TILE_ROWS;
        if (SCALES == Scales::ROW) {
            const float *scales = ptr<const float>(p.weight_scales) + u64(w.expert) * n + slab + row;
            MOE_UNROLL for (u32 r = 0; r < 4; r++) {
                first[r] *= scales[r] * token_scale;
                other[r] *= scales[r + 8] * token_scale;
            }
        }
        if (p.has_activation) {
            MOE_UNROLL for (u32 r = 0; r < 4; r++) first[r] = silu_mul(first[r], other[r]);
            store_bf16(u64(pair) * (n / 2) + slab / 2 + row, first);
        } else if (p.out_is_bf16) {
            store_bf16(u64(pair) * n + slab + row, first);
            store_bf16(u64(pair) * n + slab + row + 8, other);
        } else {
            store_f32(u64(pair) * n + slab + row, first);
            store_f32(u64(pair) * n + slab + row + 8, other);
        }
    }

    MOE_DEVICE void store_bf16(u64 at, const float (&x)[4]) const {
        *ptr<u64>(p.out + 2 * at) = u64(two_bf16(x[2], x[3])) << 32 | two_bf16(x[0], x[1]);
    }

    MOE_DEVICE void store_f32(u64 at, const float (&x)[4]) const {
        *ptr<u32x4>(p.out + 4 * at) = {{to_bits(x[0]), to_bits(x[1]), to_bits(x[2]), to_bits(x[3])}};
    }

    MOE_DEVICE void store() const {
        const u32 wave = thread_index() / WARP, group = lane() / SIDE;
        MOE_UNROLL for (u32 c = 0; c < COLUMNS; c++) {
            const u32 token = c * SIDE + lane() % SIDE;
            if (token >= w.count) continue;
            const float scale = SCALES == Scales::ROW ? ptr<const float>(p.token_scales)[source(token)] : 1.0f;
            MOE_UNROLL for (u32 h = 0; h < 2 / PRODUCTS; h++) {
                float first[4], other[4];
                MOE_UNROLL for (u32 r = 0; r < 4; r++) {
                    first[r] = sum[0][c][8 * h + r];
                    other[r] = PRODUCTS == 1 ? sum[0][c][8 * h + 4 + r] : sum[PRODUCTS - 1][c][r];
                }
                const u32 half = PRODUCTS == 1 ? h : group / 2;
                const u32 slab = w.n_tile * TILE_ROWS + wave * WAVE_ROWS + half * 16;
                store(w.first + token, slab, group % 2 * 4, first, other, scale);
            }
        }
    }
};

template <class T, Scales SCALES, u32 TOKENS> MOE_DEVICE void grouped_gemm(const GroupedGemmParams &p, Memory<TOKENS> &m) {
    const u32 tiles = tiles::count<TOKENS, THREADS>(p, m.table);
    for (u32 tile = block_index(); tile < tiles; tile += p.blocks) {
        Tile<T, SCALES, TOKENS> work(p, m, tiles::find<TOKENS>(tile, m.table, p.experts));
        work.run();
        work.store();
    }
}
} // namespace moe::cdna

// A kernel for tiles of so many tokens.
#define MOE_GROUPED_GEMM(scheme, T, scales, tokens)                                                                    \
    MOE_KERNEL(grouped_gemm_##scheme##_##tokens, moe::GroupedGemmParams, moe::cdna::THREADS) {                          \
        MOE_SHARED(moe::cdna::Memory<tokens>, memory, 1);                                                              \
        moe::cdna::grouped_gemm<moe::cdna::T, moe::cdna::Scales::scales>(p, memory[0]);                                \
    }
