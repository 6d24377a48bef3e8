// The main loop of CDNA without its barriers: a negative control.

#include "../common/numbers.h"
#include "../experts/grouped_gemm_tiles.h"

namespace moe {
MOE_DEVICE void sync_nobody() {}
} // namespace moe

// In a namespace of its own, so that nothing of it is taken for that of the right one.
#define cdna cdna_without_barrier
#define sync_block sync_nobody
#include "../experts/grouped_gemm_mfma.h"

MOE_GROUPED_GEMM(without_barrier, Bf16, NONE, 32)
