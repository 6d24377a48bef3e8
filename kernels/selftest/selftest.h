// What the kernels of this folder are given; crates/moe-kernels/src/selftest.rs has the same struct.
#pragma once

#include "../common/platform.h"

namespace moe {
struct SelftestParams {
    u64 input;  // [blocks, 128] u32
    u64 output; // [blocks, 128] u32
};
static_assert(sizeof(SelftestParams) == 16, "mirrored in Rust");

constexpr u32 SELFTEST_THREADS = 128;
} // namespace moe
