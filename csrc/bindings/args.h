// What the bindings of the ops share: keyword arguments, and the list of what to define.
//
// All arguments are keywords. Latents are (address, dtype), row scalars (address, stride), other
// arrays a plain address; address 0 means not given. The `native` modules of the ops check shapes
// and dtypes and are the only callers. Every function releases the GIL.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "latents.h"

namespace gardo {
namespace bindings {

namespace py = pybind11;
using std::int64_t;

// Each op's file defines its functions by one of these; module.cpp calls them all.
using Define = void (*)(py::module_&);
inline std::vector<Define>& definitions() {
  static std::vector<Define> all;
  return all;
}
inline bool add(Define define) {
  definitions().push_back(define);
  return true;
}

[[noreturn]] inline void refuse(const std::string& name, const std::string& problem) {
  throw std::invalid_argument(name + ": " + problem);
}

// The Python string of a literal, made once: a call looks up to 25 names.
inline PyObject* interned(const char* literal) {
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

  ConstLatents input(const char* name, bool needed) const {
    const auto [address, dtype] = tensor(name);
    return {at<const void>(name, address, needed), dtype};
  }

  Latents output(const char* name, bool needed) const {
    const auto [address, dtype] = tensor(name);
    return {at<void>(name, address, needed), dtype};
  }

  RowScalar scalar(const char* name, bool needed) const {
    const auto [address, stride] = value<std::pair<std::uintptr_t, int64_t>>(name);
    if (stride < 0) refuse(name, "negative stride");
    return {at<const float>(name, address, needed), stride};
  }

  // The numbers of a list of row scalars, in its order.
  template <std::size_t kCount>
  std::array<RowScalar, kCount> scalars(const char* name, bool needed) const {
    using Given = std::vector<std::pair<std::uintptr_t, int64_t>>;
    const auto given = value<Given>(name);
    if (given.size() != kCount) refuse(name, "expected " + std::to_string(kCount) + " tensors");
    std::array<RowScalar, kCount> all;
    for (std::size_t i = 0; i < kCount; ++i) {
      if (given[i].second < 0) refuse(name, "negative stride");
      all[i] = {at<const float>(name, given[i].first, needed), given[i].second};
    }
    return all;
  }

  int threads() const {
    const int threads = value<int>("num_threads");
    if (threads < 1) refuse("num_threads", "expected >= 1");
    return threads;
  }

  Extent extent() const {
    const auto rows = value<int64_t>("rows"), row_size = value<int64_t>("row_size");
    if (rows < 0) refuse("rows", "expected >= 0");
    if (row_size < 1 && rows > 0) refuse("row_size", "expected >= 1");
    if (row_size > 0 && rows > INT64_MAX / row_size) refuse("rows", "too many for row_size");
    return {rows, row_size, threads()};
  }

  Velocity velocity(bool needed) const {
    return {input("velocity", needed), input("velocity_uncond", false),
            value<float>("guidance_scale")};
  }

 private:
  template <typename T>
  static T* at(const char* name, std::uintptr_t address, bool needed) {
    if (needed && address == 0) refuse(name, "null address");
    return reinterpret_cast<T*>(address);
  }

  std::pair<std::uintptr_t, DType> tensor(const char* name) const {
    const auto [address, code] = value<std::pair<std::uintptr_t, int>>(name);
    if (code < 0 || code > 2) refuse(name, "unknown dtype code " + std::to_string(code));
    return {address, static_cast<DType>(code)};
  }

  const py::kwargs& kwargs_;
};

}  // namespace bindings
}  // namespace gardo
