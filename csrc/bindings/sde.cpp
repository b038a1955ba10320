#include "args.h"
#include "sde_args.h"

namespace gardo {
namespace bindings {
namespace {

void sde_step(const py::kwargs& kwargs) {
  const Args args(kwargs);
  SdeStepParams p{};
  p.extent = args.extent();
  const bool any = p.extent.rows > 0;
  p.velocity = args.velocity(any);
  p.sample = args.input("sample", any);
  p.coef = sde_coefficients(args, any);
  p.noise = args.input("noise", false);
  p.seed = args.array<const int64_t>("seed", false);
  p.prev_sample = args.array<float>("prev_sample", any);
  p.mean = args.array<float>("mean", false);
  p.log_prob = args.array<float>("log_prob", any);
  const py::gil_scoped_release released;
  sde_step_cpu(p);
}

void sde_log_prob(const py::kwargs& kwargs) {
  const Args args(kwargs);
  SdeLogProbParams p{};
  p.extent = args.extent();
  const bool any = p.extent.rows > 0;
  p.velocity = args.velocity(any);
  p.sample = args.input("sample", any);
  p.prev_sample = args.input("prev_sample", any);
  p.coef = sde_coefficients(args, any);
  p.log_prob = args.array<float>("log_prob", any);
  const py::gil_scoped_release released;
  sde_log_prob_cpu(p);
}

void velocity_grad(const py::kwargs& kwargs) {
  const Args args(kwargs);
  VelocityGradParams p{};
  p.extent = args.extent();
  const bool any = p.extent.rows > 0;
  p.velocity = args.velocity(any);
  p.sample = args.input("sample", any);
  p.prev_sample = args.input("prev_sample", any);
  p.ref_velocity = args.input("ref_velocity", false);
  p.coef = sde_coefficients(args, any);
  p.alpha = args.array<const float>("alpha", any);
  p.beta = args.array<const float>("beta", false);
  p.grad = args.scalar("grad", any);
  if (p.beta != nullptr && p.ref_velocity.data == nullptr) refuse("beta", "needs ref_velocity");
  p.grad_velocity = args.output("grad_velocity", any);
  p.grad_velocity_uncond = args.output("grad_velocity_uncond", p.velocity.uncond.data != nullptr);
  const py::gil_scoped_release released;
  velocity_grad_cpu(p);
}

const bool added = add([](py::module_& m) {
  m.def("sde_step", &sde_step);
  m.def("sde_log_prob", &sde_log_prob);
  m.def("velocity_grad", &velocity_grad);
});

}  // namespace
}  // namespace bindings
}  // namespace gardo
