#include "nearest_neighbor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "block_ops.h"
#include "groups.h"
#include "lanes.h"

namespace gardo {
namespace {

using std::int64_t;

constexpr int64_t kWidth = 8;
constexpr int64_t kTileRows = 4, kTileCols = 3;
// Above this size the members of one group, not the groups, are shared out among the threads.
constexpr int64_t kLargeGroup = 256;
// Rows of one task in a large group: they stay in the second-level cache while all others pass by.
constexpr int64_t kTaskRows = 32;
// Fewer multiplications than this are done before a second thread has woken up.
constexpr int64_t kParallelWork = int64_t{1} << 22;
// Longer rows are read in order long enough for the hardware to follow.
constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kPrefetchRows = 32;
// Between these a sum of squares has lost nothing to the range of float32.
constexpr double kTinySquares = 1e-20, kHugeSquares = 1e30;
// 1 - cosine cancels below this; the squared difference of the unit rows does not.
constexpr float kNear = 1.0f / 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// The inverse length of what is no one's neighbour: no comparison with NaN holds.
constexpr float kNoSimilarity = std::numeric_limits<float>::quiet_NaN();

enum class RowKind : std::uint8_t { kUsable, kZero, kNonFinite };

GARDO_INLINE inline float sum_of(Float8 lanes) {
  const float s04 = lanes[0] + lanes[4], s15 = lanes[1] + lanes[5];
  const float s26 = lanes[2] + lanes[6], s37 = lanes[3] + lanes[7];
  return (s04 + s26) + (s15 + s37);
}

// Dot products of kTileRows rows with kTileCols columns, n a multiple of kWidth.
GARDO_CLONES void tile_products(const float* const* rows, const float* const* cols, int64_t n,
                                float* products) {
  const float *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  const float *c0 = cols[0], *c1 = cols[1], *c2 = cols[2];
  // Spelled out, and each row loaded where it is used, so that all of it fits into 16 registers:
  // else the compiler loads the rows once per product, and loads decide the time.
  Float8 s00{}, s01{}, s02{};
  Float8 s10{}, s11{}, s12{};
  Float8 s20{}, s21{}, s22{};
  Float8 s30{}, s31{}, s32{};
  for (int64_t d = 0; d < n; d += kWidth) {
    const Float8 b0 = load_lanes<Float8>(c0 + d);
    const Float8 b1 = load_lanes<Float8>(c1 + d);
    const Float8 b2 = load_lanes<Float8>(c2 + d);
    const Float8 a0 = load_lanes<Float8>(r0 + d);
    s00 += a0 * b0;
    s01 += a0 * b1;
    s02 += a0 * b2;
    const Float8 a1 = load_lanes<Float8>(r1 + d);
    s10 += a1 * b0;
    s11 += a1 * b1;
    s12 += a1 * b2;
    const Float8 a2 = load_lanes<Float8>(r2 + d);
    s20 += a2 * b0;
    s21 += a2 * b1;
    s22 += a2 * b2;
    const Float8 a3 = load_lanes<Float8>(r3 + d);
    s30 += a3 * b0;
    s31 += a3 * b1;
    s32 += a3 * b2;
  }
  products[0] = sum_of(s00);
  products[1] = sum_of(s01);
  products[2] = sum_of(s02);
  products[3] = sum_of(s10);
  products[4] = sum_of(s11);
  products[5] = sum_of(s12);
  products[6] = sum_of(s20);
  products[7] = sum_of(s21);
  products[8] = sum_of(s22);
  products[9] = sum_of(s30);
  products[10] = sum_of(s31);
  products[11] = sum_of(s32);
}

// The first index of the largest value[i] * factor[i], NaN and -infinity left out; -1 if nothing is
// left. n is a multiple of kWidth.
GARDO_CLONES int64_t scaled_argmax(const float* value, const float* factor, int64_t n) {
  Float8 best = Float8{} - kInfinity;
  for (int64_t i = 0; i < n; i += kWidth) {
    const Float8 scaled = load_lanes<Float8>(value + i) * load_lanes<Float8>(factor + i);
    best = scaled > best ? scaled : best;
  }
  float largest = best[0];
  for (int k = 1; k < kWidth; ++k) largest = std::max(largest, best[k]);
  if (largest == -kInfinity) return -1;
  int64_t i = 0;
  while (value[i] * factor[i] != largest) ++i;
  return i;
}

// One group: its rows as float32, the inverse of their lengths, and what was found so far.
class Group {
 public:
  Group(const NearestNeighborParams& params, int64_t capacity)
      : p_(params),
        stride_((params.dim + kWidth - 1) / kWidth * kWidth),
        // Not initialised: rows that can be read in place never touch it.
        copies_(new float[static_cast<std::size_t>(capacity * stride_)]) {}

