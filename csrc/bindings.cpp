// The Python face of the C++ core. It takes addresses and sizes, so that it needs no torch headers;
// `gardo_kernels/_native.py` checks shapes and dtypes and is its only caller.
//
// All arguments are keywords. Latents are (address, dtype), row scalars (address, stride), other
// arrays a plain address; address 0 means not given. Every function releases the GIL.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "grpo_loss.h"
#include "nearest_neighbor.h"
#include "nft_loss.h"
#include "sde_step.h"
#include "shape_rewards.h"
#include "win_rate.h"

namespace py = pybind11;

namespace {

using std::int64_t;

[[noreturn]] void refuse(const std::string& name, const std::string& problem) {
  throw std::invalid_argument(name + ": " + problem);
}

// The Python string of a literal, made once: a call looks up to 25 names.
PyObject* interned(const char* literal) {
  static std::unordered_map<const char*, PyObject*> names;  // under the GIL
  PyObject*& name = names[literal];
  if (name == nullptr) name = PyUnicode_InternFromString(literal);
  if (name == nullptr) throw py::error_already_set();
  return name;
}

// Reads the keyword arguments of one call.
class Args {
 public:
  explicit Args(const py::kwargs& kwargs) : kwargs_(kwargs) {}

  template <typename T>
  T value(const char* name) const {
    PyObject* const found = PyDict_GetItemWithError(kwargs_.ptr(), interned(name));
    if (found == nullptr) throw py::type_error(std::string(name) + ": missing");
    try {
      return py::handle(found).cast<T>();
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(name) + ": wrong type");
    }
  }

  template <typename Enum>
  Enum choice(const char* name, int count) const {
    const int code = value<int>(name);
    if (code < 0 || code >= count) refuse(name, "unknown code " + std::to_string(code));
    return static_cast<Enum>(code);
  }

  // Empty tensors may have address 0, hence `needed`.
  template <typename T>
  T* array(const char* name, bool needed) const {
    return at<T>(name, value<std::uintptr_t>(name), needed);
  }

  gardo::ConstLatents input(const char* name, bool needed) const {
    const auto [address, dtype] = tensor(name);
    return {at<const void>(name, address, needed), dtype};
  }

  gardo::Latents output(const char* name, bool needed) const {
    const auto [address, dtype] = tensor(name);
    return {at<void>(name, address, needed), dtype};
  }

  gardo::RowScalar scalar(const char* name, bool needed) const {
    const auto [address, stride] = value<std::pair<std::uintptr_t, int64_t>>(name);
    if (stride < 0) refuse(name, "negative stride");
    return {at<const float>(name, address, needed), stride};
  }

  int threads() const {
    const int threads = value<int>("num_threads");
    if (threads < 1) refuse("num_threads", "expected >= 1");
    return threads;
  }

  gardo::Extent extent() const {
    const auto rows = value<int64_t>("rows"), row_size = value<int64_t>("row_size");
    if (rows < 0) refuse("rows", "expected >= 0");
    if (row_size < 1 && rows > 0) refuse("row_size", "expected >= 1");
    if (row_size > 0 && rows > INT64_MAX / row_size) refuse("rows", "too many for row_size");
    return {rows, row_size, threads()};
  }

  gardo::Velocity velocity(bool needed) const {
    return {input("velocity", needed), input("velocity_uncond", false),
            value<float>("guidance_scale")};
  }

 private:
  template <typename T>
  static T* at(const char* name, std::uintptr_t address, bool needed) {
    if (needed && address == 0) refuse(name, "null address");
    return reinterpret_cast<T*>(address);
  }

  std::pair<std::uintptr_t, gardo::DType> tensor(const char* name) const {
    const auto [address, code] = value<std::pair<std::uintptr_t, int>>(name);
    if (code < 0 || code > 2) refuse(name, "unknown dtype code " + std::to_string(code));
    return {address, static_cast<gardo::DType>(code)};
  }

  const py::kwargs& kwargs_;
};

template <typename T>
gardo::BasicShapeRewardsParams<T> shape_rewards_params(const Args& args) {
  gardo::BasicShapeRewardsParams<T> p{};
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
  p.advantage_norm = args.choice<gardo::AdvantageNorm>("advantage_norm", 3);
  p.gate_mode = args.choice<gardo::GateMode>("gate_mode", 4);
  p.scope = args.choice<gardo::RankScope>("scope", 2);
  p.num_threads = args.threads();
  p.advantage = args.array<T>("advantage", any);
  p.uncertainty = args.array<T>("uncertainty", any);
  p.gate = args.array<std::uint8_t>("gate", any);
  p.threshold = args.array<T>("threshold", true);
  p.mean_uncertainty = args.array<T>("mean_uncertainty", true);
  return p;
}

