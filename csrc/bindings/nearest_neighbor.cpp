#include "nearest_neighbor.h"
#include "args.h"

namespace gardo {
namespace bindings {
namespace {

bool nearest_neighbor(const py::kwargs& kwargs) {
  const Args args(kwargs);
  NearestNeighborParams p{};
  p.num_samples = args.value<int64_t>("num_samples");
  p.dim = args.value<int64_t>("dim");
  if (p.num_samples < 0) refuse("num_samples", "expected >= 0");
  if (p.dim < 1 && p.num_samples > 0) refuse("dim", "expected >= 1");
  const bool any = p.num_samples > 0;
  p.features = args.input("features", any);
  p.groups = args.array<const int64_t>("group_ids", any);
  p.max_group = args.value<int64_t>("max_group");
  p.num_threads = args.threads();
  p.distance = args.array<float>("distance", any);
  const py::gil_scoped_release released;
  return nearest_neighbor_cpu(p);
}

const bool added = add([](py::module_& m) { m.def("nearest_neighbor", &nearest_neighbor); });

}  // namespace
}  // namespace bindings
}  // namespace gardo
