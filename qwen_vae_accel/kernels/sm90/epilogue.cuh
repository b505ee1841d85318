// What follows the products: bias, residual, sum of squares over the channels of a pixel, norm, SiLU, stores.
#pragma once
#include "conv_tile.cuh"

// Where a thread's accumulators live. Instruction rows 16*warp + lane/4 + 8*half are pixel row 2*warp + half, column
// lane/4 of an 8x8 block. Weight rows are permuted so that its columns are channels 32*group + 8*(lane%4) + 0..7, or
// 32*group + 4*(lane%4) + 0..3 in a group of 16; of the eight values that the functions here pass on, the rest are then zeros.
struct Place {
  i64 residual, x, n;  // element offset of (block 0, half 0, group 0)
  int channel;
  DEVICE int channel_of(int group) const { return 32 * group + (half_group(group) ? channel / 2 : channel); }
  bool inside[MB][2];
};

DEVICE Place place_of(const Args& a, const Tile& t, const Shared& s, int wg, u32 rank) {
  const int y = t.y + (RESIDENT ? 0 : wg * 8) + 2 * s.warp, column = t.x + s.lane / 4;
  Place p;
  p.channel = 8 * (s.lane % 4);
  const int oy = SCALE * y + t.parity / 2, ox = SCALE * column + t.parity % 2;
  const i64 dense = i64(ox) * COUT + rank * NB + p.channel;
  p.residual = t.image * a.residual_image + oy * a.residual_row + dense;
  p.x = t.image * a.x_image + oy * a.x_row + dense;
  p.n = t.image * a.n_image + oy * a.n_row + dense;
#pragma unroll
  for (int i = 0; i < 2 * MB; ++i) p.inside[i / 2][i % 2] = y + i % 2 < a.height && column + 8 * (i / 2) < a.width;
  return p;
}
DEVICE i64 offset_of(const Place& p, int block, int half, int group, i64 row) {
  return half * SCALE * row + 8 * block * SCALE * COUT + 32 * group - (half_group(group) ? p.channel / 2 : 0);
}

DEVICE void take_8(float (&v)[8], const float (&acc)[NB / 2], int group, int half) {
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = half_group(group) && j > 3 ? 0.f : acc[16 * group + 4 * (j / 2) + 2 * half + j % 2];
}
DEVICE void put_8(float (&acc)[NB / 2], const float (&v)[8], int group, int half) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (!half_group(group) || j < 4) acc[16 * group + 4 * (j / 2) + 2 * half + j % 2] = v[j];
}
DEVICE void load_8(float (&v)[8], const float* p, int group) {
  const float4 lo = reinterpret_cast<const float4*>(p)[0];
  const float4 hi = half_group(group) ? float4{0.f, 0.f, 0.f, 0.f} : reinterpret_cast<const float4*>(p)[1];
  v[0] = lo.x; v[1] = lo.y; v[2] = lo.z; v[3] = lo.w; v[4] = hi.x; v[5] = hi.y; v[6] = hi.z; v[7] = hi.w;
}
DEVICE void add_8(float (&v)[8], const uint4& r) {
  v[0] += unpack_lo(r.x); v[1] += unpack_hi(r.x); v[2] += unpack_lo(r.y); v[3] += unpack_hi(r.y);
  v[4] += unpack_lo(r.z); v[5] += unpack_hi(r.z); v[6] += unpack_lo(r.w); v[7] += unpack_hi(r.w);
}
DEVICE uint4 pack_8(const float (&v)[8]) {
  return make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
}

