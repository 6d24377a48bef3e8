// Integers of fixed size; no header of a C library is there on every target.
#pragma once

namespace moe {
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i32 = int;
using u64 = unsigned long long;
static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "sizes that params rely on");

// 16 bytes: the widest access of a lane.
struct alignas(16) u32x4 {
    u32 v[4];
};
} // namespace moe
