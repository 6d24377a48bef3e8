// Stage 3 on Hopper: the main loop of the grouped GEMMs.
//
// A block takes tiles of 128 weight rows by TOKENS tokens of one expert, over all of k. Few tokens are
// the second operand of wgmma, so that they waste nothing: at decode this is a machine that streams weights. Blocks are as many
// as multiprocessors and stay; tiles go round among them, those that share weights next to each other.
//
// Warpgroup 2 fetches, up to STAGES steps of 128 bytes of k ahead and across tiles, so that memory is busy while others store:
// one thread copies the weight tile in one piece, and all of them gather rows of tokens. Warpgroups 0 and 1 multiply, each
// half of the weights where tokens are few, and half of the tokens where they fill the tile. There, blocks go in pairs that
// multiply two tiles of tokens with the same weights, of which each fetches half for both.
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

// Tiles of weights that a block takes at once. What it multiplies comes from the L2 cache, which is what limits it where tokens
// fill a tile: with twice the weights, each byte serves a third more products.
template <u32 TOKENS> constexpr u32 WIDTH = TOKENS >= 128 ? 2 : 1;

// Blocks that work in pairs, where tokens fill a tile: each fetches half of the weights that both multiply, so that they leave
// the L2 cache once for two tiles of tokens.
template <u32 TOKENS> constexpr u32 BLOCKS = TOKENS >= 128 ? 2 : 1;

template <u32 TOKENS> struct Stage {
    alignas(1024) u8 weights[WIDTH<TOKENS>][TILE_BYTES];
    alignas(1024) u8 tokens[TOKENS * TILE_ROW_BYTES];
};

template <u32 TOKENS, u32 STAGES> struct Memory {
    Stage<TOKENS> stages[STAGES];
    float token_scales[STAGES][TOKENS];
    float weight_scales[STAGES][WIDTH<TOKENS>][2];
    u32 offsets[MAX_EXPERTS + 1];
    u32 first_tile[MAX_EXPERTS + 1];
    Barrier full[STAGES];
    Barrier empty[STAGES];
};

// A tile of work.
struct Work {
    u32 expert, n_tile, first, count; // tiles of weights from n_tile on, pairs [first, first + count)
    bool is_shared;                   // the other block of the pair has the same weights
};

// Places of a block along the weights.
template <u32 TOKENS> MOE_DEVICE u32 places(u32 n_tiles) { return (n_tiles + WIDTH<TOKENS> - 1) / WIDTH<TOKENS>; }

template <u32 TOKENS> MOE_DEVICE Work work(u32 tile, const u32 *first_tile, const u32 *offsets, u32 experts, u32 n_tiles) {
    u32 low = 0, high = experts;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (first_tile[middle] <= tile) low = middle;
        else high = middle;
    }
    const u32 in_expert = tile - first_tile[low];
    const u32 pairs = offsets[low + 1] - offsets[low];
    const u32 token_tiles = (pairs + TOKENS - 1) / TOKENS;
    u32 place, token_tile;
    bool is_shared = false;
    if constexpr (BLOCKS<TOKENS> == 1) {
        place = in_expert / token_tiles;
        token_tile = in_expert % token_tiles;
    } else {
        // Two tiles of tokens for a pair of blocks; of the one that may be left, each has other weights.
        const u32 twos = token_tiles / 2, rank = rank_in_pair(), all = places<TOKENS>(n_tiles);
        is_shared = in_expert < twos * all;
        if (is_shared) {
            place = in_expert / twos;
            token_tile = in_expert % twos * 2 + rank;
        } else {
            place = (in_expert - twos * all) * 2 + rank;
            token_tile = token_tiles - 1;
            if (place == all) return {low, (all - 1) * WIDTH<TOKENS>, offsets[low], 0, false};
        }
    }
    const u32 left = pairs - token_tile * TOKENS;
    return {low, place * WIDTH<TOKENS>, offsets[low] + token_tile * TOKENS, left < TOKENS ? left : TOKENS, is_shared};
}

