// Before stage 3: which rows each local expert has, in order. There are two ways with one answer, since no atomics decide it.
//
// In a single pass, for few slots, a block has an expert. It counts the slots of the experts before its own, which says where its pairs begin, and then places
// its own, in the order of their slots. No block waits for another and there are no atomics, so that the order is always the
// same. All blocks read all ids; they come from the cache.

// In two phases, for many, a block has a run of the slots and a warp a run of those. All blocks count first; then each knows
// from the counts of those before it where its pairs of each expert begin.

#include "../common/block.h"
#include "moe_sorting.h"

using namespace moe;

namespace {
// The local expert of a slot, negative if it is not here; a number that no expert has counts as none.
MOE_DEVICE i32 local_expert(const MoeSortingParams &p, u32 slot) {
    const i32 id = ptr<const i32>(p.ids)[slot];
    if (id < 0 || u32(id) >= p.num_experts) return -1;
    return p.map ? ptr<const i32>(p.map)[id] : id;
}

constexpr u32 WARPS = MOE_SORTING_THREADS / WARP;

// Goes through the slots of this warp in order. `next[e]` is what the warp's next pair of local expert e is called, which
// place(slot, local expert, name) is told, in any lane; slots of no local expert have a negative one.
template <class Place> MOE_DEVICE void walk(const MoeSortingParams &p, u32 *next, Place place) {
    const u32 walkers = p.blocks * WARPS, walker = block_index() * WARPS + thread_index() / WARP;
    const u32 run = ((p.slots + walkers - 1) / walkers + WARP - 1) / WARP * WARP;
    const u32 begin = walker * run, end = begin + run < p.slots ? begin + run : p.slots;
    for (u32 first = begin; first < end; first += WARP) {
        const u32 slot = first + lane();
        const i32 expert = slot < end ? local_expert(p, slot) : -1;
        // The lanes that have the same expert.
        u64 same = lanes_where(expert >= 0);
        for (u32 bit = 1; bit < p.experts; bit *= 2) {
            const bool has = u32(expert) & bit;
            const u64 with = lanes_where(has);
            same &= has ? with : ~with;
        }
        const u32 before = count_bits(same & ((u64(1) << lane()) - 1));
        const u32 name = expert >= 0 ? next[expert] + before : 0;
        if (slot < end) place(slot, expert, name);
        sync_warp();
        if (expert >= 0 && before == 0) next[expert] += count_bits(same);
        sync_warp();
    }
}

// The pairs of each local expert among the slots of each warp of this block, into `of_warps`.
MOE_DEVICE void count(const MoeSortingParams &p, u32 *of_warps) {
    for (u32 i = thread_index(); i < WARPS * MOE_SORTING_EXPERTS; i += MOE_SORTING_THREADS) of_warps[i] = 0;
    sync_block();
    walk(p, of_warps + thread_index() / WARP * MOE_SORTING_EXPERTS, [](u32, i32, u32) {});
    sync_block();
}
} // namespace

