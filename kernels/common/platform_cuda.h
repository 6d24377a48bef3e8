// sm_90a by nvcc.
#pragma once

#define MOE_DEVICE __device__ __forceinline__
#define MOE_KERNEL(name, Params, threads)                                                                              \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Params p)
// The same in clusters of as many blocks.
#define MOE_KERNEL_BLOCKS(name, Params, threads, blocks)                                                               \
    extern "C" __global__ void __launch_bounds__(threads, 1) __cluster_dims__(blocks, 1, 1) name(const __grid_constant__ Params p)
#define MOE_SHARED(T, name, count) __shared__ T name[count]
#define MOE_UNROLL _Pragma("unroll")

namespace moe {
constexpr u32 WARP = 32;
constexpr bool FP8_FNUZ = false;

MOE_DEVICE u32 thread_index() { return threadIdx.x; }
MOE_DEVICE u32 block_index() { return blockIdx.x; }
MOE_DEVICE u32 lane() { return threadIdx.x % WARP; }
MOE_DEVICE void sync_block() { __syncthreads(); }
MOE_DEVICE void sync_warp() { __syncwarp(); }

template <class T> MOE_DEVICE T shuffle_xor(T v, u32 mask) { return __shfl_xor_sync(~0u, v, mask); }
template <class T> MOE_DEVICE T shuffle(T v, u32 from) { return __shfl_sync(~0u, v, from); }
MOE_DEVICE u64 lanes_where(bool holds) { return __ballot_sync(~0u, holds); }
MOE_DEVICE bool any_lane(bool holds) { return __any_sync(~0u, holds); }
MOE_DEVICE u32 max_lanes(u32 v) { return __reduce_max_sync(~0u, v); }
MOE_DEVICE u32 sum_lanes(u32 v) { return __reduce_add_sync(~0u, v); }

MOE_DEVICE float from_bits(u32 bits) { return __uint_as_float(bits); }
MOE_DEVICE u32 to_bits(float x) { return __float_as_uint(x); }

MOE_DEVICE u32 count_bits(u64 bits) { return u32(__popcll(bits)); }
MOE_DEVICE u32 first_lane(u64 lanes) { return u32(__ffs(i32(lanes)) - 1); }
MOE_DEVICE u32 dot_bytes(u32 a, u32 b, u32 sum) { return __dp4a(a, b, sum); }
MOE_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
// What a division is without its ends, and therefore without a branch.
MOE_DEVICE float reciprocal(float x) {
    float near;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(x));
    return __fmaf_rn(near, __fmaf_rn(-x, near, 1.0f), near);
}

MOE_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MOE_DEVICE float near_exp(float x) { return __expf(x); }
MOE_DEVICE float near_quotient(float a, float b) { return __fdividef(a, b); }

MOE_DEVICE u32 fetch_or(u32 *p, u32 v) { return atomicOr(p, v); }
MOE_DEVICE u32 fetch_max(u32 *p, u32 v) { return atomicMax(p, v); }
MOE_DEVICE u32 fetch_add(u32 *p, u32 v) {
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
    return before;
}
MOE_DEVICE u32 load_acquire(const u32 *p) {
    u32 v;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
MOE_DEVICE u32 afresh(u32 v) { return v; }
MOE_DEVICE u32 afresh_for_all(u32 v) { return v; }
MOE_DEVICE void in_turn() {}
MOE_DEVICE void add_release(u32 *p, u32 v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// A load takes longer than a pause should.
MOE_DEVICE void pause() {}

MOE_DEVICE u32 max_u16x2(u32 a, u32 b) {
    u32 r;
    asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// The instruction saturates at 448, the only maximum of its format, and codes NaN as 0x7f.
MOE_DEVICE u32 to_fp8x4(float a, float b, float c, float d, float) {
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return u32(high) << 16 | low;
}

MOE_DEVICE u32x4 load_once(const u32x4 *p) {
    u32x4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
                 : "l"(p));
    return r;
}
MOE_DEVICE void store_once(u64 *p, u64 v) { asm volatile("st.global.cs.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); }
} // namespace moe
