// FP8 with one scale per 1x128 of a token and per 128x128 of weights, by tokens of a tile.

#include "grouped_gemm_mfma.h"

MOE_GROUPED_GEMM(fp8_block, Fp8, BLOCK, 16)
MOE_GROUPED_GEMM(fp8_block, Fp8, BLOCK, 32)
MOE_GROUPED_GEMM(fp8_block, Fp8, BLOCK, 64)
MOE_GROUPED_GEMM(fp8_block, Fp8, BLOCK, 128)
