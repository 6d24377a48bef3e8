// Before stage 3: which rows each local expert has, in order.
//
// A block has an expert. It counts the slots of the experts before its own, which says where its pairs begin, and then places
// its own, in the order of their slots. No block waits for another and there are no atomics, so that the order is always the
// same. All blocks read all ids; they come from the cache.

#include "moe_sorting.h"

using namespace moe;

namespace {
// The local expert of a slot, negative if it is not here; a number that no expert has counts as none.
MOE_DEVICE i32 local_expert(const MoeSortingParams &p, u32 slot) {
    const i32 id = ptr<const i32>(p.ids)[slot];
    if (id < 0 || u32(id) >= p.num_experts) return -1;
    return p.map ? ptr<const i32>(p.map)[id] : id;
}
} // namespace

MOE_KERNEL(moe_sorting, MoeSortingParams, MOE_SORTING_THREADS) {
    constexpr u32 WARPS = MOE_SORTING_THREADS / WARP;
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
