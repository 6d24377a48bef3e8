// MFMA as host SIMT: the 64 fibers of a wave do it together. What an instruction sums is exact here and rounded once; how the
// hardware rounds on the way is not documented.
#pragma once

#if defined(MOE_AS_SM90A)
#error "Hopper has no MFMA"
#endif

#include "codes_host.h"

namespace moe::cdna {
using Chunk = u32x4;
struct Bytes32 {
    Chunk half[2];
};

template <class T> struct OperandOf;
#if defined(MOE_AS_GFX950)
template <> struct OperandOf<Fp8> { using Type = Bytes32; };
template <> struct OperandOf<Bf16> { using Type = Chunk; };
#else
template <> struct OperandOf<Fp8> { using Type = u64; };
template <> struct OperandOf<Bf16> { using Type = u64; };
#endif

template <u32 SIDE> struct Sums {
    float v[SIDE * SIDE / WARP];

    float &operator[](u32 i) { return v[i]; }
    float operator[](u32 i) const { return v[i]; }
};

// Of an operand of T: elements, and their numbers.
inline double number(Bf16, const void *operand, u32 at) { return bf16_of(static_cast<const u16 *>(operand)[at]); }
inline double number(Fp8, const void *operand, u32 at) { return fp8_of(static_cast<const u8 *>(operand)[at], FP8_FNUZ); }
template <class T> constexpr u32 ELEMENTS = 0;
template <> constexpr u32 ELEMENTS<Bf16> = sizeof(OperandOf<Bf16>::Type) / 2;
template <> constexpr u32 ELEMENTS<Fp8> = sizeof(OperandOf<Fp8>::Type);

// Along k, element e of a lane of group `group`: 16 bytes of each group in turn.
template <class T> u32 place_along_k(u32 group, u32 groups, u32 e) {
    constexpr u32 RUN = ELEMENTS<T> < 16 ? ELEMENTS<T> : 16;
    return (e / RUN * groups + group) * RUN + e % RUN;
}

template <class T, u32 SIDE> struct Product {
    using Operand = typename OperandOf<T>::Type;
    static constexpr u32 GROUPS = WARP / SIDE, K = GROUPS * ELEMENTS<T>;

    struct Lane {
        const Operand *a, *b;
        Sums<SIDE> *d;
    };

    static void run_all(void *const *given) {
        double a[SIDE][K], b[SIDE][K];
        for (u32 lane = 0; lane < WARP; lane++) {
            const Lane &from = *static_cast<const Lane *>(given[lane]);
            for (u32 e = 0; e < ELEMENTS<T>; e++) {
                const u32 k = place_along_k<T>(lane / SIDE, GROUPS, e);
                a[lane % SIDE][k] = number(T{}, from.a, e);
                b[lane % SIDE][k] = number(T{}, from.b, e);
            }
        }
        for (u32 lane = 0; lane < WARP; lane++) {
            Sums<SIDE> &d = *static_cast<const Lane *>(given[lane])->d;
            for (u32 r = 0; r < SIDE * SIDE / WARP; r++) {
                const u32 row = SIDE == 32 ? 8 * (r / 4) + 4 * (lane / 32) + r % 4 : 4 * (lane / 16) + r;
                double sum = d[r];
                for (u32 k = 0; k < K; k++) sum += a[row][k] * b[lane % SIDE][k];
                d[r] = float(sum);
            }
        }
    }

    static void run(Sums<SIDE> &d, const Operand &a, const Operand &b) {
        Lane lane = {&a, &b, &d};
        simt::together(WARP, run_all, &lane);
    }
};
} // namespace moe::cdna
