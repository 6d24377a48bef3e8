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
    u32 *masks;  // [experts]: bits of the block's rows
    u32 *bases;  // [experts]: the first pair of the block
    i32 *local;  // [block_rows, top_k]: local experts, negative if elsewhere
    u32 *chosen; // [WARPS, ROUTER_TOP_K]: the row's experts, best first
    u32 *there;  // [ROUTER_BLOCKS / 4]: a byte of 1 for each block that there is
    u32 *ahead;  // the same for each before this one
    u32 *sums;   // a word per warp
    u32 *fault;  // the complement of where the first logit is that is none; 0 if there is no such
    u32 *all;    // of sync_blocks
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
    u32 group, group_lanes;

    MOE_DEVICE explicit Lane(const RouterParams &p) {
        count = WARP == 32 ? p.lane_experts_32 : p.lane_experts_64;
        first = lane() * count;
        last = p.num_experts - 1;
        end = first < p.num_experts ? p.num_experts - first : 0;
        end = end < count ? end : count;
        is_aligned = count % 4 == 0 && p.num_experts % 4 == 0;
        group_lanes = WARP == 32 ? p.group_lanes_32 : p.group_lanes_64;
        group = lane() / group_lanes;
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
    float top, inverse; // of a softmax: the largest logit, and 1 over the sum, 0 if there is none
};