// Eight channels of a pixel, at `element` of an output in 16 bits or, times `scale`, in float8. That lacks infinity, which
// becomes NaN: v * 0 is NaN for it, else 0. What a norm gives is finite or NaN.
template <bool Float8, bool Norm>
DEVICE void store_8(void* out, i64 element, const float (&v)[8], float scale, bool inside, int group) {
  if constexpr (Float8) {
    float w[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = Norm ? v[j] * scale : fmaf(v[j], scale, v[j] * 0.f);
    unsigned char* const to = static_cast<unsigned char*>(out) + element;
    const u32 first = pack4_e4m3(w[0], w[1], w[2], w[3]);
    if (half_group(group)) store_4_bytes(to, first, inside);
    else store_8_bytes(to, make_uint2(first, pack4_e4m3(w[4], w[5], w[6], w[7])), inside);
  } else {
    u16* const to = static_cast<u16*>(out) + element;
    if (half_group(group)) store_8_bytes(to, make_uint2(pack2(v[0], v[1]), pack2(v[2], v[3])), inside);
    else store_16(to, pack_8(v), inside);
  }
}

// v * scale * gamma, then SiLU. bf16: y * sigmoid(y) = h + h * tanh(h) with h = y / 2, one special-function instruction
// whose error (2^-11 of tanh) stays under bf16's rounding. fp16: two sigmoids from two exponentials and one reciprocal;
// the clamp keeps their product finite (it swallows NaN, which the product with v has again).
DEVICE void normalize_8(float (&v)[8], float scale, const float (&gamma)[8]) {
#if NORM == 2 && BF16
  scale *= 0.5f;
#endif
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] *= scale * gamma[j];
#if NORM == 2 && BF16
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = fmaf(v[j], tanh_approx(v[j]), v[j]);
#elif NORM == 2
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const float a = 1.f + exp2_approx(fminf(v[j] * -1.4426950408889634f, 60.f));
    const float b = 1.f + exp2_approx(fminf(v[j + 1] * -1.4426950408889634f, 60.f));
    const float r = rcp_approx(a * b);
    v[j] *= r * b;
    v[j + 1] *= r * a;
  }
#endif
}

// Sums of squares over all channels of a pixel: over the four lanes that share it, then over the cluster.
DEVICE void reduce_squares(float (&sum)[MB][2], const Shared& s, int wg, u32 rank, u32 tile_count) {
#pragma unroll
  for (int q = 0; q < 2 * MB; ++q) {
    sum[q / 2][q % 2] += __shfl_xor_sync(~0u, sum[q / 2][q % 2], 1);
    sum[q / 2][q % 2] += __shfl_xor_sync(~0u, sum[q / 2][q % 2], 2);
  }
  if constexpr (SPLIT > 1) {
    const u32 quad = s.lane % 4;
    const u32 slot = tile_count & 1, parity = tile_count >> 1 & 1;  // two slots: a peer may be one tile ahead
    const u32 full = s.sums_full(wg, slot), row = s.warp * 8 + s.lane / 4;
    if (s.warp + s.lane == 0) mbar_expect(full, (SPLIT - 1) * MB * 64 * 4);
    if (quad < 2 * MB) {  // lane q of four sends the q-th of the pixels that the four share
      float mine = sum[0][0];
#pragma unroll
      for (int q = 1; q < 2 * MB; ++q) mine = quad == q ? sum[q / 2][q % 2] : mine;
#pragma unroll
      for (u32 k = 1; k < SPLIT; ++k) {
        const u32 peer = (rank + k) % SPLIT;
        const u32 sender = rank < peer ? rank : rank - 1;
        store_remote(map_to_cta(s.sums(wg, slot, sender, quad * 32 + row), peer), mine, map_to_cta(full, peer));
      }
    }
    mbar_wait_cluster(full, parity);
#pragma unroll
    for (int k = 0; k < SPLIT - 1; ++k)
#pragma unroll
      for (int q = 0; q < 2 * MB; ++q) sum[q / 2][q % 2] += load_shared(s.sums(wg, slot, k, q * 32 + row));
  }
}

using Residual = uint4[MB][2][R_EARLY ? GROUPS : 1];

