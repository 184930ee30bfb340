// Stable counting sort of slots by expert.
//
// Slots are cut into consecutive chunks, a warp each. A warp takes its chunk 32 slots at a time: lanes with
// the same expert find each other by match.any, so that a slot's rank is the number of equal slots before it
// in the chunk, which no schedule can change. Ranks become rows by adding, for every (chunk, expert), the
// rows of earlier experts and of earlier chunks:
//   a handful    one block of which a warp has a slot a lane, and no table
//   few slots    one block; the table of (chunk, expert) counts is in shared memory
//   many slots   count_slots fills the table in global memory, sum_chunks turns its columns into prefix sums,
//                place_slots writes rows
#include <algorithm>
#include <string>

#include "cuda/block_scan.cuh"
#include "cuda/expert_ids.cuh"
#include "cuda/launch.cuh"
#include "cuda/permute.h"

namespace fourfold::cuda {
namespace {

constexpr int kSlotsAtOnce = 32;   // a warp's lanes
constexpr int kMostChunks = 1024;  // of the path for many slots; bounds the table
constexpr int kWarpsPerBlock = 4;  // of its kernels
constexpr int kFewSlots = 1024;    // one block is faster up to about here
constexpr int kFewThreads = 512;
constexpr int kFewSlotsALane = kFewSlots / kFewThreads;
constexpr size_t kSharedBytes = 47 * 1024;  // without asking for more; the scan has some of its own

struct Outputs {
  int32_t* group_offsets;
  int32_t* slot_of_row;
  int32_t* row_of_slot;
  int32_t* status;
  int32_t* cleared;
  int32_t cleared_words;
};

/// By one block.
__device__ void clear_words(const Outputs& out) {
  for (auto i = static_cast<int32_t>(threadIdx.x); i < out.cleared_words;
       i += static_cast<int32_t>(blockDim.x)) {
    out.cleared[i] = 0;
  }
}

__device__ int lane_id() {
  return static_cast<int>(threadIdx.x % 32);
}

/// Adds the chunk's slots of each expert to counts[expert]. A whole warp takes part.
__device__ void count_chunk(const ExpertIds& ids, int32_t first, int32_t end, int32_t* counts,
                            int32_t* status) {
  bool bad = false;
  for (int32_t base = first; base < end; base += kSlotsAtOnce) {
    const int32_t slot = base + lane_id();
    const int32_t expert = slot < end ? ids.expert_of(slot, bad) : -1;
    const unsigned peers = __match_any_sync(~0u, expert);
    const bool leads = expert >= 0 && lane_id() == __ffs(static_cast<int>(peers)) - 1;
    if (leads) counts[expert] += __popc(peers);
    __syncwarp();
  }
  const bool any_bad = __any_sync(~0u, bad);
  if (any_bad && status != nullptr && lane_id() == 0) atomicOr(status, kStatusExpertOutOfRange);
}

/// Writes rows of the chunk's slots: first_rows[expert] + starts[expert] + rank. `starts` walks forward.
__device__ void place_chunk(const ExpertIds& ids, int32_t first, int32_t end, const int32_t* first_rows,
                            int32_t* starts, const Outputs& out) {
  bool ignored = false;
  for (int32_t base = first; base < end; base += kSlotsAtOnce) {
    const int32_t slot = base + lane_id();
    const int32_t expert = slot < end ? ids.expert_of(slot, ignored) : -1;
    const unsigned peers = __match_any_sync(~0u, expert);
    const unsigned before = peers & ((1u << lane_id()) - 1u);
    const int32_t start = expert >= 0 ? starts[expert] : 0;
    __syncwarp();
    if (expert >= 0 && before == 0) starts[expert] = start + __popc(peers);
    __syncwarp();
    if (slot >= end) continue;
    const int32_t row = expert >= 0 ? first_rows[expert] + start + __popc(before) : -1;
    out.row_of_slot[slot] = row;
    if (row >= 0) out.slot_of_row[row] = slot;
  }
}

/// counts[chunk * experts + expert] -> the sum over earlier chunks, of at most kMost; returns the sum over
/// all.
template <int kMost>
__device__ int32_t sum_before(int32_t* counts, int32_t chunks, int32_t experts, int32_t expert) {
  int32_t own[kMost];
#pragma unroll
  for (int32_t chunk = 0; chunk < kMost; ++chunk) {
    own[chunk] = chunk < chunks ? counts[chunk * experts + expert] : 0;
  }
  int32_t sum = 0;
#pragma unroll
  for (int32_t chunk = 0; chunk < kMost; ++chunk) {
    if (chunk < chunks) counts[chunk * experts + expert] = sum;
    sum += own[chunk];
  }
  return sum;
}

/// One block, a warp for each chunk; a lane has at most kFewSlotsALane slots, and keeps what it knows of
/// them. Shared memory: counts [chunks, experts], then offsets [experts + 1].
__global__ void __launch_bounds__(kFewThreads)
    permute_few(ExpertIds ids, int32_t chunk_slots, int32_t chunks, Outputs out) {
  extern __shared__ int32_t shared[];
  start_after_previous();
  int32_t* offsets = shared + chunks * ids.experts;
  const auto thread = static_cast<int32_t>(threadIdx.x), warp = thread / 32;
  const int32_t first = warp * chunk_slots + lane_id();
  const int32_t end = warp < chunks ? min((warp + 1) * chunk_slots, ids.slots) : 0;
  int32_t experts[kFewSlotsALane], ranks[kFewSlotsALane];
  bool bad = false;
#pragma unroll
  for (int i = 0; i < kFewSlotsALane; ++i) {
    const int32_t slot = first + i * kSlotsAtOnce;
    experts[i] = slot < end ? ids.expert_of(slot, bad) : -1;
  }
  for (int32_t i = thread; i < chunks * ids.experts; i += kFewThreads) shared[i] = 0;
  clear_words(out);
  __syncthreads();

  int32_t* counts = shared + warp * ids.experts;
#pragma unroll
  for (int i = 0; i < kFewSlotsALane; ++i) {
    const unsigned peers = __match_any_sync(~0u, experts[i]);
    const int before = __popc(peers & ((1u << lane_id()) - 1u));
    const bool there = experts[i] >= 0;
    const int32_t start = there ? counts[experts[i]] : 0;
    ranks[i] = start + before;
    __syncwarp();
    if (there && before == 0) counts[experts[i]] = start + __popc(peers);
    __syncwarp();
  }
  if (__any_sync(~0u, bad) && out.status != nullptr && lane_id() == 0) {
    atomicOr(out.status, kStatusExpertOutOfRange);
  }
  __syncthreads();
  for (int32_t expert = thread; expert < ids.experts; expert += kFewThreads) {
    offsets[expert + 1] = sum_before<kFewThreads / 32>(shared, chunks, ids.experts, expert);
  }
  __syncthreads();
  block_exclusive_offsets(offsets + 1, ids.experts, offsets);
  for (int32_t i = thread; i <= ids.experts; i += kFewThreads) out.group_offsets[i] = offsets[i];
#pragma unroll
  for (int i = 0; i < kFewSlotsALane; ++i) {
    const int32_t slot = first + i * kSlotsAtOnce, expert = experts[i];
    if (slot >= end) continue;
    const int32_t row = expert >= 0 ? offsets[expert] + counts[expert] + ranks[i] : -1;
    out.row_of_slot[slot] = row;
    if (row >= 0) out.slot_of_row[row] = slot;
  }
}

/// One block, for no more slots than a warp has lanes: whoever wants to know how many slots have an expert
/// below his counts them, so that there is no scan. Where words are cleared, the next kernel is let go late,
/// so that it may use them as soon as it runs: by then they are written where its atomics and acquiring loads
/// look, in L2.
__global__ void __launch_bounds__(kFewThreads) permute_handful(ExpertIds ids, Outputs out) {
  __shared__ int32_t experts[kHandfulOfSlots];
  cudaGridDependencySynchronize();
  if (out.cleared_words == 0) cudaTriggerProgrammaticLaunchCompletion();
  const auto thread = static_cast<int32_t>(threadIdx.x);
  int32_t expert = -1;
  bool bad = false;
  if (thread < ids.slots) expert = ids.expert_of(thread, bad);
  if (thread < out.cleared_words) {
    clear_words(out);
    __threadfence();
  }
  __syncthreads();
  cudaTriggerProgrammaticLaunchCompletion();
  if (thread < kHandfulOfSlots) {
    experts[thread] = expert >= 0 ? expert : ids.experts;  // behind all others
    if (__any_sync(~0u, bad) && out.status != nullptr && thread == 0) {
      atomicOr(out.status, kStatusExpertOutOfRange);
    }
  }
  __syncthreads();
  const auto slots_below = [&](int32_t limit) {
    int32_t below = 0;
#pragma unroll
    for (const int32_t other : experts) below += other < limit ? 1 : 0;
    return below;
  };
  for (int32_t e = thread; e <= ids.experts; e += kFewThreads) out.group_offsets[e] = slots_below(e);
  if (thread >= kHandfulOfSlots) return;
  const unsigned peers = __match_any_sync(~0u, expert);
  if (thread >= ids.slots) return;
  const int32_t row = expert < 0 ? -1 : slots_below(expert) + __popc(peers & ((1u << thread) - 1u));
  out.row_of_slot[thread] = row;
  if (row >= 0) out.slot_of_row[row] = thread;
}

__global__ void count_slots(ExpertIds ids, int32_t chunk_slots, int32_t chunks, int32_t* counts,
                            int32_t* status) {
  start_after_previous();
  const auto chunk = static_cast<int32_t>(blockIdx.x * kWarpsPerBlock + threadIdx.x / 32);
  if (chunk >= chunks) return;
  int32_t* own = counts + chunk * ids.experts;
  for (int32_t expert = lane_id(); expert < ids.experts; expert += 32) own[expert] = 0;
  __syncwarp();
  count_chunk(ids, chunk * chunk_slots, min((chunk + 1) * chunk_slots, ids.slots), own, status);
}

/// A block a tile of 32 experts, 32 x 32 threads: thread (x, y) has expert x of the tile and every 32nd part
/// of the chunks. Writes totals [experts].
__global__ void sum_chunks(int32_t* counts, int32_t chunks, int32_t experts, int32_t* totals) {
  __shared__ int32_t parts[32][33];
  start_after_previous();
  const auto x = static_cast<int32_t>(threadIdx.x), y = static_cast<int32_t>(threadIdx.y);
  const int32_t expert = static_cast<int32_t>(blockIdx.x) * 32 + x;
  const int32_t span = (chunks + 31) / 32, first = min(y * span, chunks), end = min(first + span, chunks);
  int32_t sum = 0;
  if (expert < experts) {
    for (int32_t chunk = first; chunk < end; ++chunk) sum += counts[chunk * experts + expert];
  }
  parts[x][y] = sum;
  __syncthreads();
  // Row y of the transposed tile belongs to expert y: a warp scans its 32 parts.
  const int32_t inclusive = warp_inclusive_scan(parts[y][x]);
  const int32_t before = inclusive - parts[y][x];
  const int32_t expert_of_row = static_cast<int32_t>(blockIdx.x) * 32 + y;
  if (x == 31 && expert_of_row < experts) totals[expert_of_row] = inclusive;
  parts[y][x] = before;
  __syncthreads();
  if (expert >= experts) return;
  sum = parts[x][y];
  for (int32_t chunk = first; chunk < end; ++chunk) {
    const int32_t own = counts[chunk * experts + expert];
    counts[chunk * experts + expert] = sum;
    sum += own;
  }
}

/// Shared memory: offsets [experts + 1]; every block sums the totals for itself.
__global__ void place_slots(ExpertIds ids, int32_t chunk_slots, int32_t chunks, int32_t* counts,
                            const int32_t* totals, Outputs out) {
  extern __shared__ int32_t offsets[];
  start_after_previous();
  block_exclusive_offsets(totals, ids.experts, offsets);
  if (blockIdx.x == 0) {
    clear_words(out);
    for (auto i = static_cast<int32_t>(threadIdx.x); i <= ids.experts; i += kWarpsPerBlock * 32) {
      out.group_offsets[i] = offsets[i];
    }
  }
  const auto chunk = static_cast<int32_t>(blockIdx.x * kWarpsPerBlock + threadIdx.x / 32);
  if (chunk >= chunks) return;
  place_chunk(ids, chunk * chunk_slots, min((chunk + 1) * chunk_slots, ids.slots), offsets,
              counts + chunk * ids.experts, out);
}

/// How slots are cut into chunks of whole warps' worth.
struct Chunks {
  int32_t slots_each, count;
};

Chunks cut(int64_t slots, int64_t most_chunks) {
  const int64_t each = (slots + most_chunks * kSlotsAtOnce - 1) / (most_chunks * kSlotsAtOnce) * kSlotsAtOnce;
  return {static_cast<int32_t>(each), static_cast<int32_t>(each == 0 ? 0 : (slots + each - 1) / each)};
}

size_t few_shared_bytes(int64_t chunks, int64_t experts) {
  return static_cast<size_t>((chunks + 1) * experts + 1) * sizeof(int32_t);
}

/// Chunks of `slots` or fewer.
int64_t most_chunks_of(int64_t slots, int64_t most_chunks) {
  return std::min(most_chunks, (slots + kSlotsAtOnce - 1) / kSlotsAtOnce);
}

/// Whether one block does it. What fits still does with fewer slots.
bool fits_one_block(int64_t slots, int64_t experts) {
  const int64_t chunks = most_chunks_of(slots, kFewThreads / 32);
  return slots <= kFewSlots && few_shared_bytes(chunks, experts) <= kSharedBytes;
}

void launch(const ExpertIds& ids, const Outputs& out, std::span<std::byte> scratch, cudaStream_t stream) {
  if (ids.slots <= kHandfulOfSlots) {
    return launch_after_previous("permute_handful", permute_handful, 1, kFewThreads, 0, stream, ids, out);
  }
  if (fits_one_block(ids.slots, ids.experts)) {
    const Chunks chunks = cut(ids.slots, kFewThreads / 32);
    return launch_after_previous("permute_few", permute_few, 1, kFewThreads,
                                 few_shared_bytes(chunks.count, ids.experts), stream, ids, chunks.slots_each,
                                 chunks.count, out);
  }
  const Chunks chunks = cut(ids.slots, kMostChunks);
  auto* counts = reinterpret_cast<int32_t*>(scratch.data());
  int32_t* totals = counts + int64_t{chunks.count} * ids.experts;
  const auto blocks = static_cast<unsigned>((chunks.count + kWarpsPerBlock - 1) / kWarpsPerBlock);
  launch_after_previous("count_slots", count_slots, blocks, kWarpsPerBlock * 32, 0, stream, ids,
                        chunks.slots_each, chunks.count, counts, out.status);
  launch_after_previous("sum_chunks", sum_chunks, static_cast<unsigned>((ids.experts + 31) / 32),
                        dim3(32, 32), 0, stream, counts, chunks.count, ids.experts, totals);
  const size_t shared_bytes = static_cast<size_t>(ids.experts + 1) * sizeof(int32_t);
  launch_after_previous("place_slots", place_slots, blocks, kWarpsPerBlock * 32, shared_bytes, stream, ids,
                        chunks.slots_each, chunks.count, counts, totals, out);
}

__global__ void slice_offsets(const int32_t* offsets, int32_t count, int32_t first, int32_t rows,
                              int32_t* out) {
  const auto i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = min(max(offsets[i] - first, 0), rows);
}

}  // namespace

size_t permute_scratch_bytes(int64_t slots, int64_t experts) {
  if (fits_one_block(slots, experts)) return 0;
  return static_cast<size_t>((most_chunks_of(slots, kMostChunks) + 1) * experts) * sizeof(int32_t);
}

void permute(const PermuteArgs& args, void* stream) {
  const auto experts = static_cast<int64_t>(args.out.group_offsets.size()) - 1;
  const int64_t slots = args.routing.tokens() * args.routing.top_k();
  if (experts < 0 || experts > kMostExperts) {
    reject("permute: experts", "at most " + std::to_string(kMostExperts), experts);
  }
  if (slots > kMostSlots) reject("permute: slots", "at most " + std::to_string(kMostSlots), slots);
  if (args.scratch.size() < permute_scratch_bytes(slots, experts)) {
    reject("permute: scratch", std::to_string(permute_scratch_bytes(slots, experts)) + " bytes",
           static_cast<int64_t>(args.scratch.size()));
  }
  const Outputs out{args.out.group_offsets.data(), args.out.slot_of_row.data(),
                    args.out.row_of_slot.data(),   args.status,
                    args.cleared.data(),           static_cast<int32_t>(args.cleared.size())};
  launch(ExpertIds(args.routing, experts), out, args.scratch, as_stream(stream));
}

void slice_group_offsets(std::span<const int32_t> group_offsets, int64_t first, int64_t rows,
                         std::span<int32_t> out, void* stream) {
  constexpr unsigned kThreads = 256;
  const auto count = static_cast<unsigned>(group_offsets.size());
  slice_offsets<<<(count + kThreads - 1) / kThreads, kThreads, 0, as_stream(stream)>>>(
      group_offsets.data(), static_cast<int32_t>(count), static_cast<int32_t>(first),
      static_cast<int32_t>(rows), out.data());
  check_launch("slice_offsets");
}

}  // namespace fourfold::cuda
