// Thin wrappers over the Hopper (sm_90a) instructions the kernels use. Self-contained on purpose: the file is
// compiled by NVRTC on the user's machine, where neither CUTLASS nor the CUDA headers can be assumed.
// Names follow the PTX ISA; see its chapters "mbarrier", "cp.async.bulk" and "wgmma" for the semantics.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__

struct alignas(64) TensorMap { unsigned char opaque[128]; };  // CUtensorMap, encoded by the host

DEVICE u32 smem_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

DEVICE u32 lane_id() {  // volatile, so that it stays in its register: reading it again stalls behind matrix instructions
  u32 r;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(r));
  return r;
}

// ---- mbarrier -----------------------------------------------------------------------------------------------------
DEVICE void mbar_init(u32 bar, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
DEVICE void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbar_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
DEVICE void mbar_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE bool mbar_try_wait(u32 bar, u32 parity) {
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done) : "r"(bar), "r"(parity) : "memory");
  return done;
}
DEVICE bool mbar_test(u32 bar, u32 parity) {  // returns at once
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done) : "r"(bar), "r"(parity) : "memory");
  return done;
}
DEVICE bool mbar_try_wait_cluster(u32 bar, u32 parity) {
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done) : "r"(bar), "r"(parity) : "memory");
  return done;
}
DEVICE void mbar_wait(u32 bar, u32 parity) {
  while (!mbar_try_wait(bar, parity)) {}
}
DEVICE void mbar_wait_cluster(u32 bar, u32 parity) {
  while (!mbar_try_wait_cluster(bar, parity)) {}
}

// Orders this thread's shared-memory reads before the copy engine's next write to the same bytes. Without it a load still
// in flight behind stores may return the refill of a buffer that was already handed back.
DEVICE void fence_before_refill() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- counters -----------------------------------------------------------------------------------------------------
DEVICE u32 load_acquire_gpu(const u32* p) {
  u32 r;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
  return r;
}
DEVICE void add_relaxed_gpu(u32* p, u32 value) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEVICE u32 load_acquire_shared(u32 address) {
  u32 r;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(r) : "r"(address) : "memory");
  return r;
}
DEVICE void add_release_shared(u32 address, u32 value) {
  asm volatile("red.release.cta.shared::cta.add.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
DEVICE void pause() { asm volatile("nanosleep.u32 64;"); }
// Orders what other threads stored and this one has acquired before its copy-engine loads.
DEVICE void fence_before_tensor_loads() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- bulk copies (the copy engine) --------------------------------------------------------------------------------
DEVICE void tma_load_4d(u32 dst, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(dst), "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
DEVICE void tma_load_3d(u32 dst, const TensorMap* map, u32 bar, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(dst), "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
// To the same place of every block of the cluster whose bit is set in `blocks`, counted by each one's own barrier.
DEVICE void tma_load_3d_multicast(u32 dst, const TensorMap* map, u32 bar, int c0, int c1, int c2, u16 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;"
      ::"r"(dst), "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "h"(blocks) : "memory");
}
DEVICE void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(dst), "l"(src), "r"(bytes), "r"(bar) : "memory");
}
DEVICE void tma_prefetch_4d(const TensorMap* map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];"
               ::"l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
DEVICE void tensormap_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- clusters -----------------------------------------------------------------------------------------------------
DEVICE u32 cluster_ctarank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE u32 map_to_cta(u32 address, u32 rank) {  // the same shared-memory variable in another block of the cluster
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
DEVICE void mbar_arrive_remote(u32 bar) {  // `bar`: from map_to_cta
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
DEVICE void store_remote(u32 address, float value, u32 bar) {  // 4 bytes that count towards `bar` in the target block
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               ::"r"(address), "r"(__float_as_uint(value)), "r"(bar) : "memory");
}

// ---- dependent launches (PTX ISA, "griddepcontrol") -----------------------------------------------------------------
// The kernel before this one in the stream has completed and its writes are visible; at once if it is not overlapped.
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel's blocks may start where there is room, once every block has said so or ended.
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- warpgroups ---------------------------------------------------------------------------------------------------
template <int Registers> DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers> DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending> DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from reading accumulators before the wait that completes them.
template <int Count> DEVICE void pin(float (&v)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(v[i])::"memory");
}

// K-major shared-memory matrix whose rows are `RowBytes` (128 or 64) long and swizzled over that width. Groups of eight
// rows lie `group_stride` bytes apart. The swizzle XORs bits of the final address, so a matrix may begin at any row of a
// buffer that itself begins on a swizzle-pattern boundary; the descriptor's base offset stays 0. Of a matrix that lies
// transposed the rows run along the dimension that is not reduced, and their continuation is `leading` bytes away.
template <int RowBytes> DEVICE u64 matrix_descriptor(u32 address, u32 group_stride, u32 leading = 16) {
  static_assert(RowBytes == 128 || RowBytes == 64, "128-byte or 64-byte swizzle");
  return (u64((address & 0x3FFFF) >> 4)) | (u64(leading >> 4) << 16) | (u64(group_stride >> 4) << 32) |
         (u64(RowBytes == 128 ? 1 : 2) << 62);
}

// ---- 16-bit numbers -----------------------------------------------------------------------------------------------
#if BF16
DEVICE u32 pack2(float lo, float hi) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
DEVICE float unpack_lo(u32 v) { return __uint_as_float(v << 16); }
DEVICE float unpack_hi(u32 v) { return __uint_as_float(v & 0xFFFF0000u); }
#else
DEVICE u32 pack2(float lo, float hi) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
DEVICE float half_to_float(u16 v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}
DEVICE float unpack_lo(u32 v) { return half_to_float(u16(v)); }
DEVICE float unpack_hi(u32 v) { return half_to_float(u16(v >> 16)); }
#endif

// Four e4m3 numbers. Too large ones are clamped, infinity too; NaN stays NaN.
DEVICE u32 pack4_e4m3(float a, float b, float c, float d) {
  u16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return u32(low) | u32(high) << 16;
}

DEVICE float max_or_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
DEVICE float exp2_approx(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
DEVICE float rcp_approx(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
DEVICE float load_shared(u32 address) {
  float v;
  asm volatile("ld.shared::cta.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
DEVICE float tanh_approx(float v) {
  float r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
DEVICE uint4 load_shared_16(u32 address) {
  uint4 v;
  asm volatile("ld.shared::cta.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}
DEVICE uint2 load_shared_8(u32 address) {
  uint2 v;
  asm volatile("ld.shared::cta.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
// Predicated instead of branched around, so that the compiler can interleave neighbouring accesses.
DEVICE uint4 load_stream(const void* p, bool valid) {  // read once: keep it out of L1 (.nc would need it unchanged from launch on)
  uint4 v = {0, 0, 0, 0};
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0;\n"
               "@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"(int(valid)));
  return v;
}
DEVICE void store_16(void* p, uint4 v, bool valid = true) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0;\n@p st.global.v4.u32 [%0], {%1, %2, %3, %4}; }"
               ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(int(valid)) : "memory");
}
DEVICE void store_8_bytes(void* p, uint2 v, bool valid) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0;\n@p st.global.v2.u32 [%0], {%1, %2}; }"
               ::"l"(p), "r"(v.x), "r"(v.y), "r"(int(valid)) : "memory");
}
DEVICE void store_4_bytes(void* p, u32 v, bool valid) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0;\n@p st.global.u32 [%0], %1; }" ::"l"(p), "r"(v), "r"(int(valid)) : "memory");
}
