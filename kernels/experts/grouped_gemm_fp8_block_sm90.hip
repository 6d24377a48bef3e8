// FP8 with one scale per 1x128 of a token and per 128x128 of weights, by tokens of a tile.

#include "grouped_gemm_sm90.h"

using namespace moe;
using namespace moe::sm90;

#define GROUPED_GEMM(tokens, stages)                                                                                   \
    MOE_KERNEL_BLOCKS(grouped_gemm_fp8_block_##tokens, GroupedGemmParams, GROUPED_GEMM_THREADS, BLOCKS<tokens>) {                             \
        grouped_gemm<Fp8, Scales::BLOCK, tokens, stages>(p);                                                           \
    }

GROUPED_GEMM(8, 12)
GROUPED_GEMM(16, 11)
GROUPED_GEMM(32, 10)
GROUPED_GEMM(64, 8)
GROUPED_GEMM(128, 4)
