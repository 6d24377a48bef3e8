// The instructions of this device that multiply.

#include "mfma.h"

MOE_SELFTEST_MFMA(bf16_16, Bf16, 16)
MOE_SELFTEST_MFMA(bf16_32, Bf16, 32)
MOE_SELFTEST_MFMA(fp8_16, Fp8, 16)
MOE_SELFTEST_MFMA(fp8_32, Fp8, 32)
