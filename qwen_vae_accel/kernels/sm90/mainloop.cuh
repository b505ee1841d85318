// The computing warpgroups: the products, then the epilogue.
#pragma once
#include "conv_tile.cuh"
#include "epilogue.cuh"
#include "wgmma.cuh"

struct Position {  // of a warpgroup in the rings, and the buffers whose readers may still be running
  Ring a, b;
  u32 a_done = 0, b_done = 0;
};

// Products of one pass: all chunks of one input (or parity plane) times its taps. `origin`: shared-memory offset of the
// first tap's first row, in 16-byte units. A buffer is released once the group of instructions after it is under way.
template <int Pass>
DEVICE void multiply_pass(float (&acc)[MB][NB / 2], const Shared& s, Position& at, int wg, u32 origin) {
  constexpr int TAPS = taps_of(Pass);
  constexpr bool PARTIAL = (Pass == 0 || MODE == DOWNSAMPLE) && CIN % KC != 0;  // unrolled: the last chunk's products are known
  const bool leader = s.lane == 0;
#pragma unroll (PARTIAL ? CHUNKS : 1)
  for (int c = 0; c < chunks_of(Pass); ++c) {
    mbar_wait(s.a_full(at.a.stage), at.a.parity);
    const u64 a = matrix_descriptor<PIXEL_BYTES>(s.a(at.a.stage), PITCH * PIXEL_BYTES) + origin;
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) {
      if (!RESIDENT) mbar_wait(s.b_full(at.b.stage), at.b.parity);
      const u32 block = RESIDENT ? steps_before(Pass) + c * TAPS + tap : at.b.stage;
      const u64 b = matrix_descriptor<PIXEL_BYTES>(s.b(block), 8 * PIXEL_BYTES);
      const int shift = tap_row(Pass, tap) * PITCH + tap_column(Pass, tap);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < KC / DEPTH; ++k) {
        if (PARTIAL && c * KC + k * DEPTH >= CIN) break;
#pragma unroll
        for (int m = 0; m < MB; ++m)
          wgmma(acc[m], a + ((shift + 8 * m) * PIXEL_BYTES + k * 32) / 16, b + k * 2, Pass + tap + k > 0 || c > 0);
      }
      if (!RESIDENT || tap == 0 || tap == TAPS - 1) wgmma_commit();
      if (!RESIDENT || tap == 0) {
        const bool earlier = Pass + tap > 0 || c > 0;
        wgmma_wait<1>();  // everything before this group has completed
        if (tap == 0 && earlier && leader) mbar_arrive(s.a_empty(at.a_done));
        if (!RESIDENT && earlier && leader) mbar_arrive(s.b_empty(at.b_done));
      }
      if (STAGGER && !RESIDENT && Pass == 0 && wg == 0 && c == STAGGER / TAPS && tap == STAGGER % TAPS)
        named_arrive(1, 256);
      at.b_done = at.b.stage;
      if (!RESIDENT) at.b.advance<B_STAGES>();
    }
    at.a_done = at.a.stage;
    at.a.advance<A_STAGES>();
  }
  if constexpr (Pass + 1 < PASSES) multiply_pass<Pass + 1>(acc, s, at, wg, origin);
}

DEVICE void compute(const Shared& s, const Args& args, const float* vectors, int wg, u32 rank) {
  const bool leader = s.lane == 0;
  Position at;
  Ring rr;
  const int step = tile_step();
  int t = first_tile(), stride = step;
  if constexpr (RESIDENT) {
    t += wg * step;
    stride *= WARPGROUPS;
    at.a.advance<A_STAGES>(wg * CHUNKS);
    if (wg == WARPGROUPS - 1) named_arrive(1, 256);  // warpgroup 0 has the first turn
    mbar_wait(s.b_full(0), 0);
  }
  for (u32 count = 0; t < args.tiles; t += stride, ++count) {
    float acc[MB][NB / 2];
    Residual residual;
    Place place;
    if constexpr (!R_RING) place = place_of(args, tile_at(args, t), s, wg, rank);
    if constexpr (R_EARLY)
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) load_residual(residual, place, args, g, g);

    // Turns: without them both warpgroups would multiply, then both be in their epilogues. With streamed weights the
    // second may only follow a few steps behind the first, as far as the ring of weights reaches.
    if (RESIDENT) named_sync(1 + wg, 256);
    if (STAGGER && !RESIDENT && wg == 1) named_sync(1, 256);
    const u32 row = (RESIDENT ? 0 : wg * 8) + t % PARITIES / 2;
    multiply_pass<0>(acc, s, at, wg, (row * PITCH + t % PARITIES % 2) * PIXEL_BYTES / 16);
    if (RESIDENT && t + step < args.tiles) named_arrive(1 + (wg + 1) % WARPGROUPS, 256);

    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < MB; ++b) pin(acc[b]);
    if (leader) {
      mbar_arrive(s.a_empty(at.a_done));
      if (!RESIDENT) mbar_arrive(s.b_empty(at.b_done));
    }
    // The epilogue that reads a ring has the fewest registers to spare: it finds its place here, the others above, where
    // the compiler cannot spread that over the epilogue's arithmetic.
    if constexpr (R_RING) place = place_of(args, tile_at(args, t), s, wg, rank);
    epilogue(acc, residual, rr, place, args, s, vectors, wg, rank, count);
    __syncwarp();
    if (leader) add_release_shared(s.warps_done(wg), 1);
    if (RESIDENT) at.a.advance<A_STAGES>((WARPGROUPS - 1) * CHUNKS);
  }
}