  void begin(const int64_t* members, int64_t size) {
    members_ = members;
    size_ = size;
    const auto n = static_cast<std::size_t>(size);
    const std::size_t padded = n + kTileRows + kTileCols;
    rows_.resize(padded);
    inverse_.resize(padded);
    kind_.resize(n);
    best_.assign(padded, -kInfinity);
    nearest_.assign(padded, -1);
    if (size > kLargeGroup) return;
    ld_ = static_cast<int64_t>(padded + kWidth - 1) / kWidth * kWidth;
    products_.resize(padded * static_cast<std::size_t>(ld_));
  }

  // Asks for a sample's features ahead of their use: the rows of a group lie anywhere in memory,
  // which no hardware foresees.
  void prefetch(int64_t sample) const {
    const int64_t bytes = p_.features.dtype == DType::kFloat32 ? 4 : 2;
    const char* row = static_cast<const char*>(p_.features.data) + sample * p_.dim * bytes;
    const int64_t end = std::min(p_.dim * bytes, kPrefetchBytes);
    for (int64_t b = 0; b < end; b += 64) __builtin_prefetch(row + b, 0, 2);
  }

  // Row i as float32, where it is if it can be read there.
  void load_row(int64_t i) {
    const int64_t base = members_[i] * p_.dim;
    float* copy = copy_of(i);
    if (!in_place()) copy_row(base, copy);
    rows_[i] = in_place() ? static_cast<const float*>(p_.features.data) + base : copy;
  }

  // Takes the sum of squares of row i. One that float32 cannot hold is replaced by a unit row or by
  // zeros, and the result is true.
  bool set_length(int64_t i, double squares) {
    kind_[i] = RowKind::kUsable;
    inverse_[i] = static_cast<float>(1.0 / std::sqrt(squares));
    if (squares > kTinySquares && squares < kHugeSquares) return false;
    float* copy = copy_of(i);
    if (in_place()) copy_row(members_[i] * p_.dim, copy);
    rows_[i] = copy;
    kind_[i] = normalize_extreme_row(copy);
    inverse_[i] = kind_[i] == RowKind::kNonFinite ? kNoSimilarity : 1.0f;
    return true;
  }

  // Reads row i and finds its length.
  void prepare_row(int64_t i) {
    load_row(i);
    double squares = 0.0;
    for (int64_t d = 0; d < stride_; d += kBlock) {
      squares += sum_squares(rows_[i] + d, std::min(kBlock, stride_ - d));
    }
    set_length(i, squares);
  }

  // After all rows: tiles may reach beyond the last one, where nothing is similar to anything.
  void finish_rows() {
    std::fill(rows_.begin() + size_, rows_.end(), rows_[0]);
    std::fill(inverse_.begin() + size_, inverse_.end(), kNoSimilarity);
  }

  // The products of a tile, to be found by either member first.
  void multiply_tile(int64_t first, int64_t col) {
    float products[kTileRows * kTileCols];
    tile_products(rows_.data() + first, rows_.data() + col, stride_, products);
    for (int64_t i = 0; i < kTileRows; ++i) {
      for (int64_t j = 0; j < kTileCols; ++j) {
        const float product = products[i * kTileCols + j];
        products_[(first + i) * ld_ + col + j] = product;
        products_[(col + j) * ld_ + first + i] = product;
      }
    }
  }

  // Lengths from the products of the rows with themselves. True if rows were replaced: then their
  // products are to be taken once more.
  bool set_lengths() {
    bool replaced = false;
    for (int64_t i = 0; i < size_; ++i) {
      if (set_length(i, static_cast<double>(products_[i * ld_ + i]))) replaced = true;
    }
    return replaced;
  }

