// What threads of a block, and blocks of a launch, do together.
#pragma once

#include "platform.h"

namespace moe {
struct Scan {
    u32 before; // sum over the threads before this one
    u32 total;  // over all
};

// Sums of `value` over the threads of the block, all of which take part. `sums` is shared memory, a word per warp, which has to
// be left alone until the next barrier.
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
    return scan;
}

// A barrier of the blocks of a launch, which have to be few enough to run at the same time. What any thread wrote before it, all
// see behind it. `arrived` counts blocks, in a circle of 2^32; `all` is what it is when all of the launch are there. Nobody
// asks what it is before: that would take as long as the rest.
MOE_DEVICE void sync_blocks(u32 *arrived, u32 all) {
    sync_block();
    if (thread_index() == 0) {
        add_release(arrived, 1);
        while (i32(load_acquire(arrived) - all) < 0) pause();
    }
    sync_block();
}
} // namespace moe
