#include "gate_samples.h"
#include "args.h"

namespace gardo {
namespace bindings {
namespace {

GateSamplesParams params(const Args& args) {
  GateSamplesParams p{};
  p.num_samples = args.value<int64_t>("num_samples");
  p.num_aux = args.value<int64_t>("num_aux");
  if (p.num_samples < 0) refuse("num_samples", "expected >= 0");
  if (p.num_aux < 0) refuse("num_aux", "expected >= 0");
  const bool any = p.num_samples > 0;
  p.proxy = args.array<const double>("proxy", any);
  p.aux = args.array<const double>("aux", any && p.num_aux > 0);
  p.groups = args.array<const int64_t>("group_ids", any);
  p.fraction = args.value<double>("fraction");
  if (!(p.fraction >= 0.0 && p.fraction <= 1.0)) refuse("fraction", "expected in [0, 1]");
  p.side = args.choice<Side>("side", 2);
  p.ties = args.choice<Ties>("ties", 3);
  p.share_of = args.choice<ShareOf>("share_of", 2);
  p.scope = args.choice<RankScope>("scope", 2);
  p.num_threads = args.threads();
  p.uncertainty = args.array<double>("uncertainty", any);
  p.gate = args.array<std::uint8_t>("gate", any);
  p.threshold = args.array<double>("threshold", any || !has_group_thresholds(p));
  p.mean_uncertainty = args.array<double>("mean_uncertainty", true);
  return p;
}

void on_cpu(const py::kwargs& kwargs) {
  const GateSamplesParams p = params(Args(kwargs));
  const py::gil_scoped_release released;
  gate_samples_cpu(p);
}

#ifdef GARDO_WITH_CUDA
void on_cuda(const py::kwargs& kwargs) {
  const Args args(kwargs);
  GateSamplesCudaParams p{};
  p.common = params(args);
  p.device_fraction = args.array<const double>("device_fraction", false);
  p.workspace = args.array<void>("workspace", true);
  p.workspace_size = args.value<int64_t>("workspace_size");
  p.stream = args.array<void>("stream", false);  // 0 is the default stream
  const py::gil_scoped_release released;
  gate_samples_cuda(p);
}
#endif

const bool added = add([](py::module_& m) {
  m.def("gate_samples", &on_cpu);
#ifdef GARDO_WITH_CUDA
  m.def("gate_samples_cuda", &on_cuda);
  m.def("gate_samples_cuda_workspace", &gate_samples_cuda_workspace);
#endif
});

}  // namespace
}  // namespace bindings
}  // namespace gardo
