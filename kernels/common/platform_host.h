// Host SIMT: the threads of a block are fibers of one CPU thread. MOE_AS_SM90A, MOE_AS_GFX942 or MOE_AS_GFX950 says which device
// is played: its lanes and its FP8. Symbols are named after it, so that one program can hold all three.
#pragma once

#include "host_simt.h"

#if defined(MOE_AS_SM90A)
#define MOE_SYMBOL(name) moe_sm_90a_##name
#elif defined(MOE_AS_GFX942)
#define MOE_SYMBOL(name) moe_gfx942_##name
#elif defined(MOE_AS_GFX950)
#define MOE_SYMBOL(name) moe_gfx950_##name
#else
#error "host SIMT plays a device: define MOE_AS_SM90A, MOE_AS_GFX942 or MOE_AS_GFX950"
#endif

// Everything that a kernel uses or has is in a namespace of the device that is played: inline functions and templates of one name
// would be taken for the same by the linker, whichever device they were compiled for.
namespace moe_of_all = moe;
#define moe MOE_SYMBOL(moe)
namespace moe {
using namespace moe_of_all;
}

#define MOE_DEVICE inline
// A kernel, and the function by which Rust launches it; 0 is success, see simt::Outcome.
#define MOE_KERNEL(name, Params, threads)                                                                              \
    static void name(const Params &p);                                                                                 \
    extern "C" int MOE_SYMBOL(name)(const void *params, const moe::simt::Launch *launch) {                             \
        return moe::simt::run(                                                                                         \
            *launch, moe::WARP, threads, [](const void *p) { name(*static_cast<const Params *>(p)); }, params);        \
    }                                                                                                                  \
    static void name(const Params &p)
#define MOE_SHARED(T, name, count)                                                                                     \
    static const char name##_key = 0;                                                                                  \
    T *const name = static_cast<T *>(moe::simt::shared(&name##_key, sizeof(T) * (count)))
#define MOE_UNROLL

namespace moe {
#if defined(MOE_AS_SM90A)
constexpr u32 WARP = 32;
#else
constexpr u32 WARP = 64;
#endif
#if defined(MOE_AS_GFX942)
constexpr bool FP8_FNUZ = true;
#else
constexpr bool FP8_FNUZ = false;
#endif

inline u32 thread_index() { return simt::thread_index(); }
inline u32 block_index() { return simt::block_index(); }
inline u32 lane() { return thread_index() % WARP; }
inline void sync_block() { simt::sync_block(); }
inline void sync_warp() { simt::ballot(true); }

inline float from_bits(u32 bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
inline u32 to_bits(float x) {
    u32 bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

template <class T> T shuffle(T v, u32 from) {
    static_assert(sizeof(T) == 4, "lanes exchange 32 bits");
    u32 bits;
    __builtin_memcpy(&bits, &v, 4);
    bits = simt::exchange(bits, from % WARP);
    __builtin_memcpy(&v, &bits, 4);
    return v;
}
template <class T> T shuffle_xor(T v, u32 mask) { return shuffle(v, lane() ^ mask); }
inline u64 lanes_where(bool holds) { return simt::ballot(holds); }
inline bool any_lane(bool holds) { return lanes_where(holds) != 0; }
inline u32 max_lanes(u32 v) { return simt::largest(v); }
inline u32 sum_lanes(u32 v) { return simt::sum(v); }

inline u32 count_bits(u64 bits) { return u32(__builtin_popcountll(bits)); }
inline u32 first_lane(u64 lanes) { return u32(__builtin_ctzll(lanes)); }
inline u32 dot_bytes(u32 a, u32 b, u32 sum) {
    for (u32 i = 0; i < 32; i += 8) sum += (a >> i & 0xff) * (b >> i & 0xff);
    return sum;
}
inline float reciprocal(float x) { return 1.0f / x; }
inline float square_root(float x) { return __builtin_sqrtf(x); }

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float near_exp(float x) { return __builtin_expf(x); }
inline float near_quotient(float a, float b) { return a / b; }

// Fibers of one thread: nothing comes between the two halves of an atomic operation.
inline u32 fetch_or(u32 *p, u32 v) {
    const u32 before = *p;
    *p = before | v;
    return before;
}
inline u32 fetch_max(u32 *p, u32 v) {
    const u32 before = *p;
    *p = before > v ? before : v;
    return before;
}
inline u32 fetch_add(u32 *p, u32 v) {
    const u32 before = *p;
    *p = before + v;
    return before;
}
inline u32 load_acquire(const u32 *p) { return *p; }
inline void add_release(u32 *p, u32 v) { *p += v; }
inline u32 afresh(u32 v) { return v; }
inline u32 afresh_for_all(u32 v) { return v; }
inline void in_turn() {}
inline void pause() { simt::yield(); }

inline u32 max_u16x2(u32 a, u32 b) {
    const u32 low = (a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff;
    return low | ((a >> 16) > (b >> 16) ? a & 0xffff0000 : b & 0xffff0000);
}

// As the instructions of the devices: below 2·2^e, the f32 |x| + 2^(e+20) has a unit in the last place of one step between
// codes.
inline u32 to_fp8(float x, float max) {
    const u32 bias = FP8_FNUZ ? 8 : 7, min_normal = (127 - bias + 1) << 23;
    if (x != x) return FP8_FNUZ ? 0x80 : 0x7f;
    float magnitude = __builtin_fabsf(x);
    if (magnitude > max) magnitude = max;
    u32 exponent = to_bits(magnitude) & 0x7f800000;
    if (exponent < min_normal) exponent = min_normal;
    const u32 magic = exponent + (20u << 23);
    const u32 code = to_bits(magnitude + from_bits(magic)) - magic + ((exponent - min_normal) >> 20);
    return FP8_FNUZ && code == 0 ? 0 : code | (to_bits(x) >> 24 & 0x80);
}
inline u32 to_fp8x4(float a, float b, float c, float d, float max) {
    return to_fp8(a, max) | to_fp8(b, max) << 8 | to_fp8(c, max) << 16 | to_fp8(d, max) << 24;
}

inline u32x4 load_once(const u32x4 *p) { return *p; }
inline void store_once(u64 *p, u64 v) { *p = v; }
} // namespace moe
