// Stage 1 and the sort before stage 3: logits to the best experts of each row, their weights, and where the pairs of each
// expert are, in one launch.
//
// A warp has a row, a lane some experts in a row, so that of equal scores the lowest lane has the lowest id. A block has up to
// 32 rows: for each local expert a mask of them. Blocks tell each other how many bits their masks have and meet once; then
// each knows where its own pairs are, in the order of rows. No order of threads can change that.

#include "../common/block.h"
#include "formulas.h"
#include "router.h"

using namespace moe;

namespace {
constexpr u32 WARPS = ROUTER_THREADS / WARP;
constexpr u32 NONE = ~0u;

// A block's memory.
struct Shared {
    u32 *masks; // [experts]: bits of the block's rows
    u32 *bases; // [experts]: the first pair of the block
    i32 *local; // [block_rows, top_k]: local experts, negative if elsewhere
    u32 *sums;  // a word per warp
};

MOE_DEVICE float logit(const RouterParams &p, u64 at) {
    return p.logits_are_bf16 ? from_bits(u32(ptr<const u16>(p.logits)[at]) << 16) : ptr<const float>(p.logits)[at];
}

// The lane's part of a row of f32, or of bf16, from `first` on; beyond the end it is `other`.
template <u32 N> struct Lane {
    u32 first, count; // of experts
    u32 end;          // how many of them there are
    u32 last;         // of all
    bool is_aligned;

    MOE_DEVICE explicit Lane(const RouterParams &p) {
        count = WARP == 32 ? p.lane_experts_32 : p.lane_experts_64;
        first = lane() * count;
        last = p.num_experts - 1;
        end = first < p.num_experts ? p.num_experts - first : 0;
        end = end < count ? end : count;
        is_aligned = count % 4 == 0 && p.num_experts % 4 == 0;
    }

    MOE_DEVICE void load(u64 from, bool is_bf16, float other, float (&x)[N]) const {
        const u32 end = afresh(this->end);
        MOE_UNROLL for (u32 i = 0; i < N; i++) x[i] = other;
        if (N % 4 == 0 && is_aligned) {
            MOE_UNROLL for (u32 i = 0; i < N; i += 4) {
                if (i >= end) continue;
                if (is_bf16) {
                    const u64 words = *ptr<const u64>(from + 2 * (first + i));
                    x[i] = low_bf16(u32(words)), x[i + 1] = high_bf16(u32(words));
                    x[i + 2] = low_bf16(u32(words >> 32)), x[i + 3] = high_bf16(u32(words >> 32));
                } else {
                    const u32x4 words = *ptr<const u32x4>(from + 4 * (first + i));
                    MOE_UNROLL for (u32 j = 0; j < 4; j++) x[i + j] = from_bits(words.v[j]);
                }
            }
            return;
        }
        // What a lane has not is loaded, too: branches would cost more.
        MOE_UNROLL for (u32 i = 0; i < N; i++) {
            const u32 at = first + i < last ? first + i : last;
            x[i] = is_bf16 ? from_bits(u32(ptr<const u16>(from)[at]) << 16) : ptr<const float>(from)[at];
        }
        MOE_UNROLL for (u32 i = 0; i < N; i++) x[i] = i < end ? x[i] : other, in_turn();
    }
};

// What a score needs of the whole row.
struct Row {
    float top, sum; // of a softmax
};

MOE_DEVICE float score(u32 which, const Row &row, float x) {
    switch (which) {
    case SOFTMAX: return row.sum > 0.0f ? exponential(x - row.top) / row.sum : 0.0f;
    case SIGMOID: return sigmoid(x);
    case SQRT_SOFTPLUS: return sqrt_softplus(x);
    // What may not be chosen and is, for want of others, must not make the output infinite.
    default: return x > -infinity() ? x : 0.0f;
    }
}

template <u32 N> MOE_DEVICE void score_all(u32 which, const Row &row, float (&x)[N]) {
    switch (which) {
    case SOFTMAX: {
        MOE_UNROLL for (u32 i = 0; i < N; i++) x[i] = score(SOFTMAX, row, x[i]), in_turn();
        return;
    }
    case SIGMOID: {
        MOE_UNROLL for (u32 i = 0; i < N; i++) x[i] = score(SIGMOID, row, x[i]), in_turn();
        return;
    }
    case SQRT_SOFTPLUS: {
        MOE_UNROLL for (u32 i = 0; i < N; i++) x[i] = score(SQRT_SOFTPLUS, row, x[i]), in_turn();
        return;
    }
    }
}

template <u32 N> MOE_DEVICE Row softmax_of(const float (&x)[N]) {
    u32 top = 0;
    MOE_UNROLL for (u32 i = 0; i < N; i++) top = larger(top, to_order(x[i]));
    Row row = {from_order(max_lanes(top)), 0.0f};
    // The same for all lanes.
    if (!(row.top > -infinity())) return row;
    u64 units = 0;
    MOE_UNROLL for (u32 i = 0; i < N; i++) units += softmax_units(exponential(x[i] - row.top));
    row.sum = from_units(sum_units(units));
    return row;
}

// Whether the lane's experts are of a group that may be chosen from. Of equal groups it is the lower one.
template <u32 N> MOE_DEVICE bool is_kept(const RouterParams &p, u32 lane_experts, const u32 (&order)[N]) {
    const u32 size = p.num_experts / p.n_group, lanes = size / lane_experts, group = lane() / lanes;
    u32 first = 0, second = 0;
    MOE_UNROLL for (u32 i = 0; i < N; i++) {
        second = larger(second, order[i] < first ? order[i] : first);
        first = larger(first, order[i]);
    }
    u32 best = 0, next = 0;
    for (u32 i = 0; i < lanes; i++) {
        const u32 a = shuffle(first, group * lanes + i), b = shuffle(second, group * lanes + i);
        next = larger(larger(next, b), a < best ? a : best);
        best = larger(best, a);
    }
    if (p.by_score && size > 1) best = to_order(from_order(best) + from_order(next));
    u32 ahead = 0;
    for (u32 other = 0; other < p.n_group; other++) {
        const u32 theirs = shuffle(best, other * lanes);
        ahead += theirs > best || (theirs == best && other < group);
    }
    return ahead < p.topk_group;
}

// Lane i gets the expert with the i-th largest order, the lower of equal ones; orders of what is taken become 0.
template <u32 N> MOE_DEVICE u32 choose(const RouterParams &p, u32 first, u32 (&order)[N]) {
    u32 chosen = 0, best = 0;
    MOE_UNROLL for (u32 i = 0; i < N; i++) best = larger(best, order[i]);
    for (u32 slot = 0; slot < p.top_k; slot++) {
        const u32 top = max_lanes(best);
        const u32 winner = first_bit(lanes_where(best == top));
        u32 at = 0;
        if (lane() == winner) {
            MOE_UNROLL for (u32 i = N; i-- > 0;) at = order[i] == top ? i : at;
            best = 0;
            MOE_UNROLL for (u32 i = 0; i < N; i++) {
                order[i] = at == i ? 0 : order[i];
                best = larger(best, order[i]);
            }
            at += first;
        }
        at = shuffle(at, winner);
        if (lane() == slot) chosen = at;
    }
    return chosen;
}

// The sum of lanes 0..top_k, in their order.
MOE_DEVICE float sum_slots(float x, u32 top_k) {
    float sum = shuffle(x, 0);
    for (u32 slot = 1; slot < top_k; slot++) sum = sum + shuffle(x, slot);
    return sum;
}

MOE_DEVICE float divided(float x, float sum) { return sum > 0.0f ? x / sum : x; }

// The weight of the expert of each of the lanes 0..top_k.
MOE_DEVICE float weigh(const RouterParams &p, const Row &row, float x) {
    const bool has_slot = lane() < p.top_k;
    float weight = 0.0f;
    if (p.score == SOFTMAX_OF_CHOSEN) {
        const float top = from_order(max_lanes(has_slot ? to_order(x) : 0));
        // The same for all lanes.
        if (top > -infinity()) {
            if (has_slot) weight = exponential(x - top);
            weight = divided(weight, sum_slots(weight, p.top_k) + 0.0f);
        }
    } else if (has_slot) {
        weight = score(p.score, row, x);
    }
    if (p.is_divided) weight = divided(weight, sum_slots(weight, p.top_k) + p.epsilon);
    return weight * p.factor;
}

// Writes the slots of a row, of which lane i has one, and notes them in the block's memory if they are to be sorted.
MOE_DEVICE void write(const RouterParams &p, const Shared &s, u32 row, i32 id, float weight) {
    if (lane() >= p.top_k) return;
    const u64 at = u64(row) * p.top_k + lane();
    ptr<i32>(p.ids)[at] = id;
    ptr<float>(p.weights)[at] = weight;
    if (p.experts == 0) return;
    const u32 of_block = row - block_index() * p.block_rows;
    i32 local = id >= 0 && p.map ? ptr<const i32>(p.map)[id] : id;
    if (local >= i32(p.experts)) local = -1;
    s.local[of_block * p.top_k + lane()] = local;
    if (local >= 0) fetch_or(&s.masks[local], 1u << of_block);
}

// A row, by a warp.
template <u32 N> MOE_DEVICE void route(const RouterParams &p, const Shared &s, const Lane<N> &part, u32 row) {
    const u64 at = u64(row) * p.num_experts;
    float x[N];
    part.load(p.logits + at * (p.logits_are_bf16 ? 2 : 4), p.logits_are_bf16, -infinity(), x);
    u32 bad = NONE;
    MOE_UNROLL for (u32 i = N; i-- > 0;) bad = x[i] < infinity() ? bad : part.first + i;
    const u64 bad_lanes = lanes_where(bad != NONE);
    if (bad_lanes != 0) {
        bad = shuffle(bad, first_bit(bad_lanes));
        if (lane() == 0) fetch_max(&ptr<RouterWorkspace>(p.workspace)->fault, ~(u32(at) + bad));
        write(p, s, row, -1, 0.0f);
        return;
    }

    Row all = {0.0f, 0.0f};
    if (p.score == SOFTMAX) all = softmax_of(x);
    if (p.by_score) {
        float bias[N] = {};
        if (p.bias) part.load(p.bias, false, 0.0f, bias);
        score_all(p.score, all, x);
        MOE_UNROLL for (u32 i = 0; i < N; i++) x[i] = x[i] + bias[i];
    }
    u32 order[N];
    const u32 end = afresh(part.end);
    MOE_UNROLL for (u32 i = 0; i < N; i++) order[i] = i < end ? to_order(x[i]) : 0;
    if (p.topk_group < p.n_group && !is_kept(p, part.count, order)) {
        MOE_UNROLL for (u32 i = 0; i < N; i++) order[i] = 0;
    }
    const u32 chosen = choose(p, part.first, order);
    const float weight = weigh(p, all, lane() < p.top_k ? logit(p, at + chosen) : 0.0f);
    write(p, s, row, i32(chosen), weight);
}

// The sum of the first `count` bytes.
MOE_DEVICE u32 sum_of_first(const u32 (&words)[ROUTER_BLOCKS / 4], u32 count) {
    const u32 whole = afresh(count / 4), part = (1u << (count % 4 * 8)) - 1;
    u32 sum = 0;
    MOE_UNROLL for (u32 i = 0; i < ROUTER_BLOCKS / 4; i++) {
        sum = add_bytes(i < whole ? words[i] : i == whole ? words[i] & part : 0, sum);
    }
    return sum;
}

// Pairs of an expert in the blocks before this one, and in all.
MOE_DEVICE void count(const RouterParams &p, const Shared &s, u32 expert, u32 &before, u32 &all) {
    if (p.blocks == 1) {
        before = 0, all = count_bits(s.masks[expert]);
        return;
    }
    const u32 *counts = ptr<const u32>(p.workspace + sizeof(RouterWorkspace));
    const u32 blocks = afresh(p.blocks), experts = afresh(p.experts);
    u32 words[ROUTER_BLOCKS / 4];
    MOE_UNROLL for (u32 i = 0; i < ROUTER_BLOCKS / 4; i++) words[i] = i * 4 < blocks ? counts[i * experts + expert] : 0;
    // Bytes of blocks that are not there hold what a larger launch has left.
    all = sum_of_first(words, p.blocks);
    before = sum_of_first(words, block_index());
}

// Where the block's pairs are, once all rows are routed.
MOE_DEVICE void sort(const RouterParams &p, const Shared &s, u32 first, u32 rows) {
    RouterWorkspace *workspace = ptr<RouterWorkspace>(p.workspace);
    sync_block();
    if (p.blocks > 1) {
        u8 *counts = ptr<u8>(p.workspace + sizeof(RouterWorkspace)) + block_index() / 4 * p.experts * 4 + block_index() % 4;
        for (u32 e = thread_index(); e < p.experts; e += ROUTER_THREADS) counts[4 * e] = u8(count_bits(s.masks[e]));
        sync_grid(&workspace->arrived, p.blocks);
    }
    u32 pairs = 0;
    // All threads go round alike: the scan is of all.
    for (u32 e0 = 0; e0 < p.experts; e0 += ROUTER_THREADS) {
        const u32 e = e0 + thread_index();
        u32 before = 0, all = 0;
        if (e < p.experts) count(p, s, e, before, all);
        const Scan scan = block_scan<ROUTER_THREADS>(all, s.sums);
        if (e < p.experts) {
            const u32 start = pairs + scan.before;
            s.bases[e] = start + before;
            if (block_index() == 0) ptr<u32>(p.offsets)[e] = start;
        }
        pairs += scan.total;
    }
    if (block_index() == 0 && thread_index() == 0) ptr<u32>(p.offsets)[p.experts] = pairs;
    sync_block();
    for (u32 slot = thread_index(); slot < rows * p.top_k; slot += ROUTER_THREADS) {
        const u32 row = slot / p.top_k;
        const i32 local = s.local[slot];
        i32 pair = -1;
        if (local >= 0) {
            pair = i32(s.bases[local] + count_bits(s.masks[local] & ((1u << row) - 1)));
            ptr<u32>(p.pair_rows)[pair] = first + row;
        }
        ptr<i32>(p.positions)[u64(first) * p.top_k + slot] = pair;
    }
}

// One thread says which logit was bad, once all blocks are done with theirs, and leaves the workspace as it was.
MOE_DEVICE void tell_fault(const RouterParams &p) {
    RouterWorkspace *workspace = ptr<RouterWorkspace>(p.workspace);
    *ptr<u32>(p.fault) = ~load_acquire(&workspace->fault);
    workspace->fault = 0;
}

template <u32 N> MOE_DEVICE void router(const RouterParams &p, const Shared &s) {
    const u32 first = block_index() * p.block_rows;
    const u32 rows = p.rows - first < p.block_rows ? p.rows - first : p.block_rows;
    for (u32 e = thread_index(); e < p.experts; e += ROUTER_THREADS) s.masks[e] = 0;
    sync_block();
    const Lane<N> part(p);
    for (u32 row = thread_index() / WARP; row < rows; row += WARPS) route(p, s, part, first + row);
    if (p.experts != 0) {
        sort(p, s, first, rows);
        if (block_index() == 0 && thread_index() == 0) tell_fault(p);
        return;
    }
    sync_block();
    if (thread_index() != 0) return;
    u32 *finished = &ptr<RouterWorkspace>(p.workspace)->finished;
    if (fetch_add(finished, 1) + 1 == p.blocks) {
        *finished = 0;
        tell_fault(p);
    }
}
} // namespace

// A kernel for up to as many experts.
#define MOE_ROUTER(capacity)                                                                                           \
    MOE_KERNEL(router_##capacity, RouterParams, ROUTER_THREADS) {                                                      \
        MOE_SHARED(u32, masks, ROUTER_EXPERTS);                                                                        \
        MOE_SHARED(u32, bases, ROUTER_EXPERTS);                                                                        \
        MOE_SHARED(i32, local, ROUTER_BLOCK_ROWS *ROUTER_TOP_K);                                                       \
        MOE_SHARED(u32, sums, WARPS);                                                                                  \
        router<capacity / WARP>(p, Shared{masks, bases, local, sums});                                                 \
    }

MOE_ROUTER(128)
MOE_ROUTER(256)
MOE_ROUTER(512)
MOE_ROUTER(1024)
