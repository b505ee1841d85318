// The warpgroup matrix instruction: 64 x N += 64 x K times K x N, K being 32 bytes, the sums in registers of which the instruction
// names each. Names follow the PTX ISA, chapter "wgmma".
//
// Compile-time parameters (-D): A8 for operands of e4m3, else BF16 for those of bf16, else they are f16.
#pragma once
#include "ptx.cuh"

#if A8
#define WGMMA_TYPES "k32.f32.e4m3.e4m3"
#define WGMMA_ORDER ""  // of float8 both operands are K-major
#elif BF16
#define WGMMA_TYPES "k16.f32.bf16.bf16"
#define WGMMA_ORDER ", 0, 0"
#else
#define WGMMA_TYPES "k16.f32.f16.f16"
#define WGMMA_ORDER ", 0, 0"
#endif

// A thread holds half as many sums as there are columns.
#define WGMMA_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_48 \
  WGMMA_16 ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_72 \
  WGMMA_48 ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_96 \
  WGMMA_48 ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_OUT_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_OUT_16(d, i) WGMMA_OUT_8(d, i), WGMMA_OUT_8(d, i + 8)
#define WGMMA_OUT_48(d, i) WGMMA_OUT_16(d, i), WGMMA_OUT_16(d, i + 16), WGMMA_OUT_16(d, i + 32)
#define WGMMA_OUT_72(d, i) WGMMA_OUT_48(d, i), WGMMA_OUT_16(d, i + 48), WGMMA_OUT_8(d, i + 64)
#define WGMMA_OUT_96(d, i) WGMMA_OUT_48(d, i), WGMMA_OUT_48(d, i + 48)

// The strings A, B and PREDICATE are the places of the operands behind the sums.
#define WGMMA(COLUMNS, SUMS, A, B, PREDICATE, ORDER) \
  "{ .reg .pred p; setp.ne.b32 p, " PREDICATE ", 0; " \
  "wgmma.mma_async.sync.aligned.m64n" COLUMNS WGMMA_TYPES " " \
  "{" SUMS "}, " A ", " B ", p, 1, 1" ORDER "; }"

// Both operands come from shared memory, K-major (matrix_descriptor); without `accumulate` the sums start anew.
DEVICE void wgmma(float (&d)[16], u64 a, u64 b, int accumulate) {
  asm volatile(WGMMA("32", WGMMA_16, "%16", "%17", "%18", WGMMA_ORDER)
               : WGMMA_OUT_16(d, 0) : "l"(a), "l"(b), "r"(accumulate));
}
DEVICE void wgmma(float (&d)[48], u64 a, u64 b, int accumulate) {
  asm volatile(WGMMA("96", WGMMA_48, "%48", "%49", "%50", WGMMA_ORDER)
               : WGMMA_OUT_48(d, 0) : "l"(a), "l"(b), "r"(accumulate));
}
DEVICE void wgmma(float (&d)[72], u64 a, u64 b, int accumulate) {
  asm volatile(WGMMA("144", WGMMA_72, "%72", "%73", "%74", WGMMA_ORDER)
               : WGMMA_OUT_72(d, 0) : "l"(a), "l"(b), "r"(accumulate));
}
DEVICE void wgmma(float (&d)[96], u64 a, u64 b, int accumulate) {
  asm volatile(WGMMA("192", WGMMA_96, "%96", "%97", "%98", WGMMA_ORDER)
               : WGMMA_OUT_96(d, 0) : "l"(a), "l"(b), "r"(accumulate));
}

#if !A8
// `a` is in four registers, `b` lies transposed.
DEVICE void wgmma_from_registers(float (&d)[96], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  asm volatile(WGMMA("192", WGMMA_96, "{%96, %97, %98, %99}", "%100", "%101", ", 1")
               : WGMMA_OUT_96(d, 0) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(1));
}
#endif
