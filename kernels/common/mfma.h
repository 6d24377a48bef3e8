// What only CDNA has: products of a wave (MFMA), d += a·b for SIDE rows of a, SIDE columns of b and some columns of k.
//
// Lane l of the 64 has a part of row l % SIDE of a, and of column l % SIDE of b: as many bytes as an Operand. Its place along k
// is that of l / SIDE, the same for both, so that k may be cut into operands in any order. Of d it has column l % SIDE and, of
// the rows, 4·(l / SIDE) + r % 4 + 8·(r / 4) in sum r (rows of 32) or 4·(l / SIDE) + r (rows of 16). So in AMD's "Instinct MI300
// Instruction Set Architecture" and "CDNA4 Instruction Set Architecture", and in its matrix instruction calculator.
#pragma once

#include "platform.h"

namespace moe::cdna {
// bf16, or FP8 (e4m3) as the device has it: FNUZ on gfx942, OCP on gfx950.
struct Fp8 {};
struct Bf16 {};

// What a lane has of a row of 128 bytes.
template <u32 SIDE> constexpr u32 CHUNKS = 8 * SIDE / WARP;
} // namespace moe::cdna

#if defined(MOE_HOST_SIMT)
#include "mfma_host.h"
#else
#include "mfma_amd.h"
#endif

namespace moe::cdna {
// The products of 128 bytes of k, of which this lane has every (64 / SIDE)th chunk of 16 bytes.
template <class T, u32 SIDE>
MOE_DEVICE void multiply(Sums<SIDE> &d, const Chunk (&a)[CHUNKS<SIDE>], const Chunk (&b)[CHUNKS<SIDE>]) {
    using Operand = typename OperandOf<T>::Type;
    constexpr u32 INSTRUCTIONS = CHUNKS<SIDE> * sizeof(Chunk) / sizeof(Operand);
    MOE_UNROLL for (u32 i = 0; i < INSTRUCTIONS; i++) {
        Operand of_a, of_b;
        __builtin_memcpy(&of_a, reinterpret_cast<const u8 *>(a) + i * sizeof(Operand), sizeof(Operand));
        __builtin_memcpy(&of_b, reinterpret_cast<const u8 *>(b) + i * sizeof(Operand), sizeof(Operand));
        Product<T, SIDE>::run(d, of_a, of_b);
    }
}
} // namespace moe::cdna
