// bf16, by tokens of a tile.

#include "grouped_gemm_mfma.h"

MOE_GROUPED_GEMM(bf16, Bf16, NONE, 16)
MOE_GROUPED_GEMM(bf16, Bf16, NONE, 32)
MOE_GROUPED_GEMM(bf16, Bf16, NONE, 64)
MOE_GROUPED_GEMM(bf16, Bf16, NONE, 128)
