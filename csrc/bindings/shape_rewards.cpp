#include "shape_rewards.h"
#include "args.h"

namespace gardo {
namespace bindings {
namespace {

template <typename T>
BasicShapeRewardsParams<T> shape_rewards_params(const Args& args) {
  BasicShapeRewardsParams<T> p{};
  p.num_samples = args.value<int64_t>("num_samples");
  p.num_aux = args.value<int64_t>("num_aux");
  if (p.num_samples < 0) refuse("num_samples", "expected >= 0");
  if (p.num_aux < 0) refuse("num_aux", "expected >= 0");
  const bool any = p.num_samples > 0;
  p.proxy = args.array<const T>("proxy", any);
  p.aux = args.array<const T>("aux", any && p.num_aux > 0);
  p.groups = args.array<const int64_t>("group_ids", any);
  p.distance = args.array<const T>("distance", false);
  p.fraction = args.value<double>("fraction");
  if (!(p.fraction >= 0.0 && p.fraction <= 1.0)) refuse("fraction", "expected in [0, 1]");
  p.advantage_norm = args.choice<AdvantageNorm>("advantage_norm", 3);
  p.gate_mode = args.choice<GateMode>("gate_mode", 4);
  p.scope = args.choice<RankScope>("scope", 2);
  p.num_threads = args.threads();
  p.advantage = args.array<T>("advantage", any);
  p.uncertainty = args.array<T>("uncertainty", any);
  p.gate = args.array<std::uint8_t>("gate", any);
  p.threshold = args.array<T>("threshold", true);
  p.mean_uncertainty = args.array<T>("mean_uncertainty", true);
  return p;
}

template <typename T>
void shape_rewards_host(const py::kwargs& kwargs) {
  const BasicShapeRewardsParams<T> p = shape_rewards_params<T>(Args(kwargs));
  const py::gil_scoped_release released;
  shape_rewards_cpu(p);
}

#ifdef GARDO_WITH_CUDA
void shape_rewards_device(const py::kwargs& kwargs) {
  const Args args(kwargs);
  ShapeRewardsCudaParams p{};
  p.common = shape_rewards_params<double>(args);
  p.device_fraction = args.array<const double>("device_fraction", false);
  p.workspace = args.array<void>("workspace", true);
  p.workspace_size = args.value<int64_t>("workspace_size");
  p.stream = args.array<void>("stream", false);  // 0 is the default stream
  const py::gil_scoped_release released;
  shape_rewards_cuda(p);
}
#endif

const bool added = add([](py::module_& m) {
  m.def("shape_rewards", &shape_rewards_host<double>);
  m.def("shape_rewards_float32", &shape_rewards_host<float>);
#ifdef GARDO_WITH_CUDA
  m.def("shape_rewards_cuda", &shape_rewards_device);
  m.def("shape_rewards_cuda_workspace", &shape_rewards_cuda_workspace);
#endif
});

}  // namespace
}  // namespace bindings
}  // namespace gardo
