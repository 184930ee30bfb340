// The permutation by expert on the GPU is the reference's.
#include <type_traits>

#include "cuda/permute.h"
#include "cuda_support.h"
#include "fourfold/error.h"

namespace fourfold {
namespace {

struct PermuteCase {
  int64_t tokens, top_k, experts;
  int absent_percent = 0, bad_percent = 0;
  int64_t distinct = 0;      ///< experts that get anything; 0: all
  int64_t extra_stride = 0;  ///< elements between a row's end and the next row
  bool mapped = false;       ///< ids are the model's; a map gives this rank's, -1, or now and then nonsense
};

template <class Id>
std::vector<Id> random_ids(Engine& random, const PermuteCase& c, int64_t stride) {
  std::vector<Id> ids(static_cast<size_t>(c.tokens * stride));
  const int64_t distinct = c.distinct > 0 ? c.distinct : c.experts;
  for (Id& id : ids) {
    const int64_t lot = below(random, 100);
    if (lot < c.absent_percent || distinct == 0) {
      id = -1;
    } else if (lot < c.absent_percent + c.bad_percent) {
      const int64_t bad[] = {c.experts, -2, INT32_MAX, INT32_MIN, sizeof(Id) == 8 ? int64_t{1} << 40 : -7};
      id = static_cast<Id>(bad[below(random, 5)]);
    } else {
      id = static_cast<Id>(below(random, distinct));
    }
  }
  return ids;
}

std::vector<int32_t> random_map(Engine& random, int64_t experts) {
  std::vector<int32_t> map(static_cast<size_t>(experts));
  for (int32_t& local : map) {
    const int64_t lot = below(random, 10);
    local = static_cast<int32_t>(lot < 4    ? -1
                                 : lot == 4 ? experts + below(random, 3)
                                            : below(random, experts));
  }
  return map;
}

template <class Id>
void check_permutation(const PermuteCase& c, uint64_t salt) {
  SCOPED_TRACE(testing::Message() << c.tokens << " tokens, top-" << c.top_k << ", " << c.experts
                                  << " experts, " << sizeof(Id) * 8 << "-bit ids");
  Engine random = engine(salt);
  const int64_t stride = c.top_k + c.extra_stride, slots = c.tokens * c.top_k;
  const std::vector<Id> ids = random_ids<Id>(random, c, stride);
  const std::vector<float> no_weights(static_cast<size_t>(slots));
  Routing routing;
  routing.topk_ids = MatrixView<const Id>(ids.data(), c.tokens, c.top_k, stride);
  routing.topk_weights = {no_weights.data(), c.tokens, c.top_k};
  const std::vector<int32_t> map = c.mapped ? random_map(random, c.experts) : std::vector<int32_t>();
  routing.local_experts = map;
  const Permutation expected = permute_by_expert(routing, c.experts);

  const DeviceArray<Id> device_ids(ids);
  routing.topk_ids = MatrixView<const Id>(device_ids.matrix(c.tokens, c.top_k, stride));
  const DeviceArray<int32_t> device_map(map);
  routing.local_experts = device_map.span();
  const DeviceArray<std::byte> scratch(cuda::permute_scratch_bytes(slots, c.experts));
  for (int repeat = 0; repeat < (slots < 100'000 ? 20 : 3); ++repeat) {
    const DeviceArray<int32_t> offsets(static_cast<size_t>(c.experts + 1)),
        slot_of_row(static_cast<size_t>(slots)), row_of_slot(static_cast<size_t>(slots)),
        status(std::vector<int32_t>{0x100});
    cuda::permute({routing,
                   {offsets.span(), slot_of_row.span(), row_of_slot.span()},
                   repeat == 1 ? nullptr : status.data(),
                   scratch.span()},
                  nullptr);
    ASSERT_EQ(offsets.get(), expected.group_offsets);
    ASSERT_EQ(row_of_slot.get(), expected.row_of_slot);
    const std::vector<int32_t> found = slot_of_row.get();
    ASSERT_TRUE(std::equal(found.begin(), found.begin() + expected.rows(), expected.slot_of_row.begin()));
    ASSERT_TRUE(std::all_of(found.begin() + expected.rows(), found.end(), is_poison<int32_t>));
    ASSERT_EQ(status.get()[0], 0x100 | (repeat == 1 ? 0 : expected.status));
  }
}

TEST(Permute, EqualsTheReferenceInEveryCase) {
  const PermuteCase cases[] = {
      {0, 8, 256},
      {1, 1, 1},
      {1, 8, 256},
      {1, 4, 0},
      {3, 6, 384, 20},
      {17, 8, 128, 0, 10},
      {64, 8, 256, 30, 5, 0, 3},
      {512, 8, 128},
      {513, 8, 128},          // one more than a block takes
      {700, 4, 1024, 10},     // counts of one block do not fit
      {4096, 1, 8, 0, 0, 1},  // all on one expert
      {5000, 8, 256, 100},    // nobody here
      {40, 8, 96, 10, 5, 0, 0, true},
      {5000, 8, 128, 10, 1, 0, 0, true},
      {9001, 7, 257, 10, 1, 0, 1},
      {131072, 8, 256, 5, 1},
      {131072, 8, 1024, 0, 0, 3},
      {20000, 8, cuda::kMostExperts, 1},
  };
  uint64_t salt = 0;
  for (const PermuteCase& c : cases) {
    check_permutation<int32_t>(c, ++salt);
    check_permutation<int64_t>(c, ++salt);
  }
}

TEST(Permute, ScratchForManySlotsIsEnoughForFewer) {
  for (const int64_t experts : {1, 200, 1024, 5000}) {
    size_t largest = 0;
    for (int64_t slots = 0; slots < 5000; ++slots) {
      const size_t bytes = cuda::permute_scratch_bytes(slots, experts);
      ASSERT_GE(bytes, largest) << slots << " slots, " << experts << " experts";
      largest = bytes;
    }
  }
}

TEST(GroupOffsets, OfAPartOfTheRowsCountThatPartAlone) {
  const std::vector<int32_t> offsets = {0, 3, 3, 10, 17, 20};
  const DeviceArray<int32_t> whole(offsets), part(offsets.size());
  cuda::slice_group_offsets(whole.span(), 8, 10, part.span(), nullptr);
  EXPECT_EQ(part.get(), (std::vector<int32_t>{0, 0, 0, 2, 9, 10}));
}

TEST(Words, TravelWithTheLaunch) {
  std::vector<int32_t> words(1500);
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<int32_t>(i * 77);
  const std::vector<int32_t> expected = words;
  const DeviceArray<int32_t> to(words.size());
  CapturedGraph graph([&](void* stream) {
    cuda::write_words_async(to.data(), words.data(), static_cast<int64_t>(words.size()), stream);
  });
  words.assign(words.size(), -1);
  graph.replay();
  EXPECT_EQ(to.get(), expected);
}

TEST(Permute, RefusesMoreExpertsThanItCanCount) {
  Routing routing;
  std::vector<int32_t> offsets(cuda::kMostExperts + 2);
  EXPECT_THROW(cuda::permute({routing, {offsets, {}, {}}}, nullptr), Error);
}

}  // namespace
}  // namespace fourfold
