// What Python sees of the arguments that the CPU and the CUDA kernels share: addresses, sizes and strides of
// tensors that the caller keeps alive. No torch here, so one build serves every version of it. The caller
// checks shapes and dtypes; an address of 0 stands for None.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/types.h"

namespace rd {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype_named(const std::string& name, bool has_float16) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (has_float16 && name == "float16") return DType::kFloat16;
  throw std::invalid_argument(std::string("dtype must be 'float32'") +
                              (has_float16 ? ", 'bfloat16' or 'float16'" : " or 'bfloat16'") + ", got '" +
                              name + "'");
}

inline Objective objective_named(const std::string& name) {
  if (name == "erm") return Objective::kErm;
  if (name == "group_dro") return Objective::kGroupDro;
  if (name == "group_dro_hold") return Objective::kGroupDroHold;
  if (name == "tilted_rows") return Objective::kTiltedRows;
  if (name == "tilted_groups") return Objective::kTiltedGroups;
  if (name == "worst_group") return Objective::kWorstGroup;
  throw std::invalid_argument("no rule named '" + name + "'");
}

// Each module has its own classes: neither needs the other.
inline void bind_arguments(pybind11::module_& m, bool has_float16) {
  namespace py = pybind11;
  py::class_<Rows>(m, "Rows", py::module_local())
      .def(py::init([has_float16](Address logits, const std::string& dtype, int64_t count, int64_t vocabulary,
                                  int64_t stride, Address labels, int64_t ignore_index) {
        return Rows{
            at<void>(logits), dtype_named(dtype, has_float16), count, vocabulary, stride, at<int64_t>(labels),
            ignore_index};
      }));
  // Both of its rows, [2, N]; `stride` elements lie between them.
  py::class_<Normaliser>(m, "Normaliser", py::module_local())
      .def(py::init([](Address address, int64_t stride) {
        return Normaliser{at<float>(address), at<float>(address) + stride};
      }));
  // Both of its rows, [2, N], or an address of 0 for none.
  py::class_<Details>(m, "Details", py::module_local()).def(py::init([](Address address, int64_t stride) {
    return address == 0 ? Details{nullptr, nullptr}
                        : Details{at<float>(address), at<float>(address) + stride};
  }));
  py::class_<RowResults>(m, "RowResults", py::module_local())
      .def(py::init([](Address loss, const Normaliser& normaliser, Address outcome, const Details& details) {
        return RowResults{at<float>(loss), normaliser, at<uint8_t>(outcome), details};
      }));
  py::class_<RowGradient>(m, "RowGradient", py::module_local())
      .def(py::init([](Address grad_out, int64_t grad_out_stride, Address row_scale,
                       const Normaliser& normaliser, Address out, int64_t out_stride, bool stream) {
        return RowGradient{
            at<float>(grad_out), grad_out_stride, at<float>(row_scale), normaliser, at<void>(out),
            out_stride,          stream};
      }));
  py::class_<Groups>(m, "Groups", py::module_local())
      .def(py::init([](Address lists, Address bits, int64_t width, int64_t count) {
        return Groups{at<int64_t>(lists), at<uint32_t>(bits), width, count};
      }));
  py::class_<Statistics>(m, "Statistics", py::module_local()).def(py::init([](Address stats, Address status) {
    return Statistics{at<float>(stats), at<int64_t>(status)};
  }));
  py::class_<Update>(m, "Update", py::module_local())
      .def(py::init([](const std::string& objective, double rate, Address adjustment, Address q) {
        return Update{objective_named(objective), rate, at<float>(adjustment), at<float>(q)};
      }));
}

}  // namespace rd
