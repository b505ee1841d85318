// What a block of the convolution works on: compile-time parameters, the kernel's arguments, tiles, and shared memory.
//
// Compile-time parameters (-D): MODE, CIN, COUT, SHORTCUT, RESIDUAL, LOWER (channels of the residual that odd output rows skip,
// MODE 1), WRITE_X, NORM (0, 1: norm, 2: norm and SiLU), SPLIT, KC, MB (8x8 pixel blocks per warpgroup), WARPGROUPS (computing), A_STAGES, B_STAGES, R_STAGES, RESIDENT, STAGGER, BF16,
// SHARED_BYTES, ARGS_BYTES; and what is float8 (e4m3) instead of 16 bits: A8 the input and its weights, X8 x, N8 the norm.
//
// With A8 a chunk has twice the channels in the same bytes, so nothing in shared memory changes. The last chunk may reach past
// CIN, where input and weights are zeros; instructions that would see nothing else are not issued.
#pragma once
#include "ptx.cuh"

#ifndef __CUDACC_RTC__  // for an editor: one of the variants
#define MODE 0
#define CIN 192
#define COUT 192
#define SHORTCUT 0
#define RESIDUAL 1
#define LOWER 0
#define WRITE_X 1
#define NORM 2
#define SPLIT 2
#define KC 32
#define MB 1
#define WARPGROUPS 2
#define A_STAGES 4
#define B_STAGES 16
#define R_STAGES 3
#define RESIDENT 0
#define STAGGER 0
#define A8 0
#define X8 0
#define N8 0
#define SHARED_BYTES SMEM_BYTES
#define ARGS_BYTES sizeof(Args)
#endif

constexpr int CONV = 0, UPSAMPLE = 1, DOWNSAMPLE = 2, POINTWISE = 3;
constexpr int PASSES = MODE == DOWNSAMPLE ? 4 : SHORTCUT ? 2 : 1;  // inputs, or parity planes of the input
constexpr int PARITIES = MODE == UPSAMPLE ? 4 : 1;
HOST_DEVICE constexpr int chunks_of(int pass) { return ((MODE == CONV && pass ? SHORTCUT : CIN) + KC - 1) / KC; }
HOST_DEVICE constexpr int taps_of(int pass) {
  return MODE == DOWNSAMPLE ? (2 - pass / 2) * (2 - pass % 2) : MODE == UPSAMPLE ? 4 : MODE == POINTWISE || pass ? 1 : 9;
}
HOST_DEVICE constexpr int tap_row(int pass, int tap) {
  return MODE == DOWNSAMPLE ? tap / (2 - pass % 2) : MODE == UPSAMPLE ? tap / 2 : MODE == POINTWISE || pass ? 1 : tap / 3;
}
HOST_DEVICE constexpr int tap_column(int pass, int tap) {
  return MODE == DOWNSAMPLE ? tap % (2 - pass % 2) : MODE == UPSAMPLE ? tap % 2 : MODE == POINTWISE || pass ? 1 : tap % 3;
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
constexpr int GROUPS = (NB + 31) / 32;         // a thread owns eight consecutive channels in each group of 32,
HOST_DEVICE constexpr bool half_group(int g) { return NB - 32 * g < 32; }  // four in a last one of 16
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
static_assert(NB % 16 == 0 && CIN % 16 == 0 && SHORTCUT % KC == 0 && KC % DEPTH == 0, "shapes");
static_assert(!(A8 && SHORTCUT) && !(A8 && MODE == DOWNSAMPLE), "no float8 for these");
static_assert(RESIDENT || STAGGER / taps_of(0) < A_STAGES, "the warpgroup ahead must reach its signal with what the rings hold");
static_assert(STAGGER < B_STAGES && !(RESIDUAL && RESIDENT && MODE == UPSAMPLE), "schedule");

struct Args {
  const void* weights;   // [PARITIES][STEPS][COUT][KC], swizzled, rows permuted: see packing.py
  const float* bias;     // [COUT]
  const float* gamma;    // [COUT], already times sqrt(COUT)
  const float* rescale;  // [COUT], A8: what the sums of products are multiplied by
  const void* residual;  // [B, H, W, COUT]; MODE 1: of the tiled grid; in a ring it may have other channels, missing ones are 0
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
static_assert(sizeof(Args) == ARGS_BYTES, "_Args in conv3x3.py must agree");

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
