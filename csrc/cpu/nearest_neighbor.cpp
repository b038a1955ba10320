#include "nearest_neighbor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "block_ops.h"
#include "groups.h"
#include "simd.h"

namespace gardo {
namespace {

using std::int64_t;

constexpr int64_t kWidth = 8;
constexpr int64_t kTileRows = 4, kTileCols = 2;
// Above this size the members of one group, not the groups, are shared out among the threads.
constexpr int64_t kLargeGroup = 256;
constexpr float kNoNeighbor = -std::numeric_limits<float>::infinity();

enum class RowKind : std::uint8_t { kUsable, kZero, kNonFinite };

GARDO_CLONES double sum_squares_wide(const float* x, int64_t n) {
  double lanes[kWidth] = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    for (int64_t j = 0; j < kWidth; ++j) {
      lanes[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
    }
  }
  double total = 0.0;
  for (; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  for (const double lane : lanes) total += lane;
  return total;
}

GARDO_CLONES void scale_row(const float* x, double factor, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(static_cast<double>(x[i]) * factor);
}

// Writes row `index` with length 1, padded with zeros to a multiple of kWidth.
RowKind normalize_row(const NearestNeighborParams& p, int64_t index, int64_t stride, float* out) {
  double squares = 0.0;
  float scratch[kBlock];
  for (int64_t d = 0; d < p.dim; d += kBlock) {
    const int64_t n = std::min(kBlock, p.dim - d);
    squares += sum_squares_wide(load_block(p.features, index * p.dim + d, n, scratch), n);
  }
  std::fill(out + p.dim, out + stride, 0.0f);
  if (!std::isfinite(squares) || squares == 0.0) {
    std::fill(out, out + p.dim, 0.0f);
    return squares == 0.0 ? RowKind::kZero : RowKind::kNonFinite;
  }
  const double inverse = 1.0 / std::sqrt(squares);
  for (int64_t d = 0; d < p.dim; d += kBlock) {
    const int64_t n = std::min(kBlock, p.dim - d);
    scale_row(load_block(p.features, index * p.dim + d, n, scratch), inverse, n, out + d);
  }
  return RowKind::kUsable;
}

// Similarities of kTileRows rows with kTileCols columns, each row `stride` long.
GARDO_CLONES void tile_similarity(const float* rows, const float* cols, int64_t stride,
                                  float* similarity) {
  Float8 sums[kTileRows][kTileCols] = {};
  for (int64_t d = 0; d < stride; d += kWidth) {
    Float8 row[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) row[i] = load8(rows + i * stride + d);
    for (int64_t j = 0; j < kTileCols; ++j) {
      const Float8 col = load8(cols + j * stride + d);
      for (int64_t i = 0; i < kTileRows; ++i) sums[i][j] += row[i] * col;
    }
  }
  for (int64_t i = 0; i < kTileRows; ++i) {
    for (int64_t j = 0; j < kTileCols; ++j) {
      float lanes[kWidth];
      std::memcpy(lanes, &sums[i][j], sizeof(lanes));
      float total = 0.0f;
      for (const float lane : lanes) total += lane;
      similarity[i * kTileCols + j] = total;
    }
  }
}

// 1 - cos of two rows of length 1, as half their squared difference: no cancellation for near
// duplicates, and exactly 0 for duplicates.
float unit_distance(const float* a, const float* b, int64_t n) {
  double squares = 0.0;
  for (int64_t d = 0; d < n; d += kBlock) {
    squares += sum_squared_difference(a + d, b + d, std::min(kBlock, n - d));
  }
  return static_cast<float>(std::min(0.5 * squares, 2.0));
}

// The unit rows of one group, padded with zero rows to whole tiles.
struct Group {
  std::vector<float> unit;
  std::vector<RowKind> kind;

  void prepare(int64_t members, int64_t stride) {
    const int64_t tile = kTileRows;
    const int64_t padded = (members + tile - 1) / tile * tile;
    unit.resize(static_cast<std::size_t>(padded * stride));
    kind.resize(static_cast<std::size_t>(members));
    std::fill(unit.begin() + members * stride, unit.end(), 0.0f);
  }
};

void nearest_of_tile(const NearestNeighborParams& p, const Group& group, const int64_t* members,
                     int64_t m, int64_t stride, int64_t first) {
  float best[kTileRows];
  int64_t nearest[kTileRows];
  std::fill(best, best + kTileRows, kNoNeighbor);
  std::fill(nearest, nearest + kTileRows, -1);
  for (int64_t col = 0; col < m; col += kTileCols) {
    float similarity[kTileRows * kTileCols];
    tile_similarity(group.unit.data() + first * stride, group.unit.data() + col * stride, stride,
                    similarity);
    for (int64_t i = 0; i < kTileRows; ++i) {
      for (int64_t j = col; j < std::min(col + kTileCols, m); ++j) {
        const float value = similarity[i * kTileCols + j - col];
        if (j == first + i || group.kind[j] == RowKind::kNonFinite || !(value > best[i])) continue;
        best[i] = value;
        nearest[i] = j;
      }
    }
  }
  for (int64_t i = first; i < std::min(first + kTileRows, m); ++i) {
    const int64_t j = nearest[i - first];
    float& distance = p.distance[members[i]];
    if (group.kind[i] == RowKind::kNonFinite) {
      distance = std::numeric_limits<float>::quiet_NaN();
    } else if (j < 0) {
      distance = 0.0f;
    } else if (group.kind[i] == RowKind::kZero || group.kind[j] == RowKind::kZero) {
      distance = 1.0f;
    } else {
      distance =
          unit_distance(group.unit.data() + i * stride, group.unit.data() + j * stride, stride);
    }
  }
}

// Inside a parallel region the two loops run on the calling thread alone.
void nearest_of_group(const NearestNeighborParams& p, const int64_t* members, int64_t m,
                      int64_t stride, Group& group) {
#pragma omp parallel for num_threads(p.num_threads) schedule(static) if (m > kLargeGroup)
  for (int64_t i = 0; i < m; ++i) {
    group.kind[i] = normalize_row(p, members[i], stride, group.unit.data() + i * stride);
  }
#pragma omp parallel for num_threads(p.num_threads) schedule(static) if (m > kLargeGroup)
  for (int64_t first = 0; first < m; first += kTileRows) {
    nearest_of_tile(p, group, members, m, stride, first);
  }
}

}  // namespace

void nearest_neighbor_cpu(const NearestNeighborParams& p) {
  const Groups groups = sort_groups(p.groups, p.num_samples);
  const int64_t stride = (p.dim + kWidth - 1) / kWidth * kWidth;
  const auto size_of = [&](int64_t g) { return groups.start[g + 1] - groups.start[g]; };
  const auto members_of = [&](int64_t g) { return groups.order.data() + groups.start[g]; };

  int64_t largest_small = 0;
  {
    Group group;
    for (int64_t g = 0; g < groups.count(); ++g) {
      if (size_of(g) <= kLargeGroup) {
        largest_small = std::max(largest_small, size_of(g));
        continue;
      }
      group.prepare(size_of(g), stride);
      nearest_of_group(p, members_of(g), size_of(g), stride, group);
    }
  }
  if (largest_small == 0) return;
  // Allocated here: an exception must not leave a parallel region.
  std::vector<Group> workspaces(static_cast<std::size_t>(p.num_threads));
  for (Group& group : workspaces) group.prepare(largest_small, stride);
#pragma omp parallel for num_threads(p.num_threads) schedule(dynamic) if (groups.count() > 1)
  for (int64_t g = 0; g < groups.count(); ++g) {
    if (size_of(g) > kLargeGroup) continue;
    Group& group = workspaces[static_cast<std::size_t>(thread_index())];
    group.prepare(size_of(g), stride);
    nearest_of_group(p, members_of(g), size_of(g), stride, group);
  }
}

}  // namespace gardo
