// What threads of a block, and blocks of a launch, do together.
#pragma once

#include "platform.h"

namespace moe {
struct Scan {
    u32 before; // sum over the threads before this one
    u32 total;  // over all
};

// Sums of `value` over the threads of the block, all of which take part. `sums` is shared memory, a word per warp.
template <u32 THREADS> MOE_DEVICE Scan block_scan(u32 value, u32 *sums) {
    u32 inclusive = value;
    MOE_UNROLL for (u32 distance = 1; distance < WARP; distance *= 2) {
        const u32 other = shuffle(inclusive, lane() - distance);
        if (lane() >= distance) inclusive += other;
    }
    const u32 warp = thread_index() / WARP;
    if (lane() == WARP - 1) sums[warp] = inclusive;
    sync_block();
    Scan scan = {inclusive - value, 0};
    MOE_UNROLL for (u32 i = 0; i < THREADS / WARP; i++) {
        if (i < warp) scan.before += sums[i];
        scan.total += sums[i];
    }
    // The next scan uses the same words.
    sync_block();
    return scan;
}

// A barrier of all `blocks` of a launch, which have to be few enough to run at the same time. What any thread wrote before
// it, all see behind it. `arrived` is a word that is 0 before the first launch; afterwards its upper bit says how often, and
// the rest is 0 again.
MOE_DEVICE void sync_grid(u32 *arrived, u32 blocks) {
    constexpr u32 ROUND = 0x80000000;
    sync_block();
    if (thread_index() == 0) {
        const u32 before = fetch_add(arrived, block_index() == 0 ? ROUND - (blocks - 1) : 1);
        while (((load_acquire(arrived) ^ before) & ROUND) == 0) pause();
    }
    sync_block();
}
} // namespace moe
