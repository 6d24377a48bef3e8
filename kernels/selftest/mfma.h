// Each product of a wave by itself: what lanes give is read from memory, and what they get is written there.
#pragma once

#include "../common/mfma.h"
#include "selftest.h"

// `input` has an operand a of each lane, then an operand b of each; `output` the sums of each lane, which begin with 1.
#define MOE_SELFTEST_MFMA(name, T, side)                                                                               \
    MOE_KERNEL(selftest_mfma_##name, moe::SelftestParams, moe::WARP) {                                                 \
        using Operand = moe::cdna::OperandOf<moe::cdna::T>::Type;                                                      \
        const Operand *input = moe::ptr<const Operand>(p.input);                                                       \
        auto &d = moe::ptr<moe::cdna::Sums<side>>(p.output)[moe::lane()];                                              \
        for (moe::u32 i = 0; i < side * side / moe::WARP; i++) d[i] = 1.0f;                                            \
        moe::cdna::Product<moe::cdna::T, side>::run(d, input[moe::lane()], input[moe::WARP + moe::lane()]);            \
    }
