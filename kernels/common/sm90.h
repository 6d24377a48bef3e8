// What only Hopper has: barriers in shared memory, bulk copies, and products of a warpgroup (wgmma).
#pragma once

#include "platform.h"

namespace moe::sm90 {
// `v`, which is the same in all lanes, said so that the compiler keeps what is computed from it in the registers of the warp, where
// products take their operands' places from.
MOE_DEVICE u32 of_warp(u32 v) { return __shfl_sync(~0u, v, 0); }

// An address in shared memory, as instructions take it.
MOE_DEVICE u32 shared_address(const void *p) { return u32(__cvta_generic_to_shared(p)); }

// A barrier that threads arrive at and that bytes of bulk copies are counted on. It has phases, told apart by a bit.
struct Barrier {
    u64 state;

    MOE_DEVICE void init(u32 arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
    }
    MOE_DEVICE void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
    }
    // Arrives, and lets the phase wait for as many bytes more.
    MOE_DEVICE void arrive_expecting(u32 bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
    }
    // Waits for the end of the phase with this bit.
    MOE_DEVICE void wait(u32 phase) {
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "again:\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                     "@!done bra again;\n"
                     "}" ::"r"(shared_address(this)),
                     "r"(phase)
                     : "memory");
    }
};

// The blocks of a cluster: two, which run on two multiprocessors at the same time and reach each other's shared memory.
MOE_DEVICE u32 rank_in_pair() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// A barrier of all threads of both blocks.
MOE_DEVICE void sync_pair() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Arrives at the barrier that has this place in the shared memory of block `rank` of the pair.
MOE_DEVICE void arrive_at(Barrier &barrier, u32 rank) {
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
                 "}" ::"r"(shared_address(&barrier)),
                 "r"(rank)
                 : "memory");
}
// Before a tensor map that the host wrote to the device's memory is used.
MOE_DEVICE void acquire_map(u64 map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}
// The box of a tensor map that begins with row `row`, to the same place of both blocks, counted on the same barrier of each.
MOE_DEVICE void box_to_pair(void *to, u64 map, u32 row, Barrier &barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
                 "l"(map), "r"(0), "r"(row), "r"(shared_address(&barrier)), "h"(u16(3))
                 : "memory");
}

// Barriers that were initialised are seen by bulk copies.
MOE_DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// What this thread wrote to shared memory, or has waited for, is seen by wgmma and bulk copies.
MOE_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// `bytes` (a multiple of 16) from global to shared memory, counted on `barrier`. What is read ONCE leaves the cache first.
template <bool ONCE> MOE_DEVICE void bulk_copy(void *to, u64 from, u32 bytes, Barrier &barrier) {
    constexpr u64 EVICT_FIRST = 0x12f0000000000000, EVICT_NORMAL = 0x1000000000000000;
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(&barrier)), "l"(ONCE ? EVICT_FIRST : EVICT_NORMAL)
                 : "memory");
}

// 16 bytes to shared memory without passing registers; zeros if not `valid`.
MOE_DEVICE void copy16(u32 to, u64 from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
MOE_DEVICE void copy8(u32 to, u64 from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
MOE_DEVICE void copy4(u32 to, u64 from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
// Arrives once all copies of this thread so far have come; who waits for it has to fence before wgmma reads them.
MOE_DEVICE void arrive_with_copies(Barrier &barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Where an operand is: rows of 128 bytes in groups of eight, swizzled by 16 bytes within a group. The address is that of a
// row whose number is a multiple of eight, plus where in the row a product starts.
MOE_DEVICE u64 operand(u32 address) {
    constexpr u64 ROWS_OF_128_SWIZZLED = u64(1) << 62, GROUP_BYTES = u64(1024 >> 4) << 32, UNUSED = u64(1) << 16;
    return ROWS_OF_128_SWIZZLED | GROUP_BYTES | UNUSED | (address >> 4 & 0x3fff);
}

MOE_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MOE_DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <u32 N> MOE_DEVICE void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// 1, known only after what comes before this. A factor of it keeps a compiler from reading sums before it has waited for them.
MOE_DEVICE float one_from_here() {
    float one;
    asm volatile("mov.f32 %0, 0f3f800000;" : "=f"(one)::"memory");
    return one;
}

template <u32 N> MOE_DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <u32 N> MOE_DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
} // namespace moe::sm90
