// wgmma for 64 rows and N columns, both operands in shared memory with K along the rows: d = a·bᵀ, or d += a·bᵀ.
// Thread t of the warpgroup has rows r and r + 8, r = 16·(t / 32) + t % 32 / 4, and of each eight columns c and c + 1,
// c = 2·(t % 4): d[4j], d[4j + 1] in row r and d[4j + 2], d[4j + 3] in row r + 8, of columns 8j + c.
#pragma once

#include "sm90.h"

namespace moe::sm90 {
// FP8 (e4m3) products of 32 columns of K, bf16 products of 16: 32 bytes of a row.
struct Fp8 {};
struct Bf16 {};

template <class T, u32 N> struct Product;

// An instruction has its sums as so many operands, which cannot be counted: OPERANDS are their places in its text and SUMS the
// registers, and the two addresses and the flag are the places behind them.
#define MOE_WGMMA(T, N, SHAPE, TAIL, A, B, ADD, OPERANDS, ...)                                                         \
    template <> struct Product<T, N> {                                                                                 \
        static MOE_DEVICE void run(float (&d)[N / 2], u64 a, u64 b, bool add) {                                        \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD ", 0;\n"                                            \
                         "wgmma.mma_async.sync.aligned." SHAPE " {" OPERANDS "}, %" A ", %" B ", p, 1, 1" TAIL ";\n}"   \
                         : __VA_ARGS__                                                                                 \
                         : "l"(a), "l"(b), "r"(u32(add)));                                                             \
        }                                                                                                              \
    };
#define MOE_WGMMA_BOTH(N, A, B, ADD, OPERANDS, ...)                                                                    \
    MOE_WGMMA(Fp8, N, "m64n" #N "k32.f32.e4m3.e4m3", "", A, B, ADD, OPERANDS, __VA_ARGS__)                             \
    MOE_WGMMA(Bf16, N, "m64n" #N "k16.f32.bf16.bf16", ", 0, 0", A, B, ADD, OPERANDS, __VA_ARGS__)

MOE_WGMMA_BOTH(8, "4", "5", "6",
               "%0, %1, %2, %3",
               "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]))

MOE_WGMMA_BOTH(16, "8", "9", "10",
               "%0, %1, %2, %3, %4, %5, %6, %7",
               "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]))

MOE_WGMMA_BOTH(32, "16", "17", "18",
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15",
               "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
               "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]))

MOE_WGMMA_BOTH(64, "32", "33", "34",
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
               "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
               "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
               "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
               "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]))

MOE_WGMMA_BOTH(128, "64", "65", "66",
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63",
               "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
               "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
               "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
               "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
               "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
               "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
               "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
               "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]))

#undef MOE_WGMMA
#undef MOE_WGMMA_BOTH
} // namespace moe::sm90
