// MFMA by the compiler's builtins.
#pragma once

namespace moe::cdna {
// 16 bytes, as a vector, which the compiler keeps in registers.
typedef u32 Chunk __attribute__((ext_vector_type(4)));
struct Bytes32 {
    Chunk half[2];
};

// The widest instructions: what a lane gives of a row of a, and of a column of b.
template <class T> struct OperandOf;
#if defined(__gfx950__)
template <> struct OperandOf<Fp8> { using Type = Bytes32; };
template <> struct OperandOf<Bf16> { using Type = Chunk; };
#else
template <> struct OperandOf<Fp8> { using Type = u64; };
template <> struct OperandOf<Bf16> { using Type = u64; };
#endif

typedef float Sums4 __attribute__((ext_vector_type(4)));
typedef float Sums16 __attribute__((ext_vector_type(16)));
template <u32 SIDE> struct SumsOf;
template <> struct SumsOf<16> { using Type = Sums4; };
template <> struct SumsOf<32> { using Type = Sums16; };
// What a lane has of d.
template <u32 SIDE> using Sums = typename SumsOf<SIDE>::Type;

template <class T, u32 SIDE> struct Product;

#if defined(__gfx950__)
typedef __bf16 Bf16x8 __attribute__((ext_vector_type(8)));
typedef i32 Words8 __attribute__((ext_vector_type(8)));

// The formats are e4m3; scales of 0 are the instruction without scales.
template <> struct Product<Fp8, 16> {
    static MOE_DEVICE void run(Sums4 &d, Bytes32 a, Bytes32 b) {
        d = __builtin_amdgcn_mfma_scale_f32_16x16x128_f8f6f4(
            __builtin_bit_cast(Words8, a), __builtin_bit_cast(Words8, b), d, 0, 0, 0, 0, 0, 0);
    }
};
template <> struct Product<Fp8, 32> {
    static MOE_DEVICE void run(Sums16 &d, Bytes32 a, Bytes32 b) {
        d = __builtin_amdgcn_mfma_scale_f32_32x32x64_f8f6f4(
            __builtin_bit_cast(Words8, a), __builtin_bit_cast(Words8, b), d, 0, 0, 0, 0, 0, 0);
    }
};
template <> struct Product<Bf16, 16> {
    static MOE_DEVICE void run(Sums4 &d, Chunk a, Chunk b) {
        d = __builtin_amdgcn_mfma_f32_16x16x32_bf16(
            __builtin_bit_cast(Bf16x8, a), __builtin_bit_cast(Bf16x8, b), d, 0, 0, 0);
    }
};
template <> struct Product<Bf16, 32> {
    static MOE_DEVICE void run(Sums16 &d, Chunk a, Chunk b) {
        d = __builtin_amdgcn_mfma_f32_32x32x16_bf16(
            __builtin_bit_cast(Bf16x8, a), __builtin_bit_cast(Bf16x8, b), d, 0, 0, 0);
    }
};
#else
typedef short Bf16x4 __attribute__((ext_vector_type(4)));

template <> struct Product<Fp8, 16> {
    static MOE_DEVICE void run(Sums4 &d, u64 a, u64 b) {
        d = __builtin_amdgcn_mfma_f32_16x16x32_fp8_fp8(long(a), long(b), d, 0, 0, 0);
    }
};
template <> struct Product<Fp8, 32> {
    static MOE_DEVICE void run(Sums16 &d, u64 a, u64 b) {
        d = __builtin_amdgcn_mfma_f32_32x32x16_fp8_fp8(long(a), long(b), d, 0, 0, 0);
    }
};
template <> struct Product<Bf16, 16> {
    static MOE_DEVICE void run(Sums4 &d, u64 a, u64 b) {
        d = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(
            __builtin_bit_cast(Bf16x4, a), __builtin_bit_cast(Bf16x4, b), d, 0, 0, 0);
    }
};
template <> struct Product<Bf16, 32> {
    static MOE_DEVICE void run(Sums16 &d, u64 a, u64 b) {
        d = __builtin_amdgcn_mfma_f32_32x32x8bf16_1k(
            __builtin_bit_cast(Bf16x4, a), __builtin_bit_cast(Bf16x4, b), d, 0, 0, 0);
    }
};
#endif
} // namespace moe::cdna
