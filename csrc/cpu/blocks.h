// The loop over the blocks of all rows, with one set of scratch blocks per thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "block_ops.h"

namespace gardo {

// Where blocks that are not float32 in memory are converted, on the way in and on the way out.
struct alignas(64) Scratch {
  float in[6][kBlock], out[2][kBlock];
};

inline std::int64_t blocks_per_row(const Extent& e) {
  return (e.row_size + kBlock - 1) / kBlock;
}

// Fewer blocks are done before a second thread has woken up.
constexpr std::int64_t kFewBlocks = 16;

// A backward pass begins where the forward pass ended, with what is still in the cache. Within a
// share of the blocks both go upwards, where the hardware fetches ahead.
enum class Order { kForward, kBackward };

// Calls body(row, offset in the tensors, element in the row, size, index of the block, scratch).
template <Order order = Order::kForward, typename Body>
void for_each_block(const Extent& e, const Body& body) {
  const std::int64_t per_row = blocks_per_row(e);
  const std::int64_t total = e.rows * per_row;
  // A few shares per thread: no thread waits long for one whose core is busy with something else.
  const std::int64_t share = std::max<std::int64_t>(1, total / (8 * e.num_threads));
  const std::int64_t shares = (total + share - 1) / share;
#pragma omp parallel num_threads(e.num_threads) if (total > kFewBlocks)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < shares; ++i) {
      const std::int64_t begin = (order == Order::kForward ? i : shares - 1 - i) * share;
      const std::int64_t end = std::min(begin + share, total);
      for (std::int64_t index = begin; index < end; ++index) {
        const std::int64_t row = index / per_row;
        const std::int64_t element = (index % per_row) * kBlock;
        const std::int64_t n = std::min(kBlock, e.row_size - element);
        body(row, row * e.row_size + element, element, n, index, scratch);
      }
    }
  }
}

// One partial sum per block, added up per row in the order of the blocks.
class RowSums {
 public:
  explicit RowSums(const Extent& e)
      : per_row_(blocks_per_row(e)), partial_(static_cast<std::size_t>(e.rows * per_row_), 0.0) {}

  double& operator[](std::int64_t block) { return partial_[static_cast<std::size_t>(block)]; }

  double total(std::int64_t row) const {
    double sum = 0.0;
    for (std::int64_t j = 0; j < per_row_; ++j) sum += partial_[row * per_row_ + j];
    return sum;
  }

 private:
  std::int64_t per_row_;
  std::vector<double> partial_;
};

}  // namespace gardo
