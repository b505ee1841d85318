// Single-head attention, head dim 384, on Hopper's warpgroup matrix instructions: softmax(Q K^T * scale) V, nothing of size
// tokens x tokens stored.
//
// A block has 128 queries, which stay in shared memory. One warp feeds: keys and values, KEYS at a time, through a ring. Two
// warpgroups of 64 queries compute, their 64 x 384 sums in registers; the second starts half a step late, so that one
// multiplies while the other does its softmax. The blocks of a cluster have different queries and the same keys: each loads
// its share of the keys and sends it to all, so L2 is asked for CLUSTER times less.
//
// KEYS is 32 for want of registers: the sums take 192 of the 240 that a thread has, the compiler keeps 24 for everything else.
//
// A slot of the ring holds KEYS keys or values as chunks of 64 channels (rows of 128 bytes). For the scores they are K-major,
// as they lie. For the sums the keys are the reduced dimension, and the values are read transposed. The probabilities go from
// accumulators to operands without leaving their thread, as both are laid out alike.
//
// Sums are rescaled only when a row's largest score has grown by more than a factor of 2^8 since the last time: the quotient
// at the end is the same, and the sums' 32 bits have room. (The idea is from FlashAttention 4.)
//
// Compile-time parameters (-D): KEYS, CLUSTER, SLOTS, SPLIT (partial results, to be merged), BF16, SHARED_BYTES,
// ARGS_BYTES.
#include "ptx.cuh"
#include "wgmma.cuh"

#ifndef __CUDACC_RTC__  // for an editor: one of the variants
#define KEYS 32
#define CLUSTER 2
#define SLOTS 5
#define SPLIT 1
#define SHARED_BYTES SMEM_BYTES
#define ARGS_BYTES sizeof(Args)
#endif

constexpr int CHANNELS = 384, CHUNK = 64, CHUNKS = CHANNELS / CHUNK;
constexpr int ROWS = 64, WARPGROUPS = 2;  // queries of a computing warpgroup; how many of these
constexpr int DEPTH = 16;                 // numbers that a matrix instruction reduces
constexpr int HALF = CHANNELS / 2;        // columns of an instruction for the sums
constexpr int ROW_BYTES = CHUNK * 2, PATTERN_BYTES = 8 * ROW_BYTES;  // of a chunk, and of its swizzle
constexpr int Q_CHUNK_BYTES = ROWS * ROW_BYTES, Q_BYTES = WARPGROUPS * CHUNKS * Q_CHUNK_BYTES;
constexpr int CHUNK_BYTES = KEYS * ROW_BYTES, SLOT_BYTES = CHUNKS * CHUNK_BYTES;
constexpr int SHARE = KEYS / CLUSTER;  // keys that one block of the cluster loads
constexpr int BARRIER_OFFSET = Q_BYTES + SLOTS * SLOT_BYTES;
constexpr int SMEM_BYTES = BARRIER_OFFSET + (1 + 2 * SLOTS) * 8;
constexpr float HEADROOM = 8.f;  // log2 of how far scores may outgrow what they are scaled by
static_assert(SMEM_BYTES <= 232448, "shared memory of one block");
static_assert(SMEM_BYTES == SHARED_BYTES, "attention.py must agree");
static_assert(KEYS % DEPTH == 0 && SHARE * ROW_BYTES % PATTERN_BYTES == 0, "whole instructions, whole swizzle patterns");

struct Args {
  void* out;       // [rows, CHANNELS], flat layout (layout.py): pixels only
  float* partial;  // SPLIT: [splits * tokens, CHANNELS]
  float* tops;     // SPLIT: [splits * tokens], log2 of the softmax denominators
  int count, width, all_tokens, splits;  // count: tokens of one image
  int first;       // query of the first block
  float scale;     // of the scores, times log2(e)
};
static_assert(sizeof(Args) == ARGS_BYTES, "_Args in attention.py must agree");

struct Ring {  // position in the ring, and the parity its barriers are at
  u32 slot = 0, parity = 0;
  DEVICE void advance() {
    if (++slot == SLOTS) { slot = 0; parity ^= 1; }
  }
};

struct Shared {
  u32 base;
  DEVICE u32 queries(u32 wg) const { return base + wg * CHUNKS * Q_CHUNK_BYTES; }
  DEVICE u32 at(u32 slot) const { return base + Q_BYTES + slot * SLOT_BYTES; }
  DEVICE u32 bar(u32 i) const { return base + BARRIER_OFFSET + 8 * i; }
  DEVICE u32 queries_full() const { return bar(0); }
  DEVICE u32 full(u32 slot) const { return bar(1 + slot); }
  DEVICE u32 empty(u32 slot) const { return bar(1 + SLOTS + slot); }
};

struct Range { int image, first, begin, end; };  // tokens within the image: the first of the block's queries; its keys

