#include "group_advantages.h"
#include "args.h"

namespace gardo {
namespace bindings {
namespace {

GroupAdvantagesParams params(const Args& args) {
  GroupAdvantagesParams p{};
  p.num_samples = args.value<int64_t>("num_samples");
  if (p.num_samples < 0) refuse("num_samples", "expected >= 0");
  const bool any = p.num_samples > 0;
  p.proxy = args.array<const double>("proxy", any);
  p.groups = args.array<const int64_t>("group_ids", any);
  p.distance = args.array<const double>("distance", false);
  p.norm = args.choice<AdvantageNorm>("norm", 3);
  p.diversity_scale = args.choice<DiversityScale>("diversity_scale", 2);
  p.num_threads = args.threads();
  p.advantage = args.array<double>("advantage", any);
  return p;
}

void on_cpu(const py::kwargs& kwargs) {
  const GroupAdvantagesParams p = params(Args(kwargs));
  const py::gil_scoped_release released;
  group_advantages_cpu(p);
}

#ifdef GARDO_WITH_CUDA
void on_cuda(const py::kwargs& kwargs) {
  const Args args(kwargs);
  GroupAdvantagesCudaParams p{};
  p.common = params(args);
  p.workspace = args.array<void>("workspace", false);
  p.workspace_size = args.value<int64_t>("workspace_size");
  p.stream = args.array<void>("stream", false);  // 0 is the default stream
  const py::gil_scoped_release released;
  group_advantages_cuda(p);
}
#endif

const bool added = add([](py::module_& m) {
  m.def("group_advantages", &on_cpu);
#ifdef GARDO_WITH_CUDA
  m.def("group_advantages_cuda", &on_cuda);
  m.def("group_advantages_cuda_workspace", &group_advantages_cuda_workspace);
#endif
});

}  // namespace
}  // namespace bindings
}  // namespace gardo
