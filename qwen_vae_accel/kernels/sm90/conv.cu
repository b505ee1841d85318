// Convolutions of the VAE as implicit matrix products on Hopper's warpgroup matrix instructions, with bias, residual,
// channel-wise RMS norm and SiLU in the epilogue.
//
// A work item ("tile") is a rectangle of pixels. The copy engine brings the input under it with its halo into shared
// memory once per chunk of KC channels, out-of-image pixels as zeros; all taps then read that one copy through shifted
// matrix descriptors. Eight neighbouring pixels of a row are the eight rows of a descriptor's row group, so the 64 rows
// of a matrix instruction are an 8x8 block of pixels.
//
// One warpgroup feeds (a thread per ring of buffers) and reports, the others compute. Two schedules:
//   RESIDENT 1  weights stay in shared memory (96 channels: 166 KB); each computing warpgroup owns every other tile, so
//               that one multiplies while the other is in its epilogue ("ping-pong").
//   RESIDENT 0  weights stream through a ring; the computing warpgroups share each tile, hence each weight block.
// With SPLIT > 1 the output channels are divided among the blocks of a cluster, which exchange per-pixel sums of squares.
//
// MODE 0  3x3, stride 1, zero padding 1; SHORTCUT > 0: plus a 1x1 convolution of a second input of that many channels
// MODE 1  nearest 2x upsampling and 3x3, folded: one 2x2 convolution for each parity of the output; tiles of the input
// MODE 2  3x3, stride 2, zero padding (0, 1, 0, 1); the input is read as its four parity planes
//
// A kernel starts while the one before it runs its last tiles. If that one counts its finished tiles ("reports"), a tile
// here waits for the lines of tiles that its input and the input's halo lie in, instead of for the whole kernel.
//
// Compile-time parameters (-D): MODE, CIN, COUT, SHORTCUT, RESIDUAL, WRITE_X, NORM (0, 1: norm, 2: norm and SiLU), SPLIT,
// KC, MB (8x8 pixel blocks per warpgroup), WARPGROUPS (computing), A_STAGES, B_STAGES, R_STAGES, RESIDENT, STAGGER, BF16,
// SHARED_BYTES; and what is float8 (e4m3) instead of 16 bits: A8 the input and its weights, X8 x, N8 the norm.
//
// With A8 a chunk has twice the channels in the same bytes, so nothing in shared memory changes; the last chunk may reach
// past CIN, where the input reads as zero and no product is issued.

constexpr int CONV = 0, UPSAMPLE = 1, DOWNSAMPLE = 2;
constexpr int PASSES = MODE == DOWNSAMPLE ? 4 : SHORTCUT ? 2 : 1;  // inputs, or parity planes of the input
constexpr int PARITIES = MODE == UPSAMPLE ? 4 : 1;
HOST_DEVICE constexpr int chunks_of(int pass) { return ((MODE == CONV && pass ? SHORTCUT : CIN) + KC - 1) / KC; }
HOST_DEVICE constexpr int taps_of(int pass) {
  return MODE == DOWNSAMPLE ? (2 - pass / 2) * (2 - pass % 2) : MODE == UPSAMPLE ? 4 : pass ? 1 : 9;
}
HOST_DEVICE constexpr int tap_row(int pass, int tap) {
  return MODE == DOWNSAMPLE ? tap / (2 - pass % 2) : MODE == UPSAMPLE ? tap / 2 : pass ? 1 : tap / 3;
}
HOST_DEVICE constexpr int tap_column(int pass, int tap) {
  return MODE == DOWNSAMPLE ? tap % (2 - pass % 2) : MODE == UPSAMPLE ? tap % 2 : pass ? 1 : tap % 3;
}
HOST_DEVICE constexpr int steps_before(int pass) {
  int steps = 0;
  for (int p = 0; p < pass; ++p) steps += chunks_of(p) * taps_of(p);
  return steps;
}
HOST_DEVICE constexpr int chunks_total() {
  int chunks = 0;
  for (int p = 0; p < PASSES; ++p) chunks += chunks_of(p);
  return chunks;
}

