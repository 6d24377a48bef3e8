// Tests of host SIMT itself: kernels that are right, and the same with a barrier too few. They are not built for devices.

#include "selftest.h"

using namespace moe;

// Rows reversed, by way of shared memory.
MOE_KERNEL(selftest_reverse, SelftestParams, SELFTEST_THREADS) {
    MOE_SHARED(u32, row, SELFTEST_THREADS);
    MOE_SHARED(u32, other, SELFTEST_THREADS);
    const u32 at = block_index() * SELFTEST_THREADS + thread_index();
    row[thread_index()] = ptr<const u32>(p.input)[at];
    sync_block();
    other[thread_index()] = row[SELFTEST_THREADS - 1 - thread_index()];
    ptr<u32>(p.output)[at] = other[thread_index()];
}

MOE_KERNEL(selftest_reverse_without_barrier, SelftestParams, SELFTEST_THREADS) {
    MOE_SHARED(u32, row, SELFTEST_THREADS);
    const u32 at = block_index() * SELFTEST_THREADS + thread_index();
    row[thread_index()] = ptr<const u32>(p.input)[at];
    ptr<u32>(p.output)[at] = row[SELFTEST_THREADS - 1 - thread_index()];
}

// Sums over the lanes of each warp.
MOE_KERNEL(selftest_warp_sum, SelftestParams, SELFTEST_THREADS) {
    const u32 at = block_index() * SELFTEST_THREADS + thread_index();
    u32 sum = ptr<const u32>(p.input)[at];
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    ptr<u32>(p.output)[at] = sum;
}

// Half of the threads wait for the other half, which does not come.
MOE_KERNEL(selftest_stuck, SelftestParams, SELFTEST_THREADS) {
    if (thread_index() % 2 == 0) {
        sync_block();
    } else {
        shuffle(thread_index(), 0);
    }
    ptr<u32>(p.output)[0] = 1;
}
