// bf16 weights and tokens. By tokens of a tile.

#include "grouped_gemm_sm90.h"

using namespace moe;
using namespace moe::sm90;

#define GROUPED_GEMM(tokens, stages)                                                                                   \
    MOE_KERNEL_BLOCKS(grouped_gemm_bf16_##tokens, GroupedGemmParams, GROUPED_GEMM_THREADS, BLOCKS<tokens>) {                         \
        grouped_gemm<Bf16, Scales::NONE, tokens, stages>(p);                                                      \
    }

GROUPED_GEMM(8, 12)
GROUPED_GEMM(16, 11)
GROUPED_GEMM(32, 10)
GROUPED_GEMM(64, 8)
GROUPED_GEMM(128, 4)