constexpr int NB = COUT / SPLIT;  // output channels of this block
constexpr int CHUNKS = chunks_total();
constexpr int STEPS = steps_before(PASSES);  // weight blocks of one tile
constexpr int HALO = MODE == DOWNSAMPLE ? 1 : 2;
constexpr int TILE_H = RESIDENT ? 8 : 8 * WARPGROUPS;
constexpr int TILE_W = 8 * MB;
constexpr int SCALE = MODE == UPSAMPLE ? 2 : 1;  // output pixels per tile pixel and side
constexpr int PITCH = TILE_W + HALO;             // pixels per shared-memory row
constexpr int DEPTH = A8 ? 32 : 16;              // input channels of a matrix instruction, 32 bytes
constexpr int PIXEL_BYTES = KC * (A8 ? 1 : 2);
constexpr int A_LOAD = (TILE_H + HALO) * PITCH * PIXEL_BYTES;
constexpr int A_BYTES = (A_LOAD + 1023) / 1024 * 1024;
constexpr int B_BYTES = NB * PIXEL_BYTES;
constexpr int R_BYTES = 8 * TILE_W * 64;       // residual: 32 channels of a warpgroup's pixels
constexpr int GROUPS = NB / 32;                // a thread owns eight consecutive channels in each group of 32
constexpr bool R_RING = RESIDUAL && !RESIDENT;
constexpr int R_BUFFERS = R_RING ? R_STAGES * WARPGROUPS : 0;  // a ring for each: neither waits for the other
constexpr bool R_EARLY = RESIDUAL && RESIDENT && WARPGROUPS == 2;  // residual in registers, loaded before the products
constexpr int B_BUFFERS = RESIDENT ? 1 : B_STAGES;

constexpr int B_OFFSET = A_STAGES * A_BYTES;
constexpr int R_OFFSET = B_OFFSET + (RESIDENT ? STEPS : B_STAGES) * B_BYTES;
constexpr int VECTOR_OFFSET = R_OFFSET + R_BUFFERS * R_BYTES;    // bias, gamma, with A8 rescale: NB floats each
constexpr int SUM_OFFSET = VECTOR_OFFSET + (A8 ? 3 : 2) * NB * 4;  // sums of squares of the peers
constexpr int SUM_BYTES = WARPGROUPS * 2 * (SPLIT - 1) * MB * 64 * 4;
constexpr int BARRIER_OFFSET = SUM_OFFSET + SUM_BYTES;
constexpr int BARRIERS = 2 * A_STAGES + 2 * B_BUFFERS + 2 * R_BUFFERS + 2 * WARPGROUPS + 1;
constexpr int COUNT_OFFSET = BARRIER_OFFSET + BARRIERS * 8;  // 32-bit: warps done with their tiles, of each warpgroup
constexpr int SMEM_BYTES = COUNT_OFFSET + WARPGROUPS * 4;
static_assert(SMEM_BYTES <= 232448, "shared memory of one block");
static_assert(SMEM_BYTES == SHARED_BYTES, "Variant.shared_bytes() in schedules.py must agree");
static_assert(NB % 32 == 0 && CIN % 32 == 0 && KC % DEPTH == 0 && (A8 || CIN % KC == 0), "shapes");
static_assert(!(A8 && SHORTCUT) && !(A8 && MODE == DOWNSAMPLE), "no float8 for these");
static_assert(STAGGER < B_STAGES && !(RESIDUAL && MODE != CONV), "schedule");