MOE_KERNEL(moe_sorting, MoeSortingParams, MOE_SORTING_THREADS) {
    // Slots that a thread looks at together, so that it waits for them once.
    constexpr u32 BATCH = 8;
    MOE_SHARED(u32, counts, BATCH * WARPS);
    const i32 expert = i32(block_index());
    const u32 warp = thread_index() / WARP;

    u32 before = 0;
    for (u32 first = thread_index(); first < p.slots; first += BATCH * MOE_SORTING_THREADS) {
        MOE_UNROLL for (u32 i = 0; i < BATCH; i++) {
            const u32 slot = first + i * MOE_SORTING_THREADS;
            if (slot >= p.slots) continue;
            const i32 local = local_expert(p, slot);
            before += local >= 0 && local < expert;
            // One block says so of what nobody places.
            if (expert == 0 && local < 0) ptr<i32>(p.positions)[slot] = -1;
        }
    }
    MOE_UNROLL for (u32 mask = WARP / 2; mask > 0; mask /= 2) before += shuffle_xor(before, mask);
    if (lane() == 0) counts[warp] = before;
    sync_block();
    u32 next = 0;
    for (u32 w = 0; w < WARPS; w++) next += counts[w];
    if (thread_index() == 0) ptr<u32>(p.offsets)[expert] = next;

    // All threads go round alike: the barriers are for all.
    for (u32 first = 0; first < p.slots; first += BATCH * MOE_SORTING_THREADS) {
        u64 bits[BATCH];
        MOE_UNROLL for (u32 i = 0; i < BATCH; i++) {
            const u32 slot = first + i * MOE_SORTING_THREADS + thread_index();
            bits[i] = lanes_where(slot < p.slots && local_expert(p, slot) == expert);
        }
        sync_block();
        if (lane() == 0) {
            MOE_UNROLL for (u32 i = 0; i < BATCH; i++) counts[i * WARPS + warp] = count_bits(bits[i]);
        }
        sync_block();
        MOE_UNROLL for (u32 i = 0; i < BATCH; i++) {
            u32 ahead = 0, all = 0;
            for (u32 w = 0; w < WARPS; w++) {
                const u32 count = counts[i * WARPS + w];
                ahead += w < warp ? count : 0;
                all += count;
            }
            if (bits[i] >> lane() & 1) {
                const u32 slot = first + i * MOE_SORTING_THREADS + thread_index();
                const u32 pair = next + ahead + count_bits(bits[i] & ((u64(1) << lane()) - 1));
                ptr<u32>(p.pair_rows)[pair] = slot / p.top_k;
                ptr<i32>(p.positions)[slot] = i32(pair);
            }
            next += all;
        }
    }
    if (thread_index() == 0 && u32(expert) + 1 == p.experts) ptr<u32>(p.offsets)[p.experts] = next;
}

MOE_KERNEL(moe_sorting_count, MoeSortingParams, MOE_SORTING_THREADS) {
    MOE_SHARED(u32, of_warps, WARPS *MOE_SORTING_EXPERTS);
    count(p, of_warps);
    for (u32 e = thread_index(); e < p.experts; e += MOE_SORTING_THREADS) {
        u32 sum = 0;
        for (u32 w = 0; w < WARPS; w++) sum += of_warps[w * MOE_SORTING_EXPERTS + e];
        ptr<u32>(p.counts)[block_index() * p.experts + e] = sum;
    }
}

MOE_KERNEL(moe_sorting_place, MoeSortingParams, MOE_SORTING_THREADS) {
    MOE_SHARED(u32, of_warps, WARPS *MOE_SORTING_EXPERTS);
    MOE_SHARED(u32, sums, 2 * MOE_SORTING_THREADS);
    MOE_SHARED(u32, of_scan, WARPS);
    // As many threads as there are for an expert add up what the blocks have counted: of those before this one, and of all.
    const u32 sharers = MOE_SORTING_THREADS / p.experts, expert = thread_index() % p.experts;
    u32 before = 0, all = 0;
    if (thread_index() < sharers * p.experts) {
        for (u32 block = thread_index() / p.experts; block < p.blocks; block += sharers) {
            const u32 counted = ptr<const u32>(p.counts)[block * p.experts + expert];
            all += counted;
            before += block < block_index() ? counted : 0;
        }
    }
    sums[thread_index()] = before;
    sums[MOE_SORTING_THREADS + thread_index()] = all;
    count(p, of_warps);
    const bool has_expert = thread_index() < p.experts;
    before = 0;
    all = 0;
    if (has_expert) {
        for (u32 s = 0; s < sharers; s++) {
            before += sums[s * p.experts + thread_index()];
            all += sums[MOE_SORTING_THREADS + s * p.experts + thread_index()];
        }
    }
    const Scan scan = block_scan<MOE_SORTING_THREADS>(all, of_scan);
    if (has_expert) {
        u32 next = scan.before + before;
        for (u32 w = 0; w < WARPS; w++) {
            u32 &of_warp = of_warps[w * MOE_SORTING_EXPERTS + thread_index()];
            const u32 counted = of_warp;
            of_warp = next;
            next += counted;
        }
        if (block_index() == 0) ptr<u32>(p.offsets)[thread_index()] = scan.before;
    }
    if (block_index() == 0 && thread_index() == 0) ptr<u32>(p.offsets)[p.experts] = scan.total;
    sync_block();
    walk(p, of_warps + thread_index() / WARP * MOE_SORTING_EXPERTS, [&](u32 slot, i32 local, u32 pair) {
        ptr<i32>(p.positions)[slot] = local < 0 ? -1 : i32(pair);
        if (local >= 0) ptr<u32>(p.pair_rows)[pair] = slot / p.top_k;
    });
}
