#include "cap_rewards.h"
#include "args.h"

namespace gardo {
namespace bindings {
namespace {

CapRewardsParams params(const Args& args) {
  CapRewardsParams p{};
  p.num_samples = args.value<int64_t>("num_samples");
  p.num_aux = args.value<int64_t>("num_aux");
  p.pool_size = args.value<int64_t>("pool_size");
  if (p.num_samples < 0) refuse("num_samples", "expected >= 0");
  if (p.num_aux < 1) refuse("num_aux", "expected >= 1");
  if (p.pool_size < 0) refuse("pool_size", "expected >= 0");
  const bool any = p.num_samples > 0;
  p.proxy = args.array<const double>("proxy", any);
  p.aux = args.array<const double>("aux", any);
  p.pool = args.array<const double>("pool", p.pool_size > 0);
  p.tau = args.value<double>("tau");
  p.num_threads = args.threads();
  p.capped = args.array<double>("capped", any);
  return p;
}

void on_cpu(const py::kwargs& kwargs) {
  const CapRewardsParams p = params(Args(kwargs));
  const py::gil_scoped_release released;
  cap_rewards_cpu(p);
}

#ifdef GARDO_WITH_CUDA
void on_cuda(const py::kwargs& kwargs) {
  const Args args(kwargs);
  CapRewardsCudaParams p{};
  p.common = params(args);
  p.device_tau = args.array<const double>("device_tau", false);
  p.stream = args.array<void>("stream", false);  // 0 is the default stream
  const py::gil_scoped_release released;
  cap_rewards_cuda(p);
}
#endif

const bool added = add([](py::module_& m) {
  m.def("cap_rewards", &on_cpu);
#ifdef GARDO_WITH_CUDA
  m.def("cap_rewards_cuda", &on_cuda);
#endif
});

}  // namespace
}  // namespace bindings
}  // namespace gardo
