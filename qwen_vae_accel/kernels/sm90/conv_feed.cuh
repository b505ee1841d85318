// The feeding warpgroup: a thread per ring of buffers, and one that reports finished tiles to the next kernel.
#pragma once
#include "conv_tile.cuh"

DEVICE int residual_channel(const Tile& tile, u32 rank, int g) { return rank * NB + 32 * g + tile.parity / 2 * LOWER; }
DEVICE void prefetch_residual(const TensorMap* map, const Tile& tile, int y, u32 rank) {
  for (int g = 0; g < GROUPS; ++g) tma_prefetch_4d(map, residual_channel(tile, rank, g), tile.x, y, tile.image);
}

constexpr int EVERY_LINE = 0x7fffffff;

// Until the previous kernel has finished the lines of tiles under the rows that `tile` reads. They are also the only ones
// that may read what this tile overwrites: such a matrix has the same rows (overlap.py). `next`: first line not waited for
// yet; beyond all of them once the previous kernel has ended.
DEVICE void wait_for_lines(const Shared& s, const Args& args, const Tile& tile, int& next) {
  const int above = MODE == DOWNSAMPLE ? 2 * tile.y : tile.y > 0 ? tile.y - 1 : 0;
  const int below = (MODE == DOWNSAMPLE ? 2 : 1) * (tile.y + TILE_H);
  const int start = tile.image * args.ready_lines, last = start + min(below / args.ready_rows, args.ready_lines - 1);
  next = max(next, start + above / args.ready_rows);
  if (next > last) return;
  while (next <= last) {
    if (mbar_test(s.previous_ended(), 0)) next = EVERY_LINE;
    else if (load_acquire_gpu(args.ready + next) >= args.ready_count) ++next;
    else pause();
  }
  fence_before_tensor_loads();
}

DEVICE void feed_activations(const Shared& s, const TensorMap* input, const TensorMap* second, const TensorMap* addend,
                             const Args& args) {
  Ring ring;
  int next = args.ready ? 0 : EVERY_LINE;
  for (int t = first_tile(); t < args.tiles; t += tile_step()) {
    const Tile tile = tile_at(args, t);
    if (next != EVERY_LINE) wait_for_lines(s, args, tile, next);
    for (int pass = 0; pass < PASSES; ++pass) {
      const TensorMap* map = MODE == CONV && pass ? second : input;
      const int x = MODE == DOWNSAMPLE ? 2 * tile.x + pass % 2 : tile.x - 1;
      const int y = MODE == DOWNSAMPLE ? 2 * tile.y + pass / 2 : tile.y - 1;
#pragma unroll 1  // the feeding warps have few registers
      for (int c = 0; c < chunks_of(pass); ++c) {
        mbar_wait(s.a_empty(ring.stage), ring.parity ^ 1);
        mbar_expect(s.a_full(ring.stage), A_LOAD);
        tma_load_4d(s.a(ring.stage), map, s.a_full(ring.stage), c * KC, x, y, tile.image);
        ring.advance<A_STAGES>();
      }
    }
    if (RESIDUAL && RESIDENT && !R_EARLY) prefetch_residual(addend, tile, tile.y, 0);
  }
}

DEVICE void feed_weights(const Shared& s, const Args& args, u32 rank) {
  const unsigned char* const source = static_cast<const unsigned char*>(args.weights) + rank * B_BYTES;
  const auto block = [&](int tile, int k) { return source + (tile % PARITIES * STEPS + k) * SPLIT * B_BYTES; };
  if constexpr (RESIDENT) {  // every tile of a block has the same parity: the grid is a multiple of PARITIES
    mbar_expect(s.b_full(0), STEPS * B_BYTES);
    for (int k = 0; k < STEPS; ++k) bulk_load(s.b(k), block(first_tile(), k), B_BYTES, s.b_full(0));
  } else {
    Ring ring;
    for (int t = first_tile(); t < args.tiles; t += tile_step())
      for (int k = 0; k < STEPS; ++k) {
        mbar_wait(s.b_empty(ring.stage), ring.parity ^ 1);
        mbar_expect(s.b_full(ring.stage), B_BYTES);
        bulk_load(s.b(ring.stage), block(t, k), B_BYTES, s.b_full(ring.stage));
        ring.advance<B_STAGES>();
      }
  }
}

// Lane `wg` of a warp feeds that warpgroup through its ring; to the L2 cache beforehand, for the ring holds only part of a
// tile. The lanes share a loop, so neither may wait inside it.
DEVICE void feed_residual(const Shared& s, const TensorMap* map, const Args& args, u32 wg, u32 rank) {
  Ring ring;
  int g = 0;
  if (args.ready) {  // an older kernel wrote the residual: it has ended, nothing else orders it
    fence_gpu();
    fence_before_tensor_loads();
  }
#pragma unroll 1
  for (int t = first_tile(); t < args.tiles;) {
    const u32 buffer = wg * R_STAGES + ring.stage;
    if (!mbar_test(s.r_empty(buffer), ring.parity ^ 1)) {
      pause();
      continue;
    }
    const Tile tile = tile_at(args, t);
    const int y = tile.y + 8 * wg;
    if (g == 0) prefetch_residual(map, tile, y, rank);
    mbar_expect(s.r_full(buffer), R_BYTES);
    tma_load_4d(s.r(buffer), map, s.r_full(buffer), residual_channel(tile, rank, g), tile.x, y, tile.image);
    ring.advance<R_STAGES>();
    if (++g == GROUPS) { g = 0; t += tile_step(); }
  }
}

// Until the computing warpgroups have finished the block's first `count` tiles, with all stores.
DEVICE void wait_for_warpgroups(const Shared& s, u32 count) {
#pragma unroll
  for (u32 wg = 0; wg < WARPGROUPS; ++wg) {
    const u32 tiles = RESIDENT ? (count + WARPGROUPS - 1 - wg) / WARPGROUPS : count;  // resident: every other one is its own
    while (load_acquire_shared(s.warps_done(wg)) < 4 * tiles) pause();
  }
}

// Counts this block's tiles for the next kernel. Done by a thread that has nothing else to wait for: publishing stores takes as
// long as a trip to L2 and back. The next kernel asks only when some block has no tile left, so all but the last two are
// published together, then each of these.
DEVICE void report(const Shared& s, const Args& args) {
  const u32 all = (args.tiles - first_tile() + tile_step() - 1) / tile_step();
  u32 count = 0, published = 0;
#pragma unroll 1
  for (int t = first_tile(); t < args.tiles; t += tile_step(), ++count) {
    if (count == published) {
      published = count + 2 < all ? all - 2 : count + 1;
      wait_for_warpgroups(s, published);
      fence_gpu();
    }
    const Tile tile = tile_at(args, t);
    add_relaxed_gpu(args.done + tile.image * args.tiles_y + tile.y / TILE_H, 1);
  }
}

// Zeros in the halo of an output in the flat layout (layout.py): the first pixel of every line, and whole lines above,
// between and below the images. `pixels` is the address of pixel (0, 0, 0). One warp of every block.
template <int Bytes> DEVICE void zero_halo(void* pixels, const Args& a) {  // Bytes: of a pixel
  unsigned char* const start = static_cast<unsigned char*>(pixels) - (a.halo_pitch + 1) * Bytes;
  for (int line = blockIdx.x; line < a.halo_lines; line += gridDim.x) {
    const int units = (line % a.halo_period ? 1 : a.halo_pitch) * (Bytes / 16);
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < units; i += 32)
      store_16(start + i64(line) * a.halo_pitch * Bytes + i * 16, make_uint4(0, 0, 0, 0));
  }
}