MOE_DEVICE float score(u32 which, const Row &row, float x) {
    switch (which) {
    case SOFTMAX: return row.inverse > 0.0f ? exponential(x - row.top) * row.inverse : 0.0f;
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
    row.inverse = reciprocal(from_units(sum_units(units)));
    return row;
}

// Whether the lane's experts are of a group that may be chosen from. Of equal groups it is the lower one.
template <u32 N> MOE_DEVICE bool is_kept(const RouterParams &p, const Lane<N> &part, const u32 (&order)[N]) {
    // Shuffles that do not wait for each other.
    constexpr u32 LANES = 4, GROUPS = 8;
    const u32 group_lanes = afresh(part.group_lanes), groups = afresh(p.n_group);
    u32 first = 0, second = 0;
    MOE_UNROLL for (u32 i = 0; i < N; i++) {
        second = larger(second, order[i] < first ? order[i] : first);
        first = larger(first, order[i]);
    }
    u32 best = 0, next = 0;
    for (u32 from = 0; from < part.group_lanes; from += LANES) {
        u32 a[LANES], b[LANES];
        MOE_UNROLL for (u32 i = 0; i < LANES; i++) {
            const u32 other = part.group * group_lanes + from + i;
            a[i] = shuffle(first, other % WARP), b[i] = shuffle(second, other % WARP);
        }
        MOE_UNROLL for (u32 i = 0; i < LANES; i++) {
            if (from + i >= group_lanes) continue;
            next = larger(larger(next, b[i]), a[i] < best ? a[i] : best);
            best = larger(best, a[i]);
        }
    }
    if (p.by_score && next != 0) best = to_order(from_order(best) + from_order(next));
    u32 ahead = 0;
    for (u32 from = 0; from < p.n_group; from += GROUPS) {
        u32 theirs[GROUPS];
        MOE_UNROLL for (u32 i = 0; i < GROUPS; i++) theirs[i] = shuffle(best, (from + i) * group_lanes % WARP);
        MOE_UNROLL for (u32 i = 0; i < GROUPS; i++) {
            const bool is_ahead = theirs[i] > best || (theirs[i] == best && from + i < part.group);
            ahead += from + i < groups && is_ahead;
        }
    }
    return ahead < p.topk_group;
}

// The experts with the largest orders, the lower of equal ones first. Lanes sort theirs; then the best of a lane is the best of
// all or it is not. Neighbours change places only if they are out of order, so that equal ones stay as they are.
template <u32 N> MOE_DEVICE void choose(const RouterParams &p, u32 first, u32 (&order)[N], u32 *chosen) {
    u32 id[N];
    MOE_UNROLL for (u32 i = 0; i < N; i++) id[i] = first + i;
    MOE_UNROLL for (u32 round = 0; round < N; round++) {
        MOE_UNROLL for (u32 i = round % 2; i + 1 < N; i += 2) {
            const u32 order_0 = order[i], order_1 = order[i + 1], id_0 = id[i], id_1 = id[i + 1];
            const bool is_wrong = order_0 < order_1;
            order[i] = is_wrong ? order_1 : order_0, order[i + 1] = is_wrong ? order_0 : order_1;
            id[i] = afresh(is_wrong ? id_1 : id_0), id[i + 1] = afresh(is_wrong ? id_0 : id_1);
        }
    }
    const u64 below = (u64(1) << lane()) - 1;
    // What the last row left has been read.
    sync_warp();
    for (u32 slot = 0; slot < afresh_for_all(p.top_k); slot++) {
        const u32 top = max_lanes(order[0]);
        const u64 tops = lanes_where(order[0] == top);
        const bool wins = order[0] == top && (tops & below) == 0;
        if (wins) {
            chosen[slot] = id[0];
            MOE_UNROLL for (u32 i = 0; i + 1 < N; i++) order[i] = order[i + 1], id[i] = id[i + 1];
            order[N - 1] = 0;
        }
    }
    sync_warp();
}

// The sum of lanes 0..top_k, in their order; others have 0.
MOE_DEVICE float sum_slots(float x, u32 top_k) {
    // Shuffles that do not wait for each other.
    constexpr u32 SLOTS = 8;
    float sum = 0.0f;
    for (u32 from = 0; from < top_k; from += SLOTS) {
        float part[SLOTS];
        MOE_UNROLL for (u32 i = 0; i < SLOTS; i++) part[i] = shuffle(x, from + i);
        MOE_UNROLL for (u32 i = 0; i < SLOTS; i++) sum = sum + part[i];
    }
    return sum;
}

MOE_DEVICE float divided(float x, float sum) { return sum > 0.0f ? x / sum : x; }

// The weight of the expert of each of the lanes 0..top_k, whose logits are `x`; 0 for the others.
MOE_DEVICE float weigh(const RouterParams &p, u32 which, const Row &row, float x) {
    const bool has_slot = lane() < p.top_k;
    float weight = 0.0f;
    if (which == SOFTMAX_OF_CHOSEN) {
        // Logits have chosen, so this is the largest.
        const float top = shuffle(x, 0);
        if (top > -infinity()) {
            if (has_slot) weight = exponential(x - top);
            weight = divided(weight, sum_slots(weight, p.top_k));
        }
    } else if (has_slot) {
        weight = score(which, row, x);
    }
    if (afresh_for_all(p.is_divided)) weight = divided(weight, sum_slots(weight, p.top_k) + p.epsilon);
    return weight * p.factor;
}

// Writes the slots of the block's row `of_block`, of which lane i has one, and notes them if they are to be sorted.
MOE_DEVICE void write(const RouterParams &p, const Shared &s, u32 of_block, i32 id, float weight) {
    if (lane() >= p.top_k) return;
    const u64 at = u64(block_index() * p.block_rows + of_block) * p.top_k + lane();
    ptr<i32>(p.ids)[at] = id;
    ptr<float>(p.weights)[at] = weight;
    if (afresh_for_all(p.experts) == 0) return;
    i32 local = id >= 0 && p.map ? ptr<const i32>(p.map)[id] : id;
    if (local >= i32(p.experts)) local = -1;
    s.local[of_block * p.top_k + lane()] = local;
    if (local >= 0) fetch_or(&s.masks[local], 1u << of_block);
}

// A row of the block, by a warp that has its logits.
template <u32 N>
MOE_DEVICE void route(const RouterParams &p, const Shared &s, const Lane<N> &part, const float (&bias)[N], float (&x)[N],
                      u32 of_block) {
    const u64 at = u64(block_index() * p.block_rows + of_block) * p.num_experts;
    u32 bad = NONE;
    MOE_UNROLL for (u32 i = N; i-- > 0;) bad = x[i] < infinity() ? bad : part.first + i;
    const u64 bad_lanes = lanes_where(bad != NONE);
    if (bad_lanes != 0) {
        bad = shuffle(bad, first_lane(bad_lanes));
        if (lane() == 0) fetch_max(s.fault, ~(u32(at) + bad));
        write(p, s, of_block, -1, 0.0f);
        return;
    }

    const u32 which = afresh_for_all(p.score);
    Row all = {0.0f, 0.0f};
    if (which == SOFTMAX) all = softmax_of(x);
    if (afresh_for_all(p.by_score)) {
        score_all(which, all, x);
        MOE_UNROLL for (u32 i = 0; i < N; i++) x[i] = x[i] + bias[i];
    }
    u32 order[N];
    const u32 end = afresh(part.end);
    MOE_UNROLL for (u32 i = 0; i < N; i++) order[i] = i < end ? to_order(x[i]) : 0;
    if (p.topk_group < p.n_group && !is_kept(p, part, order)) {
        MOE_UNROLL for (u32 i = 0; i < N; i++) order[i] = 0;
    }
    u32 *chosen = s.chosen + thread_index() / WARP * ROUTER_TOP_K;
    choose(p, part.first, order, chosen);
    const u32 id = lane() < p.top_k ? chosen[lane()] : 0;
    write(p, s, of_block, i32(id), weigh(p, which, all, logit(p, at + id)));
}

// As many bytes of 1 as there are numbers below `count` among the four of word `i`.
MOE_DEVICE u32 bytes_below(u32 count, u32 i) {
    const u32 ones = 0x01010101;
    return count >= i * 4 + 4 ? ones : count <= i * 4 ? 0 : ones & ((1u << (count % 4 * 8)) - 1);
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
    before = all = 0;
    MOE_UNROLL for (u32 i = 0; i < ROUTER_BLOCKS / 4; i++) {
        // Bytes of blocks that are not there hold what a larger launch has left.
        all = dot_bytes(words[i], s.there[i], all);
        before = dot_bytes(words[i], s.ahead[i], before);
    }
}

// Says which logit was none, and leaves the workspace as it was.
MOE_DEVICE void tell_fault(const RouterParams &p, u32 fault) {
    *ptr<u32>(p.fault) = ~fault;
    if (fault != 0) ptr<RouterWorkspace>(p.workspace)->fault = 0;
}

// Where the block's pairs are, once all rows are routed.
MOE_DEVICE void sort(const RouterParams &p, const Shared &s, u32 first, u32 rows) {
    RouterWorkspace *workspace = ptr<RouterWorkspace>(p.workspace);
    sync_block();
    if (p.blocks > 1) {
        u8 *counts = ptr<u8>(p.workspace + sizeof(RouterWorkspace)) + block_index() / 4 * p.experts * 4 + block_index() % 4;
        for (u32 e = thread_index(); e < p.experts; e += ROUTER_THREADS) counts[4 * e] = u8(count_bits(s.masks[e]));
        if (thread_index() == 0 && *s.fault != 0) fetch_max(&workspace->fault, *s.fault);
        sync_blocks(&workspace->arrived, *s.all);
    }
    if (block_index() == 0 && thread_index() == ROUTER_THREADS - 1) {
        // All blocks have read what it was.
        if (p.blocks > 1) workspace->before = *s.all;
        tell_fault(p, p.blocks > 1 ? load_acquire(&workspace->fault) : *s.fault);
    }
    u32 pairs = 0;
    // All threads go round alike: the scan is of all.
    for (u32 e0 = 0; e0 < p.experts; e0 += ROUTER_THREADS) {
        const u32 e = e0 + thread_index();
        u32 before = 0, all = 0;
        if (e < p.experts) count(p, s, e, before, all);
        if (e0 != 0) sync_block();
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

// The last block that is done says which logit was none.
MOE_DEVICE void finish(const RouterParams &p, const Shared &s) {
    RouterWorkspace *workspace = ptr<RouterWorkspace>(p.workspace);
    sync_block();
    if (thread_index() != 0) return;
    if (*s.fault != 0) fetch_max(&workspace->fault, *s.fault);
    if (fetch_add(&workspace->finished, 1) + 1 != p.blocks) return;
    workspace->finished = 0;
    tell_fault(p, load_acquire(&workspace->fault));
}

// What a block's memory holds before its rows are routed.
MOE_DEVICE void prepare(const RouterParams &p, const Shared &s) {
    if (thread_index() == 0) {
        *s.fault = 0;
        if (p.experts != 0 && p.blocks > 1) *s.all = ptr<RouterWorkspace>(p.workspace)->before + p.blocks;
    }
    if (thread_index() < ROUTER_BLOCKS / 4) {
        s.there[thread_index()] = bytes_below(p.blocks, thread_index());
        s.ahead[thread_index()] = bytes_below(block_index(), thread_index());
    }
    for (u32 e = thread_index(); e < p.experts; e += ROUTER_THREADS) s.masks[e] = 0;
    sync_block();
}

template <u32 N> MOE_DEVICE void router(const RouterParams &p, const Shared &s) {
    const u32 first = block_index() * p.block_rows;
    const u32 rows = p.rows - first < p.block_rows ? p.rows - first : p.block_rows;
    const Lane<N> part(p);
    float x[N], bias[N] = {};
    u32 row = thread_index() / WARP;
    const auto load = [&] {
        const u64 at = u64(first + row) * p.num_experts;
        part.load(p.logits + at * (p.logits_are_bf16 ? 2 : 4), p.logits_are_bf16, -infinity(), x);
    };
    // What takes longest is asked for first.
    if (row < rows) load();
    if (p.bias) part.load(p.bias, false, 0.0f, bias);
    prepare(p, s);
    while (row < rows) {
        route(p, s, part, bias, x, row);
        row += WARPS;
        if (row < rows) load();
    }
    if (p.experts != 0) {
        sort(p, s, first, rows);
    } else {
        finish(p, s);
    }
}
} // namespace

// A kernel for up to as many experts.
#define MOE_ROUTER(capacity)                                                                                           \
    MOE_KERNEL(router_##capacity, RouterParams, ROUTER_THREADS) {                                                      \
        MOE_SHARED(u32, masks, ROUTER_EXPERTS);                                                                        \
        MOE_SHARED(u32, bases, ROUTER_EXPERTS);                                                                        \
        MOE_SHARED(i32, local, ROUTER_BLOCK_ROWS *ROUTER_TOP_K);                                                       \
        MOE_SHARED(u32, chosen, WARPS *ROUTER_TOP_K);                                                                  \
        MOE_SHARED(u32, there, ROUTER_BLOCKS / 4);                                                                     \
        MOE_SHARED(u32, ahead, ROUTER_BLOCKS / 4);                                                                     \
        MOE_SHARED(u32, sums, WARPS);                                                                                  \
        MOE_SHARED(u32, words, 2);                                                                                     \
        router<capacity / WARP>(p, Shared{masks, bases, local, chosen, there, ahead, sums, words, words + 1});         \
    }

MOE_ROUTER(128)
MOE_ROUTER(256)
MOE_ROUTER(512)
MOE_ROUTER(1024)