// Tiles of work of an expert with so many pairs.
template <u32 TOKENS> MOE_DEVICE u32 works(u32 pairs, u32 n_tiles) {
    const u32 token_tiles = (pairs + TOKENS - 1) / TOKENS, all = places<TOKENS>(n_tiles);
    if (BLOCKS<TOKENS> == 1) return token_tiles * all;
    return token_tiles / 2 * all + token_tiles % 2 * ((all + 1) / 2);
}

template <Scales SCALES, u32 TOKENS, u32 STAGES>
MOE_DEVICE void fetch(const GroupedGemmParams &p, Memory<TOKENS, STAGES> &m) {
    constexpr u32 THREADS = 128, CHUNKS = TILE_ROW_BYTES / 16, ROWS = THREADS / CHUNKS;
    constexpr u32 ROUNDS = (TOKENS + ROWS - 1) / ROWS;
    static_assert(ROWS % 8 == 0, "a thread has the same place in a group of eight rows in every round");
    const u32 thread = thread_index() % THREADS, tiles = m.first_tile[p.experts];
    const u32 first_row = thread / CHUNKS, chunk = thread % CHUNKS;
    const u32 to = first_row * TILE_ROW_BYTES + (chunk ^ first_row % 8) * 16;
    const u64 row_bytes = u64(p.k_tiles) * TILE_ROW_BYTES;
    if constexpr (BLOCKS<TOKENS> == 2) acquire_map(p.weights_map);
    u32 step = 0;
    for (u32 tile = block_index() / BLOCKS<TOKENS>; tile < tiles; tile += p.blocks / BLOCKS<TOKENS>) {
        const Work w = work<TOKENS>(tile, m.first_tile, m.offsets, p.experts, p.n_tiles);
        u64 weights[WIDTH<TOKENS>];
        // Where there is no other tile, the last one comes twice.
        MOE_UNROLL for (u32 i = 0; i < WIDTH<TOKENS>; i++) {
            const u32 n_tile = w.n_tile + i < p.n_tiles ? w.n_tile + i : w.n_tile;
            weights[i] = (u64(w.expert) * p.n_tiles + n_tile) * p.k_tiles;
        }
        // The row that a pair has; that of the first pair where there is none.
        auto source = [&](u32 row) {
            const u32 pair = w.first + (row < w.count ? row : 0);
            return p.rows ? ptr<const u32>(p.rows)[pair] : pair;
        };
        u32 sources[ROUNDS];
        MOE_UNROLL for (u32 i = 0; i < ROUNDS; i++) sources[i] = source(i * ROWS + first_row);
        u64 token_scale = 0;
        if (SCALES == Scales::BLOCK && thread < TOKENS) token_scale = p.token_scales + 4 * (u64(source(thread)) * p.k_tiles);
        for (u32 k = 0; k < p.k_tiles; k++, step++) {
            const u32 at = step % STAGES, turn = step / STAGES;
            m.empty[at].wait((turn & 1) ^ 1);
            auto &stage = m.stages[at];
            if (thread == 0) {
                m.full[at].arrive_expecting(sizeof(stage.weights));
                // Of two tiles that both blocks multiply, each fetches one for both.
                static_assert(BLOCKS<TOKENS> <= WIDTH<TOKENS>, "a block of a pair has a tile to fetch");
                const u32 mine = BLOCKS<TOKENS> == 2 ? rank_in_pair() : 0;
                if (w.is_shared) {
                    const u64 of_mine = mine == 0 ? weights[0] : weights[WIDTH<TOKENS> - 1];
                    box_to_pair(stage.weights[mine], p.weights_map, u32(of_mine + k) * TILE_ROWS, m.full[at]);
                } else {
                    MOE_UNROLL for (u32 i = 0; i < WIDTH<TOKENS>; i++) {
                        const u64 from = p.weights + (weights[i] + k) * TILE_BYTES;
                        bulk_copy<(TOKENS < 128)>(stage.weights[i], from, TILE_BYTES, m.full[at]);
                    }
                }
            }
            const u32 tokens = shared_address(stage.tokens) + to;
            const u64 from = p.tokens + u64(k) * TILE_ROW_BYTES + chunk * 16;
            MOE_UNROLL for (u32 i = 0; i < ROUNDS; i++) {
                const u32 row = i * ROWS + first_row;
                if (TOKENS % ROWS == 0 || row < TOKENS) {
                    copy16(tokens + i * ROWS * TILE_ROW_BYTES, from + sources[i] * row_bytes, row < w.count);
                }
            }
            if (SCALES == Scales::BLOCK) {
                if (thread < TOKENS) copy4(shared_address(&m.token_scales[at][thread]), token_scale + 4 * k, true);
                if (thread == THREADS - 1) {
                    MOE_UNROLL for (u32 i = 0; i < WIDTH<TOKENS>; i++) {
                        copy8(shared_address(m.weight_scales[at][i]), p.weight_scales + 8 * (weights[i] + k));
                    }
                }
            }
            arrive_with_copies(m.full[at]);
        }
    }
}