  // From the products and lengths of all members.
  void find_nearest(int64_t i) {
    float* row = products_.data() + i * ld_;
    const int64_t end = (size_ + kWidth - 1) / kWidth * kWidth;
    row[i] = -kInfinity;
    std::fill(row + size_, row + end, -kInfinity);
    const int64_t nearest = scaled_argmax(row, inverse_.data(), end);
    if (nearest < 0) return;
    best_[i] = row[nearest] * inverse_[nearest] * inverse_[i];
    nearest_[i] = nearest;
  }

  // Offers the columns of a tile to its rows.
  void visit_tile(int64_t first, int64_t col) {
    float products[kTileRows * kTileCols];
    tile_products(rows_.data() + first, rows_.data() + col, stride_, products);
    for (int64_t i = 0; i < kTileRows; ++i) {
      for (int64_t j = 0; j < kTileCols; ++j) {
        float& similarity = products[i * kTileCols + j];
        similarity *= inverse_[first + i] * inverse_[col + j];
        if (first + i == col + j) similarity = -kInfinity;
      }
      offer_best(first + i, col, products + i * kTileCols);
    }
  }

  void write_distance(int64_t i) const { p_.distance[members_[i]] = distance(i); }

  int64_t size() const { return size_; }

 private:
  bool in_place() const { return p_.features.dtype == DType::kFloat32 && stride_ == p_.dim; }
  float* copy_of(int64_t i) { return copies_.get() + i * stride_; }

  void copy_row(int64_t base, float* out) const {
    float scratch[kBlock];
    for (int64_t d = 0; d < p_.dim; d += kBlock) {
      const int64_t n = std::min(kBlock, p_.dim - d);
      const float* x = load_block(p_.features, base + d, n, scratch);
      std::copy(x, x + n, out + d);
    }
    std::fill(out + p_.dim, out + stride_, 0.0f);
  }

  // For a row whose sum of squares left the range of float32, or that is zero or not finite: makes
  // it a unit row, by its largest entry first, or a row of zeros.
  RowKind normalize_extreme_row(float* row) const {
    float largest = 0.0f;
    for (int64_t d = 0; d < p_.dim; ++d) {
      if (!std::isfinite(row[d])) {
        std::fill(row, row + p_.dim, 0.0f);
        return RowKind::kNonFinite;
      }
      largest = std::max(largest, std::fabs(row[d]));
    }
    if (largest == 0.0f) return RowKind::kZero;
    double squares = 0.0;
    for (int64_t d = 0; d < p_.dim; ++d) {
      const double x = static_cast<double>(row[d]) / largest;
      squares += x * x;
    }
    for (int64_t d = 0; d < p_.dim; ++d) {
      row[d] = static_cast<float>(static_cast<double>(row[d]) / largest / std::sqrt(squares));
    }
    return RowKind::kUsable;
  }

  // Offers the members of a column tile to member i. Those without a similarity (NaN) lose.
  void offer_best(int64_t i, int64_t first, const float* similarity) {
    float best = best_[i];
    int64_t nearest = nearest_[i];
    for (int64_t k = 0; k < kTileCols; ++k) {
      const bool nearer = similarity[k] > best;
      best = nearer ? similarity[k] : best;
      nearest = nearer ? first + k : nearest;
    }
    best_[i] = best;
    nearest_[i] = nearest;
  }

  float distance(int64_t i) const {
    const int64_t j = nearest_[i];
    if (kind_[i] == RowKind::kNonFinite) return std::numeric_limits<float>::quiet_NaN();
    if (j < 0) return 0.0f;
    if (kind_[i] == RowKind::kZero || kind_[j] == RowKind::kZero) return 1.0f;
    const float plain = 1.0f - best_[i];
    if (plain > kNear) return std::min(plain, 2.0f);
    double squares = 0.0;
    for (int64_t d = 0; d < stride_; d += kBlock) {
      squares += sum_squared_scaled_difference(inverse_[i], rows_[i] + d, inverse_[j], rows_[j] + d,
                                               std::min(kBlock, stride_ - d));
    }
    return static_cast<float>(0.5 * squares);
  }

