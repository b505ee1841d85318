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
// MODE 3  1x1
//
// A kernel starts while the one before it runs its last tiles. If that one counts its finished tiles ("reports"), a tile
// here waits for the lines of tiles that its input and the input's halo lie in, instead of for the whole kernel.
//
// Compile-time parameters (-D): conv_tile.cuh has them.
#include "conv_feed.cuh"
#include "conv_tile.cuh"
#include "mainloop.cuh"
#include "ptx.cuh"

// Registers move from the feeding warpgroup to the others; wide accumulators need every one of them.
constexpr bool WIDE = MB * NB / 2 > 128;
constexpr int FEED_REGISTERS = WARPGROUPS == 2 && !WIDE ? 40 : 24;
constexpr u32 ACTIVATIONS_WARP = 0, WEIGHTS_WARP = 1, RESIDUAL_WARP = 2, REPORTING_WARP = 3;
constexpr int COMPUTE_REGISTERS = WARPGROUPS == 2 ? (WIDE ? 240 : 232) : 160;

// `second`: the shortcut's input; `addend`: the residual. Absent tensors: any map, it is not touched.
extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(128 * (WARPGROUPS + 1), 1)
conv(const __grid_constant__ TensorMap input, const __grid_constant__ TensorMap second,
     const __grid_constant__ TensorMap addend, const __grid_constant__ Args args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  float* const vectors = reinterpret_cast<float*>(memory + VECTOR_OFFSET);
  const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0), wg = warp / 4;  // the compiler must see that they are uniform
  const Shared s{smem_address(memory), lane_id(), warp % 4};
  const u32 rank = SPLIT > 1 ? cluster_ctarank() : 0;

  if (threadIdx.x == 0) {
    constexpr int A_READERS = RESIDENT ? 4 : 4 * WARPGROUPS;  // a warp arrives once
    tensormap_prefetch(&input);
    for (int i = 0; i < A_STAGES; ++i) { mbar_init(s.a_full(i), 1); mbar_init(s.a_empty(i), A_READERS); }
    for (int i = 0; i < B_BUFFERS; ++i) { mbar_init(s.b_full(i), 1); mbar_init(s.b_empty(i), 4 * WARPGROUPS); }
    for (int i = 0; i < R_BUFFERS; ++i) { mbar_init(s.r_full(i), 1); mbar_init(s.r_empty(i), 4); }
    for (int i = 0; i < 2 * WARPGROUPS; ++i) mbar_init(s.sums_full(i / 2, i % 2), 1);
    mbar_init(s.previous_ended(), 1);
    mbar_init_fence();
    for (int i = 0; i < WARPGROUPS; ++i) reinterpret_cast<u32*>(memory + COUNT_OFFSET)[i] = 0;
  }
  for (int i = threadIdx.x; i < NB; i += blockDim.x) {
    vectors[i] = args.bias[rank * NB + i];
    if (NORM) vectors[NB + i] = args.gamma[rank * NB + i];
    if (A8) vectors[2 * NB + i] = args.rescale[rank * NB + i];
  }
  if constexpr (SPLIT > 1) cluster_sync();
  __syncthreads();
  // So far, and to feed weights, only constants are read: the previous kernel may still be running, and if it reports, only
  // what feeds activations has to wait. The next kernel may start once the previous one's writes are visible, not before: else
  // three kernels could overlap, and the third not see the first's.
  if (wg == 0) {
    registers_decrease<FEED_REGISTERS>();  // before any wait: the other warpgroups cannot begin without these registers
    if (warp == REPORTING_WARP || (warp != WEIGHTS_WARP && !args.ready)) wait_for_previous_kernel();
    if (warp == REPORTING_WARP) {
      if (s.lane == 0) {
        mbar_arrive(s.previous_ended());
        let_next_kernel_start();
      }
      if (args.halo_lines) {
        if (WRITE_X) zero_halo<COUT * (X8 ? 1 : 2)>(args.x, args);
        if (NORM) zero_halo<COUT * (N8 ? 1 : 2)>(args.n, args);
      }
    }
    if (R_RING && warp == RESIDUAL_WARP && s.lane < WARPGROUPS) feed_residual(s, &addend, args, s.lane, rank);
    if (s.lane == 0) {
      if (warp == ACTIVATIONS_WARP) feed_activations(s, &input, &second, &addend, args);
      else if (warp == WEIGHTS_WARP) feed_weights(s, args, rank);
      else if (warp == REPORTING_WARP && args.done) report(s, args);
    }
  } else {
    registers_increase<COMPUTE_REGISTERS>();
    if (!args.ready || (RESIDUAL && RESIDENT)) wait_for_previous_kernel();  // the latter read the residual themselves
    compute(s, args, vectors, wg - 1, rank);
  }
  __syncwarp();  // lanes with work of their own come back
  if constexpr (SPLIT > 1) cluster_sync();  // no block leaves while a peer may still write into it
}
