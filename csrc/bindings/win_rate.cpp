#include "win_rate.h"
#include "args.h"

namespace gardo {
namespace bindings {
namespace {

WinRateParams win_rate_params(const Args& args) {
  WinRateParams p{};
  p.num_rewards = args.value<int64_t>("num_rewards");
  p.num_samples = args.value<int64_t>("num_samples");
  if (p.num_rewards < 0) refuse("num_rewards", "expected >= 0");
  if (p.num_samples < 0) refuse("num_samples", "expected >= 0");
  const bool any = p.num_rewards > 0 && p.num_samples > 0;
  p.rewards = args.array<const double>("rewards", any);
  p.groups = args.array<const int64_t>("group_ids", false);
  p.num_threads = args.threads();
  p.rate = args.array<double>("rate", any);
  return p;
}

void win_rate_host(const py::kwargs& kwargs) {
  const WinRateParams p = win_rate_params(Args(kwargs));
  const py::gil_scoped_release released;
  win_rate_cpu(p);
}

#ifdef GARDO_WITH_CUDA
void win_rate_device(const py::kwargs& kwargs) {
  const Args args(kwargs);
  WinRateCudaParams p{};
  p.common = win_rate_params(args);
  p.workspace = args.array<void>("workspace", false);
  p.workspace_size = args.value<int64_t>("workspace_size");
  p.stream = args.array<void>("stream", false);  // 0 is the default stream
  const py::gil_scoped_release released;
  win_rate_cuda(p);
}
#endif

const bool added = add([](py::module_& m) {
  m.def("win_rate", &win_rate_host);
#ifdef GARDO_WITH_CUDA
  m.def("win_rate_cuda", &win_rate_device);
  m.def("win_rate_cuda_workspace", &win_rate_cuda_workspace);
#endif
});

}  // namespace
}  // namespace bindings
}  // namespace gardo
