// FP8 with one scale per token and one per weight row (PTPC), by tokens of a tile.

#include "grouped_gemm_mfma.h"

MOE_GROUPED_GEMM(fp8_row, Fp8, ROW, 16)
MOE_GROUPED_GEMM(fp8_row, Fp8, ROW, 32)
MOE_GROUPED_GEMM(fp8_row, Fp8, ROW, 64)
MOE_GROUPED_GEMM(fp8_row, Fp8, ROW, 128)
