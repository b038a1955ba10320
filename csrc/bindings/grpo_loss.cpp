#include "grpo_loss.h"
#include "args.h"
#include "sde_args.h"

namespace gardo {
namespace bindings {
namespace {

void grpo_loss(const py::kwargs& kwargs) {
  const Args args(kwargs);
  GrpoLossParams p{};
  p.extent = args.extent();
  const bool any = p.extent.rows > 0;
  p.velocity = args.velocity(any);
  p.sample = args.input("sample", any);
  p.prev_sample = args.input("prev_sample", any);
  p.ref_velocity = args.input("ref_velocity", false);
  p.noise = args.input("noise", false);
  p.coef = sde_coefficients(args, any);
  p.old_log_prob = args.array<const float>("old_log_prob", any);
  p.advantage = args.array<const float>("advantage", any);
  p.gate = args.array<const std::uint8_t>("gate", false);
  p.clip_low = args.value<float>("clip_low");
  p.clip_high = args.value<float>("clip_high");
  p.adv_clip = args.value<float>("adv_clip");
  p.kl_coef = args.value<float>("kl_coef");
  p.reduction = args.choice<Reduction>("reduction", 3);
  p.loss = args.array<float>("loss", true);
  p.stats = args.array<float>("stats", true);
  p.log_prob = args.array<float>("log_prob", any);
  p.ratio = args.array<float>("ratio", any);
  p.alpha = args.array<float>("alpha", any);
  p.beta = args.array<float>("beta", any);
  const py::gil_scoped_release released;
  grpo_loss_cpu(p);
}

const bool added = add([](py::module_& m) { m.def("grpo_loss", &grpo_loss); });

}  // namespace
}  // namespace bindings
}  // namespace gardo