DEVICE void load_residual(Residual& r, const Place& p, const Args& a, int g, int to) {
  const u16* const source = static_cast<const u16*>(a.residual) + p.residual;
#pragma unroll
  for (int q = 0; q < 2 * MB; ++q)
    r[q / 2][q % 2][to] = load_stream(source + offset_of(p, q / 2, q % 2, g, a.residual_row), p.inside[q / 2][q % 2]);
}
// Pixel q of a thread's four (block q / 2, half q % 2) from a buffer of the ring, in which rows of 64 bytes are swizzled.
DEVICE uint4 residual_part(const Shared& s, u32 buffer, int q, int group) {
  const u32 pixel = 2 * s.warp * TILE_W + s.lane / 4, row = s.r(buffer) + pixel * 64 + (q % 2 * TILE_W + q / 2 * 8) * 64;
  if (half_group(group)) {
    const uint2 part = load_shared_8(row + (s.lane % 4 / 2 ^ s.lane / 8 % 4) * 16 + s.lane % 2 * 8);
    return make_uint4(part.x, part.y, 0, 0);
  }
  const u32 unit = s.lane % 4 ^ s.lane / 8 % 4;
  return load_shared_16(row + unit * 16);
}

// Sums of float8 products back to the convolution's scale. Apart from the bias: fewer registers at a time.
DEVICE void rescale(float (&acc)[MB][NB / 2], int group, const float* factors) {
  float factor[8];
  load_8(factor, factors, group);
#pragma unroll
  for (int q = 0; q < 2 * MB; ++q) {
    float v[8];
    take_8(v, acc[q / 2], group, q % 2);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= factor[j];
    put_8(acc[q / 2], v, group, q % 2);
  }
}

DEVICE void epilogue(float (&acc)[MB][NB / 2], Residual& residual, Ring& rr, const Place& p, const Args& args,
                     const Shared& s, const float* vectors, int wg, u32 rank, u32 tile_count) {
  float sum[MB][2] = {};
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    float bias[8];
    if constexpr (A8) rescale(acc, g, vectors + 2 * NB + p.channel_of(g));
    load_8(bias, vectors + p.channel_of(g), g);
    // Opaque to the compiler, which would otherwise compute the addresses of all groups beforehand and have to spill them.
    asm volatile("" : "+r"(rr.stage), "+r"(rr.parity));
    const u32 buffer = wg * R_STAGES + rr.stage;
    if constexpr (R_RING) mbar_wait(s.r_full(buffer), rr.parity);
    else if constexpr (RESIDUAL && !R_EARLY) load_residual(residual, p, args, g, 0);
#pragma unroll
    for (int q = 0; q < 2 * MB; ++q) {
      float v[8];
      take_8(v, acc[q / 2], g, q % 2);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] += bias[j];
      if constexpr (R_RING) add_8(v, residual_part(s, buffer, q, g));
      else if (RESIDUAL) add_8(v, residual[q / 2][q % 2][R_EARLY ? g : 0]);
      if (!NORM)
        store_8<X8, false>(args.x, p.x + offset_of(p, q / 2, q % 2, g, args.x_row), v, args.x_scale, p.inside[q / 2][q % 2], g);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[q / 2][q % 2] += v[j] * v[j];
      put_8(acc[q / 2], v, g, q % 2);
    }
    if constexpr (R_RING) {
      fence_before_refill();
      __syncwarp();
      if (s.lane == 0) mbar_arrive(s.r_empty(buffer));
      rr.advance<R_STAGES>();
    }
  }
  if constexpr (NORM > 0) {  // x is stored here too: its stores drain while the next values are computed
    reduce_squares(sum, s, wg, rank, tile_count);
#pragma unroll
    for (int q = 0; q < 2 * MB; ++q) sum[q / 2][q % 2] = rsqrtf(max_or_nan(sum[q / 2][q % 2], 1e-24f));
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      float gamma[8];
      load_8(gamma, vectors + NB + p.channel_of(g), g);
#pragma unroll
      for (int q = 0; q < 2 * MB; ++q) {
        float v[8];
        take_8(v, acc[q / 2], g, q % 2);
        const bool inside = p.inside[q / 2][q % 2];
        if (WRITE_X) store_8<X8, false>(args.x, p.x + offset_of(p, q / 2, q % 2, g, args.x_row), v, args.x_scale, inside, g);
        normalize_8(v, sum[q / 2][q % 2], gamma);
        store_8<N8, true>(args.n, p.n + offset_of(p, q / 2, q % 2, g, args.n_row), v, args.n_scale, inside, g);
      }
    }
  }
}