// ---- the feeding warp ---------------------------------------------------------------------------------------------
DEVICE void feed(const Shared& s, const TensorMap* queries, const TensorMap* keys, const Range& range, u32 rank) {
  mbar_expect(s.queries_full(), Q_BYTES);
  for (int i = 0; i < WARPGROUPS * CHUNKS; ++i)
    tma_load_3d(s.base + i * Q_CHUNK_BYTES, queries, s.queries_full(), i % CHUNKS * CHUNK, range.first + i / CHUNKS * ROWS,
                range.image);
  Ring ring;
  for (int key = range.begin; key < range.end; key += KEYS)
    for (int kind = 1; kind <= 2; ++kind) {  // keys, then values
      mbar_wait_cluster(s.empty(ring.slot), ring.parity ^ 1);
      mbar_expect(s.full(ring.slot), SLOT_BYTES);
      for (int c = 0; c < CHUNKS; ++c)
        tma_load_3d_multicast(s.at(ring.slot) + c * CHUNK_BYTES + rank * SHARE * ROW_BYTES, keys, s.full(ring.slot),
                              kind * CHANNELS + c * CHUNK, key + rank * SHARE, range.image, (1 << CLUSTER) - 1);
      ring.advance();
    }
}

// ---- the computing warpgroups -------------------------------------------------------------------------------------
// A warp is done with a slot: told to the feeding warps of the whole cluster, for each of them fills it.
DEVICE void release(const Shared& s, u32 slot, bool leader) {
  if (!leader) return;
#pragma unroll
  for (u32 block = 0; block < CLUSTER; ++block) mbar_arrive_remote(map_to_cta(s.empty(slot), block));
}

DEVICE float infinity() { return __int_as_float(0x7F800000); }
constexpr float LOWEST = -3.402823466e38f;  // keys whose scores are all -infinity may be followed by others: not -infinity

// Accumulators 4 * j + 2 * r + {0, 1} of a thread are columns 8 * j + 2 * (lane % 4) + {0, 1} of its row r: row
// 16 * warp + lane / 4 + 8 * r of the warpgroup's 64.
struct Rows {
  float top[2] = {LOWEST, LOWEST};  // largest score when last rescaled, times scale
  float total[2] = {0.f, 0.f};      // this thread's share of the softmax denominator
};

// Rescale what there is to the largest of the scores so far, if it has outgrown the headroom. `left`: columns from there
// on are no keys of this image.
DEVICE void keep_in_range(float (&score)[KEYS / 2], float (&sum)[2][HALF / 2], Rows& rows, float scale, int left, u32 lane) {
  if (left < KEYS) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i)
      if (i / 4 * 8 + int(lane % 4) * 2 + i % 2 >= left) score[i] = -infinity();
  }
  float most[2] = {score[0], score[2]};
#pragma unroll
  for (int i = 0; i < KEYS / 2; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], score[i]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
    most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2)) * scale;
  }
  if (!__any_sync(~0u, most[0] > rows.top[0] + HEADROOM || most[1] > rows.top[1] + HEADROOM)) return;
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = fmaxf(rows.top[r], most[r]);
    factor[r] = exp2_approx(rows.top[r] - top);
    rows.total[r] *= factor[r];
    rows.top[r] = top;
  }
#pragma unroll
  for (int i = 0; i < HALF; ++i) sum[i / (HALF / 2)][i % (HALF / 2)] *= factor[i / 2 % 2];
}

// DEPTH columns of the scores, from DEPTH * k on, to probabilities as the operand of a matrix instruction.
DEVICE void probabilities(u32 (&p)[4], const float (&score)[KEYS / 2], Rows& rows, float scale, int k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = i % 2;
    const float a = exp2_approx(fmaf(score[8 * k + 2 * i], scale, -rows.top[r]));
    const float b = exp2_approx(fmaf(score[8 * k + 2 * i + 1], scale, -rows.top[r]));
    rows.total[r] += a + b;
    p[i] = pack2(a, b);
  }
}

DEVICE void store(float (&sum)[2][HALF / 2], Rows& rows, const Args& args, const Range& range, u32 wg, u32 warp, u32 lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.total[r] += __shfl_xor_sync(~0u, rows.total[r], 1);
    rows.total[r] += __shfl_xor_sync(~0u, rows.total[r], 2);
    // Of scores of -infinity alone: NaN, but for splits, where 0 sums count for nothing when they are merged.
    const float inverse = 1.f / (SPLIT && rows.total[r] == 0.f ? 1.f : rows.total[r]);
    const int token = range.first + wg * ROWS + warp * 16 + lane / 4 + 8 * r;
    if (token >= args.count) continue;
    const int y = token / args.width, x = token % args.width;
    const i64 row = SPLIT ? i64(blockIdx.y) * args.all_tokens + range.image * args.count + token
                          : i64(range.image * (args.count / args.width + 1) + y + 1) * (args.width + 1) + x + 1;
    const i64 start = row * CHANNELS + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < CHANNELS / 8; ++j) {
      const float* const v = &sum[j / (HALF / 8)][j % (HALF / 8) * 4 + 2 * r];
      if (SPLIT) *reinterpret_cast<float2*>(args.partial + start + 8 * j) = make_float2(v[0] * inverse, v[1] * inverse);
      else *reinterpret_cast<u32*>(static_cast<u16*>(args.out) + start + 8 * j) = pack2(v[0] * inverse, v[1] * inverse);
    }
    if (SPLIT && lane % 4 == 0) args.tops[row] = rows.top[r] + log2f(rows.total[r]);
  }
}

