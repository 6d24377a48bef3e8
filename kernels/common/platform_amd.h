// gfx942 and gfx950 by clang's HIP, without the headers of ROCm.
#pragma once

#define MOE_DEVICE __attribute__((device)) inline __attribute__((always_inline))
#define MOE_KERNEL(name, Params, threads)                                                                              \
    extern "C" __attribute__((global, amdgpu_flat_work_group_size(threads, threads))) void name(const Params p)
#define MOE_SHARED(T, name, count) __attribute__((shared)) T name[count]
#define MOE_UNROLL _Pragma("unroll")

namespace moe {
constexpr u32 WARP = 64;
#if defined(__gfx942__)
constexpr bool FP8_FNUZ = true;
#else
constexpr bool FP8_FNUZ = false;
#endif

MOE_DEVICE u32 thread_index() { return __builtin_amdgcn_workitem_id_x(); }
MOE_DEVICE u32 block_index() { return __builtin_amdgcn_workgroup_id_x(); }
MOE_DEVICE u32 lane() { return __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0)); }
MOE_DEVICE void sync_block() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

MOE_DEVICE void sync_warp() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

MOE_DEVICE float from_bits(u32 bits) { return __builtin_bit_cast(float, bits); }
MOE_DEVICE u32 to_bits(float x) { return __builtin_bit_cast(u32, x); }

MOE_DEVICE u32 shuffle(u32 v, u32 from) { return __builtin_amdgcn_ds_bpermute(from * 4, v); }
MOE_DEVICE i32 shuffle(i32 v, u32 from) { return __builtin_amdgcn_ds_bpermute(from * 4, v); }
MOE_DEVICE float shuffle(float v, u32 from) { return from_bits(shuffle(to_bits(v), from)); }
template <class T> MOE_DEVICE T shuffle_xor(T v, u32 mask) { return shuffle(v, lane() ^ mask); }
MOE_DEVICE u64 lanes_where(bool holds) { return __builtin_amdgcn_ballot_w64(holds); }
MOE_DEVICE bool any_lane(bool holds) { return lanes_where(holds) != 0; }
MOE_DEVICE u32 max_lanes(u32 v) {
    MOE_UNROLL for (u32 mask = WARP / 2; mask > 0; mask /= 2) {
        const u32 other = shuffle_xor(v, mask);
        v = v > other ? v : other;
    }
    return v;
}
MOE_DEVICE u32 sum_lanes(u32 v) {
    MOE_UNROLL for (u32 mask = WARP / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    return v;
}

MOE_DEVICE u32 count_bits(u64 bits) { return u32(__builtin_popcountll(bits)); }
MOE_DEVICE u32 first_lane(u64 lanes) { return u32(__builtin_ctzll(lanes)); }
MOE_DEVICE u32 dot_bytes(u32 a, u32 b, u32 sum) { return __builtin_amdgcn_udot4(a, b, sum, false); }
MOE_DEVICE float square_root(float x) { return __builtin_sqrtf(x); }
MOE_DEVICE float reciprocal(float x) { return 1.0f / x; }

MOE_DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MOE_DEVICE float near_exp(float x) { return __builtin_amdgcn_exp2f(x * 1.44269504f); }
MOE_DEVICE float near_quotient(float a, float b) { return a * __builtin_amdgcn_rcpf(b); }

MOE_DEVICE u32 fetch_or(u32 *p, u32 v) {
    return __hip_atomic_fetch_or(p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}
MOE_DEVICE u32 fetch_max(u32 *p, u32 v) {
    return __hip_atomic_fetch_max(p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
MOE_DEVICE u32 fetch_add(u32 *p, u32 v) {
    return __hip_atomic_fetch_add(p, v, __ATOMIC_ACQ_REL, __HIP_MEMORY_SCOPE_AGENT);
}
MOE_DEVICE u32 load_acquire(const u32 *p) {
    return __hip_atomic_load(p, __ATOMIC_ACQUIRE, __HIP_MEMORY_SCOPE_AGENT);
}
MOE_DEVICE void add_release(u32 *p, u32 v) {
    __hip_atomic_fetch_add(p, v, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_AGENT);
}
// Scalar registers are what is few; this is a vector register.
MOE_DEVICE u32 afresh(u32 v) {
    asm volatile("" : "+v"(v));
    return v;
}
MOE_DEVICE u32 afresh_for_all(u32 v) {
    asm volatile("" : "+s"(v));
    return v;
}
MOE_DEVICE void in_turn() { __builtin_amdgcn_sched_barrier(0); }
MOE_DEVICE void pause() { __builtin_amdgcn_s_sleep(1); }

MOE_DEVICE u32 max_u16x2(u32 a, u32 b) {
    typedef u16 pair __attribute__((ext_vector_type(2)));
    return __builtin_bit_cast(u32, __builtin_elementwise_max(__builtin_bit_cast(pair, a), __builtin_bit_cast(pair, b)));
}

// Written so that NaN stays NaN.
MOE_DEVICE float clamped(float x, float max) {
    x = x > max ? max : x;
    return x < -max ? -max : x;
}

// The instruction is FNUZ on gfx942 and OCP on gfx950.
MOE_DEVICE u32 to_fp8x4(float a, float b, float c, float d, float max) {
    i32 codes = __builtin_amdgcn_cvt_pk_fp8_f32(clamped(a, max), clamped(b, max), 0, false);
    return __builtin_amdgcn_cvt_pk_fp8_f32(clamped(c, max), clamped(d, max), codes, true);
}

MOE_DEVICE u32x4 load_once(const u32x4 *p) {
    typedef u32 vector __attribute__((ext_vector_type(4)));
    vector v = __builtin_nontemporal_load(reinterpret_cast<const vector *>(p));
    return {{v.x, v.y, v.z, v.w}};
}
MOE_DEVICE void store_once(u64 *p, u64 v) { __builtin_nontemporal_store(v, p); }
} // namespace moe