// gate·sigmoid(gate)·up. The division is the fast one, within two units of the last place of f32: what comes of it is rounded to
// bf16, and the exact one made the end of a tile a tenth of its time.
MOE_DEVICE float silu_mul(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

// Results of a packed weight row and of the one eight further, which are gate and up where there is an activation.
struct Pair {
    float first, other;
};

// The scales of rows, where they have some.
template <Scales SCALES> MOE_DEVICE Pair row_scales(const GroupedGemmParams &p, const Work &w, u32 row) {
    if (SCALES != Scales::ROW) return {1.0f, 1.0f};
    const float *scales = ptr<const float>(p.weight_scales) + u64(w.expert) * p.n_tiles * TILE_ROWS + row;
    return {scales[0], scales[8]};
}

template <Scales SCALES> MOE_DEVICE float token_scale(const GroupedGemmParams &p, u64 pair) {
    if (SCALES != Scales::ROW) return 1.0f;
    const u32 source = p.rows ? ptr<const u32>(p.rows)[pair] : u32(pair);
    return ptr<const float>(p.token_scales)[source];
}

// Stores the results of a row, and of the one eight further, for a token. `slab` is the first of the sixteen rows that they are
// among.
template <Scales SCALES>
MOE_DEVICE void store(const GroupedGemmParams &p, u64 pair, u32 slab, u32 row, Pair d, Pair scales) {
    const u32 n = p.n_tiles * TILE_ROWS;
    if (SCALES == Scales::ROW) {
        const float scale = token_scale<SCALES>(p, pair);
        d.first *= scales.first * scale;
        d.other *= scales.other * scale;
    }
    if (p.has_activation) {
        ptr<u16>(p.out)[pair * (n / 2) + (row - slab / 2)] = to_bf16(silu_mul(d.first, d.other));
    } else if (p.out_is_bf16) {
        u16 *out = ptr<u16>(p.out) + pair * n + row;
        out[0] = to_bf16(d.first);
        out[8] = to_bf16(d.other);
    } else {
        float *out = ptr<float>(p.out) + pair * n + row;
        out[0] = d.first;
        out[8] = d.other;
    }
}

// The words of four threads next to each other, [thread][word], turned to [word][thread].
MOE_DEVICE void transpose_quad(u32 (&w)[4]) {
    MOE_UNROLL for (u32 apart = 2; apart > 0; apart /= 2) {
        const bool upper = thread_index() & apart;
        MOE_UNROLL for (u32 i = 0; i < 4; i++) {
            if (i & apart) continue;
            u32 &low = w[i], &high = w[i + apart];
            const u32 theirs = __shfl_xor_sync(0xffffffff, upper ? low : high, apart);
            (upper ? low : high) = theirs;
        }
    }
}

// The sums of a warpgroup, with the weights as rows: 64 of them, by TOKENS tokens. A thread has two packed rows, of gate and of
// up where there are both, and a quarter of the tokens.
template <class T, Scales SCALES, u32 TOKENS> struct WeightsByTokens {
    static constexpr u32 SUMS = TOKENS / 2;
    // Bytes of the operands in shared memory between the two warpgroups.
    static constexpr u32 WEIGHTS_APART = TILE_BYTES / 2, TOKENS_APART = 0;

    static MOE_DEVICE void product(float (&d)[SUMS], u32 weights, u32 tokens, bool add) {
        Product<T, TOKENS>::run(d, operand(weights), operand(tokens), add);
    }

    // What the products of a step are scaled by; tokens are too many for registers.
    struct Factors {
        float first, other;
        const float *tokens;

        MOE_DEVICE Factors times(float x) const { return {first * x, other * x, tokens}; }
    };
    static constexpr bool FACTORS_ARE_HELD = false;

    static MOE_DEVICE Factors factors(const float *weights, const float *tokens) { return {weights[0], weights[1], tokens}; }

    static MOE_DEVICE void add(float (&sum)[SUMS], const float (&part)[SUMS], const Factors &factors) {
        const u32 column = thread_index() % 4 * 2;
        const float first_scale = factors.first, other_scale = factors.other;
        MOE_UNROLL for (u32 j = 0; j < TOKENS / 8; j++) {
            MOE_UNROLL for (u32 i = 0; i < 2; i++) {
                const float scale = factors.tokens[j * 8 + column + i];
                sum[4 * j + i] = fmaf(part[4 * j + i], first_scale * scale, sum[4 * j + i]);
                sum[4 * j + 2 + i] = fmaf(part[4 * j + 2 + i], other_scale * scale, sum[4 * j + 2 + i]);
            }
        }
    }

    static MOE_DEVICE void store(const GroupedGemmParams &p, const Work &w, const float (&d)[SUMS]) {
        const u32 thread = thread_index() % 128, half = thread_index() / 128;
        const u32 slab = w.n_tile * TILE_ROWS + half * (TILE_ROWS / 2) + thread / 32 * 16, row = thread % 32 / 4;
        const Pair scales = row_scales<SCALES>(p, w, slab + row);
        MOE_UNROLL for (u32 j = 0; j < TOKENS / 8; j++) {
            MOE_UNROLL for (u32 i = 0; i < 2; i++) {
                const u32 token = j * 8 + thread % 4 * 2 + i;
                const Pair results = {d[4 * j + i], d[4 * j + 2 + i]};
                if (token < w.count) moe::sm90::store<SCALES>(p, w.first + token, slab, slab + row, results, scales);
            }
        }
    }
};

// The same with tokens as rows: 64 of the tile's 128, by 128 weight rows. A thread has two tokens, so that their scales are few;
// of the weights it has two of each eight, and gate and up in turn.
template <class T, Scales SCALES> struct TokensByWeights {
    static constexpr u32 SUMS = TILE_ROWS / 2;
    static constexpr u32 WEIGHTS_APART = 0, TOKENS_APART = 64 * TILE_ROW_BYTES;

    static MOE_DEVICE void product(float (&d)[SUMS], u32 weights, u32 tokens, bool add) {
        Product<T, TILE_ROWS>::run(d, operand(tokens), operand(weights), add);
    }

    // The first of the two tokens; the other is eight further.
    static MOE_DEVICE u32 first_token() { return thread_index() / 32 * 16 + thread_index() % 32 / 4; }

    // What the products of a step are scaled by: [token][weight row].
    struct Factors {
        float of[2][2];

        MOE_DEVICE Factors times(float x) const { return {{{of[0][0] * x, of[0][1] * x}, {of[1][0] * x, of[1][1] * x}}}; }
    };
    static constexpr bool FACTORS_ARE_HELD = true;

    static MOE_DEVICE Factors factors(const float *weights, const float *tokens) {
        const float of_tokens[2] = {tokens[first_token()], tokens[first_token() + 8]};
        Factors factors;
        MOE_UNROLL for (u32 i = 0; i < 4; i++) factors.of[i / 2][i % 2] = weights[i % 2] * of_tokens[i / 2];
        return factors;
    }

    static MOE_DEVICE void add(float (&sum)[SUMS], const float (&part)[SUMS], const Factors &factors) {
        MOE_UNROLL for (u32 i = 0; i < SUMS; i++) sum[i] = fmaf(part[i], factors.of[i / 2 % 2][i / 4 % 2], sum[i]);
    }

    // Both tokens' results in bf16, 16 bytes of a row from a thread: the four threads that have two columns each of eight
    // exchange them so that each has all eight of every fourth group.
    template <bool ACTIVATED> static MOE_DEVICE void store_bf16(const GroupedGemmParams &p, const Work &w, float (&d)[SUMS]) {
        constexpr u32 GROUPS = ACTIVATED ? TILE_ROWS / 16 : TILE_ROWS / 8;
        const u32 quad = thread_index() % 4, width = p.n_tiles * (GROUPS * 8);
        MOE_UNROLL for (u32 t = 0; t < 2; t++) {
            const u32 token = first_token() + t * 8;
            u16 *out = ptr<u16>(p.out) + u64(w.first + token) * width + w.n_tile * (GROUPS * 8) + quad * 8;
            MOE_UNROLL for (u32 g = 0; g < GROUPS; g += 4) {
                u32 words[4];
                MOE_UNROLL for (u32 i = 0; i < 4; i++) {
                    const u32 at = (g + i) * (ACTIVATED ? 8 : 4) + 2 * t;
                    if (ACTIVATED) words[i] = two_bf16(silu_mul(d[at], d[at + 4]), silu_mul(d[at + 1], d[at + 5]));
                    else words[i] = two_bf16(d[at], d[at + 1]);
                }
                transpose_quad(words);
                if (token < w.count) *reinterpret_cast<uint4 *>(out + g * 8) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }

    static MOE_DEVICE void store(const GroupedGemmParams &p, const Work &w, float (&d)[SUMS]) {
        const u32 column = thread_index() % 4 * 2;
        if (SCALES == Scales::ROW) {
            float of_tokens[2];
            MOE_UNROLL for (u32 t = 0; t < 2; t++) {
                const u32 token = first_token() + t * 8;
                of_tokens[t] = token_scale<SCALES>(p, w.first + (token < w.count ? token : 0));
            }
            MOE_UNROLL for (u32 j = 0; j < TILE_ROWS / 16; j++) {
                const u32 row = w.n_tile * TILE_ROWS + j * 16 + column;
                const Pair scales[2] = {row_scales<SCALES>(p, w, row), row_scales<SCALES>(p, w, row + 1)};
                MOE_UNROLL for (u32 i = 0; i < 8; i++) {
                    const float scale = i < 4 ? scales[i % 2].first : scales[i % 2].other;
                    d[8 * j + i] *= scale * of_tokens[i / 2 % 2];
                }
            }
        }
        if (p.has_activation) return store_bf16<true>(p, w, d);
        if (p.out_is_bf16) return store_bf16<false>(p, w, d);
        MOE_UNROLL for (u32 t = 0; t < 2; t++) {
            const u32 token = first_token() + t * 8;
            float *out = ptr<float>(p.out) + u64(w.first + token) * (p.n_tiles * TILE_ROWS) + w.n_tile * TILE_ROWS + column;
            if (token < w.count) {
                MOE_UNROLL for (u32 j = 0; j < TILE_ROWS / 8; j++) {
                    *reinterpret_cast<float2 *>(out + 8 * j) = make_float2(d[4 * j + 2 * t], d[4 * j + 2 * t + 1]);
                }
            }
        }
    }
};

// A warp has read a stage.
template <u32 TOKENS> MOE_DEVICE void release(Barrier &empty) {
    __syncwarp();
    if (BLOCKS<TOKENS> == 1) {
        if (lane() == 0) empty.arrive();
    } else {
        if (lane() < 2) arrive_at(empty, lane());
    }
}

// What a warpgroup does for a tile: the products of k_tiles steps, of which `step` is the first.
template <class Sums, Scales SCALES, u32 TOKENS, u32 STAGES> struct Steps {
    const GroupedGemmParams &p;
    Memory<TOKENS, STAGES> &m;
    u32 half; // which of the two warpgroups
    u32 step;
    float sum[WIDTH<TOKENS>][Sums::SUMS];

    MOE_DEVICE void wait(u32 k) {
        m.full[(step + k) % STAGES].wait((step + k) / STAGES & 1);
        fence_async();
    }

    // Starts the products of a step with a tile of weights.
    MOE_DEVICE void start(float (&d)[Sums::SUMS], u32 k, u32 tile, bool add) {
        auto &stage = m.stages[(step + k) % STAGES];
        const u32 weights = shared_address(stage.weights[tile]) + half * Sums::WEIGHTS_APART;
        const u32 tokens = shared_address(stage.tokens) + half * Sums::TOKENS_APART;
        MOE_UNROLL for (u32 i = 0; i < 4; i++) Sums::product(d, weights + 32 * i, tokens + 32 * i, add || i > 0);
    }

    // Sums that stay in the products' registers.
    MOE_DEVICE void in_place() {
        for (u32 k = 0; k < p.k_tiles; k++) {
            wait(k);
            begin_products();
            MOE_UNROLL for (u32 i = 0; i < WIDTH<TOKENS>; i++) start(sum[i], k, i, true);
            close_products();
            // The step before this one is done, and its memory can be filled again.
            wait_products<1>();
            if (k > 0) release<TOKENS>(m.empty[(step + k - 1) % STAGES]);
        }
        wait_products<0>();
        const float one = one_from_here();
        MOE_UNROLL for (u32 i = 0; i < WIDTH<TOKENS>; i++) {
            MOE_UNROLL for (u32 j = 0; j < Sums::SUMS; j++) sum[i][j] *= one;
        }
        release<TOKENS>(m.empty[(step + p.k_tiles - 1) % STAGES]);
    }

    // Products of each step by themselves. While a warpgroup scales and adds them, the other one multiplies; while they are
    // made, the warpgroup waits for the next step.
    MOE_DEVICE void in_parts() {
        // Nothing of the stage is read after its products.
        constexpr bool HELD = SCALES != Scales::BLOCK || Sums::FACTORS_ARE_HELD;
        wait(0);
        for (u32 k = 0; k < p.k_tiles; k++) {
            const u32 at = (step + k) % STAGES;
            typename Sums::Factors factors[WIDTH<TOKENS>];
            MOE_UNROLL for (u32 i = 0; i < WIDTH<TOKENS>; i++) {
                if (SCALES == Scales::BLOCK) factors[i] = Sums::factors(m.weight_scales[at][i], m.token_scales[at]);
            }
            MOE_UNROLL for (u32 i = 0; i < WIDTH<TOKENS>; i++) {
                const bool is_last = i + 1 == WIDTH<TOKENS>;
                float part[Sums::SUMS];
                begin_products();
                start(part, k, i, false);
                close_products();
                if (is_last && k + 1 < p.k_tiles) wait(k + 1);
                wait_products<0>();
                if (is_last && HELD) release<TOKENS>(m.empty[at]);
                const float one = one_from_here();
                if constexpr (SCALES == Scales::BLOCK) {
                    Sums::add(sum[i], part, factors[i].times(one));
                } else {
                    MOE_UNROLL for (u32 j = 0; j < Sums::SUMS; j++) sum[i][j] = fmaf(part[j], one, sum[i][j]);
                }
                if (is_last && !HELD) release<TOKENS>(m.empty[at]);
            }
        }
    }

    // Nothing: the tile has no tokens for this warpgroup.
    MOE_DEVICE void none() {
        for (u32 k = 0; k < p.k_tiles; k++) {
            wait(k);
            release<TOKENS>(m.empty[(step + k) % STAGES]);
        }
    }
};

template <class Sums, Scales SCALES, u32 TOKENS, u32 STAGES>
MOE_DEVICE void multiply(const GroupedGemmParams &p, Memory<TOKENS, STAGES> &m) {
    const u32 tiles = of_warp(m.first_tile[p.experts]), half = of_warp(thread_index() / 128);
    Steps<Sums, SCALES, TOKENS, STAGES> steps{p, m, half, 0, {}};
    for (u32 tile = block_index() / BLOCKS<TOKENS>; tile < tiles; tile += p.blocks / BLOCKS<TOKENS>, steps.step += p.k_tiles) {
        const Work w = work<TOKENS>(tile, m.first_tile, m.offsets, p.experts, p.n_tiles);
        if (Sums::TOKENS_APART > 0 && half * (TOKENS / 2) >= of_warp(w.count)) {
            steps.none();
            continue;
        }
        MOE_UNROLL for (u32 i = 0; i < WIDTH<TOKENS>; i++) {
            MOE_UNROLL for (u32 j = 0; j < Sums::SUMS; j++) steps.sum[i][j] = 0.0f;
        }
        if constexpr (SCALES == Scales::NONE) steps.in_place();
        else steps.in_parts();
        MOE_UNROLL for (u32 i = 0; i < WIDTH<TOKENS>; i++) {
            if (w.n_tile + i < p.n_tiles) Sums::store(p, {w.expert, w.n_tile + i, w.first, w.count, false}, steps.sum[i]);
        }
    }
}

template <class T, Scales SCALES, u32 TOKENS, u32 STAGES>
MOE_DEVICE void grouped_gemm(const GroupedGemmParams &p) {
    extern __shared__ __align__(1024) u8 raw[];
    auto &m = *reinterpret_cast<Memory<TOKENS, STAGES> *>(raw);
    static_assert(sizeof(m) <= GROUPED_GEMM_SHARED_BYTES, "fewer stages");
    // Sums of so many tokens need the registers that fetching does not. The block starts with 168 of each thread.
    constexpr bool WIDE = TOKENS >= 128;
    const u32 thread = thread_index();
    for (u32 i = thread; i <= p.experts; i += GROUPED_GEMM_THREADS) m.offsets[i] = ptr<const u32>(p.offsets)[i];
    if (thread == 0) {
        for (u32 i = 0; i < STAGES; i++) {
            m.full[i].init(1 + 128);
            // A lane of each warp that multiplies.
            m.empty[i].init(BLOCKS<TOKENS> * 2 * 128 / WARP);
        }
        fence_barriers();
    }
    sync_block();
    if (thread == 0) {
        u32 tiles = 0;
        for (u32 e = 0; e < p.experts; e++) {
            m.first_tile[e] = tiles;
            tiles += works<TOKENS>(m.offsets[e + 1] - m.offsets[e], p.n_tiles);
        }
        m.first_tile[p.experts] = tiles;
    }
    if constexpr (BLOCKS<TOKENS> == 1) sync_block();
    else sync_pair();
    if (thread / 128 == 2) {
        if constexpr (WIDE) give_registers<56>();
        fetch<SCALES>(p, m);
    } else {
        if constexpr (WIDE) take_registers<224>();
        if constexpr (WIDE) {
            multiply<TokensByWeights<T, SCALES>, SCALES>(p, m);
        } else {
            multiply<WeightsByTokens<T, SCALES, TOKENS>, SCALES>(p, m);
        }
    }
    // Nobody leaves whose shared memory the other one may still write to.
    if constexpr (BLOCKS<TOKENS> == 2) sync_pair();
}
} // namespace moe::sm90
