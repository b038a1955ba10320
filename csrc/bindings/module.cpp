// The Python face of the C++ core. It takes addresses and sizes, so that it needs no torch headers;
// the functions of an op stand in the op's file beside this one.
#include "args.h"

namespace {

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
  m.doc() = "The torch-free C++ core of gardo_kernels; use it through gardo_kernels.ops.";
  m.attr("has_openmp") = has_openmp();
  m.attr("has_cuda") = has_cuda();
  for (const auto define : gardo::bindings::definitions()) define(m);
}
