#include "nft_loss.h"
#include "args.h"

namespace gardo {
namespace bindings {
namespace {

NftTensors nft_tensors(const Args& args) {
  NftTensors t{};
  t.extent = args.extent();
  const bool any = t.extent.rows > 0;
  t.velocity = args.input("velocity", any);
  t.old_velocity = args.input("old_velocity", any);
  t.x0 = args.input("x0", any);
  t.xt = args.input("xt", any);
  t.ref_velocity = args.input("ref_velocity", false);
  t.t = args.scalar("t", any);
  t.beta = args.value<double>("beta");
  if (!(t.beta > 0.0)) refuse("beta", "expected > 0");
  return t;
}

void nft_loss(const py::kwargs& kwargs) {
  const Args args(kwargs);
  NftLossParams p{};
  p.tensors = nft_tensors(args);
  const bool any = p.tensors.extent.rows > 0;
  p.advantage = args.array<const float>("advantage", any);
  p.gate = args.array<const std::uint8_t>("gate", false);
  p.adv_clip = args.value<float>("adv_clip");
  if (!(p.adv_clip > 0.0f)) refuse("adv_clip", "expected > 0");
  p.kl_coef = args.value<float>("kl_coef");
  p.reduction = args.choice<NftReduction>("reduction", 2);
  p.loss = args.array<float>("loss", true);
  p.stats = args.array<float>("stats", true);
  p.weights = args.array<float>("weights", any);
  const py::gil_scoped_release released;
  nft_loss_cpu(p);
}

void nft_grad(const py::kwargs& kwargs) {
  const Args args(kwargs);
  NftGradParams p{};
  p.tensors = nft_tensors(args);
  const bool any = p.tensors.extent.rows > 0;
  p.weights = args.array<const float>("weights", any);
  p.grad_velocity = args.output("grad_velocity", any);
  const py::gil_scoped_release released;
  nft_grad_cpu(p);
}

const bool added = add([](py::module_& m) {
  m.def("nft_loss", &nft_loss);
  m.def("nft_grad", &nft_grad);
});

}  // namespace
}  // namespace bindings
}  // namespace gardo