DEVICE void compute(const Shared& s, const Args& args, const Range& range, u32 wg, u32 warp, u32 lane) {
  const bool leader = lane == 0;
  float sum[2][HALF / 2] = {};
  Rows rows;
  Ring ring;
  mbar_wait(s.queries_full(), 0);
  if (wg == 1) named_sync(1, 256);
  const u64 queries = matrix_descriptor<ROW_BYTES>(s.queries(wg), PATTERN_BYTES);
  for (int key = range.begin; key < range.end; key += KEYS) {
    float score[KEYS / 2];
    mbar_wait(s.full(ring.slot), ring.parity);
    const u64 keys = matrix_descriptor<ROW_BYTES>(s.at(ring.slot), PATTERN_BYTES);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < CHANNELS / DEPTH; ++i) {
      const int chunk = i / (CHUNK / DEPTH), inside = i % (CHUNK / DEPTH) * DEPTH * 2;
      wgmma(score, queries + (chunk * Q_CHUNK_BYTES + inside) / 16, keys + (chunk * CHUNK_BYTES + inside) / 16, i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(score);
    release(s, ring.slot, leader);
    ring.advance();
    if (wg == 0 && key == range.begin) named_arrive(1, 256);

    keep_in_range(score, sum, rows, args.scale, args.count - key, lane);

    mbar_wait(s.full(ring.slot), ring.parity);
    const u64 values = matrix_descriptor<ROW_BYTES>(s.at(ring.slot), PATTERN_BYTES, CHUNK_BYTES);
#pragma unroll
    for (int k = 0; k < KEYS / DEPTH; ++k) {  // the next probabilities are computed while these are multiplied
      u32 p[4];
      probabilities(p, score, rows, args.scale, k);
      wgmma_fence();
#pragma unroll
      for (int half = 0; half < 2; ++half)
        wgmma_from_registers(sum[half], p[0], p[1], p[2], p[3],
                             values + (half * HALF / CHUNK * CHUNK_BYTES + k * DEPTH * ROW_BYTES) / 16);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(sum[0]);
    pin(sum[1]);
    release(s, ring.slot, leader);
    ring.advance();
  }
  store(sum, rows, args, range, wg, warp, lane);
}

// Grid: tiles of queries (rounded up to whole clusters), splits of the keys, images. `queries` and `keys` describe the same
// tokens [B, count, 3 * CHANNELS], in boxes of 64 channels by ROWS and by SHARE tokens. Beyond an image they read zeros: a
// probability of 0 times a NaN of the next image would be NaN.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(128 * (WARPGROUPS + 1), 1)
attention(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys, const __grid_constant__ Args args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0), wg = warp / 4;
  const Shared s{smem_address(memory)};
  const u32 rank = CLUSTER > 1 ? cluster_ctarank() : 0;
  const int blocks = (args.count + KEYS - 1) / KEYS;
  const Range range{int(blockIdx.z), args.first + int(blockIdx.x) * WARPGROUPS * ROWS, blocks * int(blockIdx.y) / args.splits * KEYS,
                    blocks * int(blockIdx.y + 1) / args.splits * KEYS};
  if (threadIdx.x == 0) {
    tensormap_prefetch(&queries);
    tensormap_prefetch(&keys);
    mbar_init(s.queries_full(), 1);
    for (int i = 0; i < SLOTS; ++i) { mbar_init(s.full(i), 1); mbar_init(s.empty(i), 4 * WARPGROUPS * CLUSTER); }
    mbar_init_fence();
  }
  if constexpr (CLUSTER > 1) cluster_sync();
  __syncthreads();
  wait_for_previous_kernel();
  if (threadIdx.x == 0) let_next_kernel_start();

  if (wg == 0) {
    registers_decrease<24>();
    if (threadIdx.x == 0) feed(s, &queries, &keys, range, rank);
  } else {
    registers_increase<240>();
    compute(s, args, range, wg - 1, warp % 4, lane_id());
  }
  if constexpr (CLUSTER > 1) cluster_sync();  // no block leaves while a peer may still write into it
}