  const NearestNeighborParams& p_;
  int64_t stride_;
  std::unique_ptr<float[]> copies_;
  const int64_t* members_ = nullptr;
  int64_t size_ = 0;
  std::vector<const float*> rows_;
  std::vector<float> inverse_;   // inverse lengths
  std::vector<float> products_;  // of all pairs of a small group, in rows of ld_
  int64_t ld_ = 0;
  std::vector<RowKind> kind_;
  std::vector<float> best_;
  std::vector<int64_t> nearest_;
};

// `next` are the samples that the thread will probably read after this group.
void nearest_of_small_group(Group& group, const int64_t* next, const int64_t* end) {
  const int64_t m = group.size();
  for (int64_t i = 0; i < m; ++i) group.load_row(i);
  group.finish_rows();
  const auto multiply = [&] {
    for (int64_t first = 0; first < m; first += kTileRows) {
      // From the row itself on: that product is its length, which saves a pass over the rows.
      for (int64_t col = first; col < m; col += kTileCols) {
        if (next < end) group.prefetch(*next++);
        group.multiply_tile(first, col);
      }
    }
  };
  multiply();
  if (group.set_lengths()) multiply();
  for (int64_t i = 0; i < m; ++i) {
    group.find_nearest(i);
    group.write_distance(i);
  }
}

void nearest_of_large_group(Group& group, int num_threads) {
  const int64_t m = group.size();
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t i = 0; i < m; ++i) group.prepare_row(i);
  group.finish_rows();
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
  for (int64_t task = 0; task < m; task += kTaskRows) {
    const int64_t end = std::min(task + kTaskRows, m);
    for (int64_t col = 0; col < m; col += kTileCols) {
      for (int64_t first = task; first < end; first += kTileRows) {
        group.visit_tile(first, col);
      }
    }
    for (int64_t i = task; i < end; ++i) group.write_distance(i);
  }
  (void)num_threads;  // unused without OpenMP
}

}  // namespace

bool nearest_neighbor_cpu(const NearestNeighborParams& p) {
  const Groups groups = sort_groups(p.groups, p.num_samples);
  const auto size_of = [&](int64_t g) { return groups.start[g + 1] - groups.start[g]; };
  const auto members_of = [&](int64_t g) { return groups.order.data() + groups.start[g]; };

  for (int64_t g = 0; g < groups.count(); ++g) {
    if (size_of(g) > p.max_group) return false;
  }
  int64_t largest_small = 0, small_work = 0;
  for (int64_t g = 0; g < groups.count(); ++g) {
    const int64_t size = size_of(g);
    if (size <= kLargeGroup) {
      largest_small = std::max(largest_small, size);
      small_work += size * size * p.dim;
      continue;
    }
    Group group(p, size);
    group.begin(members_of(g), size);
    nearest_of_large_group(group, p.num_threads);
  }
  if (largest_small == 0) return true;
  // Allocated here: an exception must not leave a parallel region.
  std::vector<Group> workspaces;
  workspaces.reserve(static_cast<std::size_t>(p.num_threads));
  for (int thread = 0; thread < p.num_threads; ++thread) workspaces.emplace_back(p, largest_small);
  for (Group& group : workspaces) group.begin(groups.order.data(), largest_small);
  const int64_t* all = groups.order.data() + p.num_samples;
  const int64_t share = std::max<int64_t>(1, groups.count() / (8 * p.num_threads));
#pragma omp parallel for num_threads(p.num_threads) \
    schedule(dynamic, share) if (small_work > kParallelWork)
  for (int64_t g = 0; g < groups.count(); ++g) {
    if (size_of(g) > kLargeGroup) continue;
    Group& group = workspaces[static_cast<std::size_t>(thread_index())];
    group.begin(members_of(g), size_of(g));
    const int64_t* next = members_of(g) + size_of(g);
    nearest_of_small_group(group, next, std::min(next + kPrefetchRows, all));
  }
  (void)share;  // these are unused without OpenMP
  (void)small_work;
  return true;
}

}  // namespace gardo
