// The Python face of the C++ core. It takes addresses and sizes, so that it needs no torch headers;
// `gardo_kernels/_native.py` checks shapes and dtypes and is its only caller.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "shape_rewards.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <typename T>
T* pointer(Address address, bool needed, const char* name) {
  if (needed && address == 0) throw std::invalid_argument(std::string(name) + ": null address");
  return reinterpret_cast<T*>(address);
}

void shape_rewards(Address proxy, Address aux, Address group_ids, Address distance,
                   std::int64_t num_samples, std::int64_t num_aux, double fraction,
                   int advantage_norm, int gate_mode, int scope, int num_threads, Address advantage,
                   Address uncertainty, Address gate, Address threshold, Address mean_uncertainty) {
  require(num_samples >= 0, "num_samples: expected >= 0");
  require(num_aux >= 0, "num_aux: expected >= 0");
  require(fraction >= 0.0 && fraction <= 1.0, "fraction: expected in [0, 1]");
  require(advantage_norm >= 0 && advantage_norm <= 2, "advantage_norm: expected 0, 1 or 2");
  require(gate_mode >= 0 && gate_mode <= 3, "gate_mode: expected 0, 1, 2 or 3");
  require(scope == 0 || scope == 1, "scope: expected 0 or 1");
  require(num_threads >= 1, "num_threads: expected >= 1");
  const bool any = num_samples > 0;
  gardo::ShapeRewardsParams p;
  p.proxy = pointer<const double>(proxy, any, "proxy");
  p.aux = pointer<const double>(aux, any && num_aux > 0, "aux");
  p.groups = pointer<const std::int64_t>(group_ids, any, "group_ids");
  p.distance = pointer<const double>(distance, false, "distance");
  p.num_samples = num_samples;
  p.num_aux = num_aux;
  p.fraction = fraction;
  p.advantage_norm = static_cast<gardo::AdvantageNorm>(advantage_norm);
  p.gate_mode = static_cast<gardo::GateMode>(gate_mode);
  p.scope = static_cast<gardo::RankScope>(scope);
  p.num_threads = num_threads;
  p.advantage = pointer<double>(advantage, any, "advantage");
  p.uncertainty = pointer<double>(uncertainty, any, "uncertainty");
  p.gate = pointer<std::uint8_t>(gate, any, "gate");
  p.threshold = pointer<double>(threshold, true, "threshold");
  p.mean_uncertainty = pointer<double>(mean_uncertainty, true, "mean_uncertainty");
  py::gil_scoped_release released;
  gardo::shape_rewards_cpu(p);
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
  m.def("shape_rewards", &shape_rewards, py::kw_only(), py::arg("proxy"), py::arg("aux"),
        py::arg("group_ids"), py::arg("distance"), py::arg("num_samples"), py::arg("num_aux"),
        py::arg("fraction"), py::arg("advantage_norm"), py::arg("gate_mode"), py::arg("scope"),
        py::arg("num_threads"), py::arg("advantage"), py::arg("uncertainty"), py::arg("gate"),
        py::arg("threshold"), py::arg("mean_uncertainty"));
}