template <typename T>
void shape_rewards(const py::kwargs& kwargs) {
  const gardo::BasicShapeRewardsParams<T> p = shape_rewards_params<T>(Args(kwargs));
  const py::gil_scoped_release released;
  gardo::shape_rewards_cpu(p);
}

#ifdef GARDO_WITH_CUDA
void shape_rewards_cuda(const py::kwargs& kwargs) {
  const Args args(kwargs);
  gardo::ShapeRewardsCudaParams p{};
  p.common = shape_rewards_params<double>(args);
  p.device_fraction = args.array<const double>("device_fraction", false);
  p.workspace = args.array<void>("workspace", true);
  p.workspace_size = args.value<int64_t>("workspace_size");
  p.stream = args.array<void>("stream", false);  // 0 is the default stream
  const py::gil_scoped_release released;
  gardo::shape_rewards_cuda(p);
}
#endif

gardo::WinRateParams win_rate_params(const Args& args) {
  gardo::WinRateParams p{};
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

void win_rate(const py::kwargs& kwargs) {
  const gardo::WinRateParams p = win_rate_params(Args(kwargs));
  const py::gil_scoped_release released;
  gardo::win_rate_cpu(p);
}

#ifdef GARDO_WITH_CUDA
void win_rate_cuda(const py::kwargs& kwargs) {
  const Args args(kwargs);
  gardo::WinRateCudaParams p{};
  p.common = win_rate_params(args);
  p.workspace = args.array<void>("workspace", false);
  p.workspace_size = args.value<int64_t>("workspace_size");
  p.stream = args.array<void>("stream", false);  // 0 is the default stream
  const py::gil_scoped_release released;
  gardo::win_rate_cuda(p);
}
#endif

bool nearest_neighbor(const py::kwargs& kwargs) {
  const Args args(kwargs);
  gardo::NearestNeighborParams p{};
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
  return gardo::nearest_neighbor_cpu(p);
}

gardo::SdeCoefficients coefficients(const Args& args, bool any, bool with_c, bool with_density) {
  gardo::SdeCoefficients coef{};
  coef.a = args.scalar("a", any);
  coef.b = args.scalar("b", any);
  if (with_c) coef.c = args.scalar("c", any);
  if (with_density) {
    coef.scale = args.scalar("scale", any);
    coef.offset = args.scalar("offset", any);
  }
  return coef;
}

void sde_step(const py::kwargs& kwargs) {
  const Args args(kwargs);
  gardo::SdeStepParams p{};
  p.extent = args.extent();
  const bool any = p.extent.rows > 0;
  p.velocity = args.velocity(any);
  p.sample = args.input("sample", any);
  p.coef = coefficients(args, any, true, true);
  p.noise = args.input("noise", false);
  p.seed = args.array<const int64_t>("seed", false);
  p.prev_sample = args.array<float>("prev_sample", any);
  p.mean = args.array<float>("mean", false);
  p.log_prob = args.array<float>("log_prob", any);
  const py::gil_scoped_release released;
  gardo::sde_step_cpu(p);
}

void sde_log_prob(const py::kwargs& kwargs) {
  const Args args(kwargs);
  gardo::SdeLogProbParams p{};
  p.extent = args.extent();
  const bool any = p.extent.rows > 0;
  p.velocity = args.velocity(any);
  p.sample = args.input("sample", any);
  p.prev_sample = args.input("prev_sample", any);
  p.coef = coefficients(args, any, false, true);
  p.log_prob = args.array<float>("log_prob", any);
  const py::gil_scoped_release released;
  gardo::sde_log_prob_cpu(p);
}

void affine_backward(const py::kwargs& kwargs) {
  const Args args(kwargs);
  gardo::AffineBackwardParams p{};
  p.extent = args.extent();
  const bool any = p.extent.rows > 0;
  p.velocity = args.velocity(any);
  p.sample = args.input("sample", any);
  p.prev_sample = args.input("prev_sample", any);
  p.ref_velocity = args.input("ref_velocity", false);
  p.coef = coefficients(args, any, false, false);
  p.alpha = args.array<const float>("alpha", any);
  p.beta = args.array<const float>("beta", false);
  p.grad = args.scalar("grad", any);
  if (p.beta != nullptr && p.ref_velocity.data == nullptr) refuse("beta", "needs ref_velocity");
  p.grad_velocity = args.output("grad_velocity", any);
  p.grad_velocity_uncond = args.output("grad_velocity_uncond", p.velocity.uncond.data != nullptr);
  const py::gil_scoped_release released;
  gardo::affine_backward_cpu(p);
}

void grpo_loss(const py::kwargs& kwargs) {
  const Args args(kwargs);
  gardo::GrpoLossParams p{};
  p.extent = args.extent();
  const bool any = p.extent.rows > 0;
  p.velocity = args.velocity(any);
  p.sample = args.input("sample", any);
  p.prev_sample = args.input("prev_sample", any);
  p.ref_velocity = args.input("ref_velocity", false);
  p.coef = coefficients(args, any, false, true);
  p.kl_weight = args.scalar("kl_weight", any);
  p.old_log_prob = args.array<const float>("old_log_prob", any);
  p.advantage = args.array<const float>("advantage", any);
  p.gate = args.array<const std::uint8_t>("gate", false);
  p.clip_low = args.value<float>("clip_low");
  p.clip_high = args.value<float>("clip_high");
  p.adv_clip = args.value<float>("adv_clip");
  p.kl_coef = args.value<float>("kl_coef");
  p.kl_reduction = args.choice<gardo::KlReduction>("kl_reduction", 2);
  p.loss = args.array<float>("loss", true);
  p.policy_loss = args.array<float>("policy_loss", true);
  p.kl = args.array<float>("kl", true);
  p.clip_fraction = args.array<float>("clip_fraction", true);
  p.log_prob = args.array<float>("log_prob", any);
  p.ratio = args.array<float>("ratio", any);
  p.alpha = args.array<float>("alpha", any);
  p.beta = args.array<float>("beta", any);
  const py::gil_scoped_release released;
  gardo::grpo_loss_cpu(p);
}

gardo::NftTensors nft_tensors(const Args& args) {
  gardo::NftTensors t{};
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
  gardo::NftLossParams p{};
  p.tensors = nft_tensors(args);
  const bool any = p.tensors.extent.rows > 0;
  p.advantage = args.array<const float>("advantage", any);
  p.gate = args.array<const std::uint8_t>("gate", false);
  p.adv_clip = args.value<float>("adv_clip");
  if (!(p.adv_clip > 0.0f)) refuse("adv_clip", "expected > 0");
  p.kl_coef = args.value<float>("kl_coef");
  p.loss = args.array<float>("loss", true);
  p.policy_loss = args.array<float>("policy_loss", true);
  p.kl = args.array<float>("kl", true);
  p.grad_positive = args.array<float>("grad_positive", any);
  p.grad_negative = args.array<float>("grad_negative", any);
  p.grad_kl = args.array<float>("grad_kl", any);
  const py::gil_scoped_release released;
  gardo::nft_loss_cpu(p);
}

void nft_backward(const py::kwargs& kwargs) {
  const Args args(kwargs);
  gardo::NftBackwardParams p{};
  p.tensors = nft_tensors(args);
  const bool any = p.tensors.extent.rows > 0;
  p.grad_positive = args.array<const float>("grad_positive", any);
  p.grad_negative = args.array<const float>("grad_negative", any);
  p.grad_kl = args.array<const float>("grad_kl", any && p.tensors.ref_velocity.data != nullptr);
  p.grad_velocity = args.output("grad_velocity", any);
  const py::gil_scoped_release released;
  gardo::nft_backward_cpu(p);
}

bool has_cuda() {
#ifdef GARDO_WITH_CUDA
  return true;
#else
  return false;
#endif
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The torch-free C++ core of gardo_kernels; use it through gardo_kernels._native.";
  m.attr("has_openmp") = has_openmp();
  m.attr("has_cuda") = has_cuda();
  m.def("shape_rewards", &shape_rewards<double>);
  m.def("shape_rewards_float32", &shape_rewards<float>);
#ifdef GARDO_WITH_CUDA
  m.def("shape_rewards_cuda", &shape_rewards_cuda);
  m.def("shape_rewards_cuda_workspace", &gardo::shape_rewards_cuda_workspace);
  m.def("win_rate_cuda", &win_rate_cuda);
  m.def("win_rate_cuda_workspace", &gardo::win_rate_cuda_workspace);
#endif
  m.def("win_rate", &win_rate);
  m.def("nearest_neighbor", &nearest_neighbor);
  m.def("sde_step", &sde_step);
  m.def("sde_log_prob", &sde_log_prob);
  m.def("affine_backward", &affine_backward);
  m.def("grpo_loss", &grpo_loss);
  m.def("nft_loss", &nft_loss);
  m.def("nft_backward", &nft_backward);
}