struct Args {
  const void* weights;   // [PARITIES][STEPS][COUT][KC], swizzled, rows permuted: see packing.py
  const float* bias;     // [COUT]
  const float* gamma;    // [COUT], already times sqrt(COUT)
  const float* rescale;  // [COUT], A8: what the sums of products are multiplied by
  const void* residual;  // [B, H, W, COUT]
  void* x;               // [B, H, W, COUT]: the sum; may be the residual itself
  void* n;               // [B, H, W, COUT]: its norm
  i64 residual_row, residual_image, x_row, x_image, n_row, n_image;  // strides in elements; pixels are dense
  int height, width;     // of the tiled grid: the input's for MODE 1, else the output's
  int tiles_x, tiles_y, tiles;  // tiles: in all, times PARITIES
  int halo_lines, halo_pitch, halo_period;  // outputs in the flat layout: its halo is to be zeroed (0 lines: none)
  float x_scale, n_scale;                   // X8, N8: the outputs are multiplied by these and clamped
  // Finished blocks' shares of tiles by image and line of tiles: of the previous kernel, which wrote the input and nothing else
  // that is read here (null: wait for all of it), and of this one (null: the next kernel does not ask).
  const u32* ready;
  u32* done;
  int ready_lines, ready_rows;  // lines of an image, rows of the input in a line
  u32 ready_count;              // of a line that is finished
};

struct Ring {  // position in a ring of buffers, and the parity its barriers are at
  u32 stage = 0, parity = 0;
  template <int Stages> DEVICE void advance(u32 by = 1) {
    stage += by;
    while (stage >= Stages) { stage -= Stages; parity ^= 1; }
  }
};

// The tiles of a block. Its number is read anew wherever it is needed: kept from the start, it would take a register
// from every thread.
DEVICE int first_tile() {
  u32 block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block / SPLIT;
}
DEVICE int tile_step() { return gridDim.x / SPLIT; }

struct Tile { int image, y, x, parity; };
DEVICE Tile tile_at(const Args& a, u32 index) {  // unsigned: a division takes half the registers
  const u32 place = index / PARITIES, rest = place / u32(a.tiles_x), column = place - rest * a.tiles_x;
  const u32 image = rest / u32(a.tiles_y);
  return {int(image), int(rest - image * a.tiles_y) * TILE_H, int(column) * TILE_W, int(index % PARITIES)};
}

struct Shared {
  u32 base;
  u32 lane, warp;  // warp: within its warpgroup
  DEVICE u32 a(u32 stage) const { return base + stage * A_BYTES; }
  DEVICE u32 b(u32 stage) const { return base + B_OFFSET + stage * B_BYTES; }
  DEVICE u32 r(u32 stage) const { return base + R_OFFSET + stage * R_BYTES; }
  DEVICE u32 bar(u32 i) const { return base + BARRIER_OFFSET + i * 8; }
  DEVICE u32 a_full(u32 s) const { return bar(s); }
  DEVICE u32 a_empty(u32 s) const { return bar(A_STAGES + s); }
  DEVICE u32 b_full(u32 s) const { return bar(2 * A_STAGES + s); }
  DEVICE u32 b_empty(u32 s) const { return bar(2 * A_STAGES + B_BUFFERS + s); }
  DEVICE u32 r_full(u32 s) const { return bar(2 * (A_STAGES + B_BUFFERS) + s); }
  DEVICE u32 r_empty(u32 s) const { return bar(2 * (A_STAGES + B_BUFFERS) + R_BUFFERS + s); }
  DEVICE u32 sums_full(u32 wg, u32 p) const { return bar(2 * (A_STAGES + B_BUFFERS + R_BUFFERS) + 2 * wg + p); }
  DEVICE u32 previous_ended() const { return bar(BARRIERS - 1); }
  DEVICE u32 warps_done(u32 wg) const { return base + COUNT_OFFSET + wg * 4; }
  // partial sums sent by peer number `peer` (0 .. SPLIT-2) for pixel `row` of a warpgroup
  DEVICE u32 sums(u32 wg, u32 p, u32 peer, u32 row) const {
    return base + SUM_OFFSET + (((wg * 2 + p) * (SPLIT - 1) + peer) * MB * 64 + row) * 4;
  }
};

// ---- the feeding warpgroup ----------------------------------------------------------------------------------------
DEVICE void prefetch_residual(const TensorMap* map, const Tile& tile, int y, u32 rank) {
  for (int g = 0; g < GROUPS; ++g) tma_prefetch_4d(map, rank * NB + 32 * g, tile.x, y, tile.image);
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
    tma_load_4d(s.r(buffer), map, s.r_full(buffer), rank * NB + 32 * g, tile.x, y, tile.image);
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
