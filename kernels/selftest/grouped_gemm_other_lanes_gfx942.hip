// The main loop of CDNA, taking each lane for its neighbour: a negative control.

#include "../common/numbers.h"

namespace moe {
MOE_DEVICE u32 other_lane() { return lane() ^ 1; }
} // namespace moe

// In a namespace of its own, so that nothing of it is taken for that of the right one.
#define cdna cdna_of_other_lanes
#define lane other_lane
#include "../experts/grouped_gemm_mfma.h"

MOE_GROUPED_GEMM(other_lanes, Bf16, NONE, 16)
MOE_GROUPED_GEMM(other_lanes, Bf16, NONE, 32)
