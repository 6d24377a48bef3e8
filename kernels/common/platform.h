// What a kernel may use, the same on every target. One of these headers says how:
//
//   platform_cuda.h   sm_90a, by nvcc
//   platform_amd.h    gfx942 and gfx950, by clang, freestanding
//   platform_host.h   threads of a block as fibers of one CPU thread, by any C++17 compiler
//
// A kernel is written as
//
//   MOE_KERNEL(name, NameParams, 256) { … p.rows … }
//
// It takes one plain struct `p` by value, so that AMD's kernarg segment, CUDA's parameter block and the host's argument are
// the same bytes, and blocks have one dimension. Addresses in the struct are u64; `ptr<T>(p.x)` makes them pointers.
//
//   WARP                        lanes that shuffle with each other: 32 or 64
//   thread_index() block_index() lane()
//   sync_block()                barrier of the block; orders shared and global memory within it
//   shuffle_xor(v, mask)        v of lane `lane() ^ mask`; all lanes of the warp take part
//   shuffle(v, from)            v of lane `from`
//   sync_warp()                 what lanes wrote to shared memory, all of the warp see
//   lanes_where(holds)          for each lane of the warp, a bit
//   any_lane(holds)             whether it holds in any lane of the warp
//   max_lanes(v) sum_lanes(v)   of u32 over the lanes of the warp
//   MOE_SHARED(T, name, count)  an array in shared memory; nothing is in it at first
//   to_fp8x4(a, b, c, d, max)   codes of four numbers clamped to ±max, lowest byte first; rounded to nearest, ties to even;
//                               NaN has one code
//   max_u16x2(a, b)             the larger of each half
//   first_lane(lanes)           the lowest of those that lanes_where gave
//   count_bits(bits)            of 64
//   dot_bytes(a, b, sum)        sum, and the products of the bytes of two words
//   square_root(x)              rounded once
//   reciprocal(x)               the same, of a number between 1 and 2^64
//   fused(a, b, c)              a·b + c, rounded once
//   near_exp(x)                 e to the x, and
//   near_quotient(a, b)         a / b, of b below 2^126: within a few units of the last place, for what is rounded to bf16
//   fetch_or(p, v)              atomic within the block, on its shared memory; what was there before
//   fetch_max(p, v)             atomic on shared or the device's memory; what was there before
//   fetch_add(p, v)             atomic on the device's memory, ordered before and after: acquire and release
//   load_acquire(p) add_release(p, v)  u32 of the device's memory by which blocks tell each other that theirs is written
//   afresh(v)                   v; what is computed from it is not kept from one round of a loop to the next, where registers are few
//   afresh_for_all(v)           the same, of what is the same for all lanes
//   in_turn()                   what is before it and what is behind it are not computed at the same time, where registers are few
//   pause()                     in a loop that waits for another block
//   load_once(p) store_once(p, v)   memory that is touched once and should not stay in the caches
//
// FP8 is FNUZ on gfx942 and OCP elsewhere: `FP8_FNUZ`. Nothing here includes a header of a toolkit.
#pragma once

#include "types.h"

#if defined(MOE_HOST_SIMT)
#include "platform_host.h"
#elif defined(__HIP__)
#include "platform_amd.h"
#else
#include "platform_cuda.h"
#endif

namespace moe {
template <class T> MOE_DEVICE T *ptr(u64 address) {
#if defined(__HIP__) && !defined(MOE_HOST_SIMT)
    // The device's memory, as every address of a struct: from what could be shared memory too, a load counts with those of
    // shared memory, and a barrier would wait for it.
    return (T *)reinterpret_cast<__attribute__((address_space(1))) T *>(address);
#else
    return reinterpret_cast<T *>(address);
#endif
}
} // namespace moe
