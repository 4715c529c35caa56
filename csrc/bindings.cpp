// What Python sees: addresses, sizes and strides of tensors that the caller keeps alive. No torch here, so
// one build serves every version of it. The caller checks shapes and dtypes; an address of 0 stands for None.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/types.h"
#include "cpu/dispatch.h"
#include "cpu/groups.h"
#include "cpu/memory.h"
#include "cpu/rows.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

rd::DType dtype_named(const std::string& name) {
  if (name == "float32") return rd::DType::kFloat32;
  if (name == "bfloat16") return rd::DType::kBFloat16;
  throw std::invalid_argument("dtype must be 'float32' or 'bfloat16', got '" + name + "'");
}

rd::cpu::Objective objective_named(const std::string& name) {
  if (name == "erm") return rd::cpu::Objective::kErm;
  if (name == "group_dro") return rd::cpu::Objective::kGroupDro;
  if (name == "group_dro_hold") return rd::cpu::Objective::kGroupDroHold;
  throw std::invalid_argument("objective must be 'erm', 'group_dro' or 'group_dro_hold', got '" + name + "'");
}

rd::Rows rows(Address logits, const std::string& dtype, int64_t count, int64_t vocabulary, int64_t stride,
              Address labels, int64_t ignore_index) {
  return {at<void>(logits), dtype_named(dtype), count, vocabulary, stride, at<int64_t>(labels), ignore_index};
}

rd::Target target(Address class_weight, double smoothing) { return {at<float>(class_weight), 0, smoothing}; }

// Both of its rows, [2, N]; `stride` elements lie between them.
rd::Normaliser normaliser(Address address, int64_t stride) {
  return {at<float>(address), at<float>(address) + stride};
}

rd::RowResults row_results(Address loss, const rd::Normaliser& normaliser, Address outcome) {
  return {at<float>(loss), normaliser, at<uint8_t>(outcome)};
}

rd::RowGradient row_gradient(Address grad_out, int64_t grad_out_stride, Address row_scale,
                             const rd::Normaliser& normaliser, Address out, int64_t out_stride, bool stream) {
  return {at<float>(grad_out), grad_out_stride, at<float>(row_scale), normaliser, at<void>(out),
          out_stride,          stream};
}

rd::Groups groups(Address ids, Address mask, int64_t count) {
  return {at<int64_t>(ids), at<bool>(mask), count};
}

rd::cpu::Statistics statistics(Address stats, Address status) {
  return {at<float>(stats), at<int64_t>(status)};
}

rd::cpu::Update update(const std::string& objective, double step_size, Address adjustment, Address q) {
  return {objective_named(objective), step_size, at<float>(adjustment), at<float>(q)};
}

void group_reduce(Address row_loss, Address outcome, int64_t count, const rd::Groups& groups,
                  const rd::cpu::Statistics& statistics) {
  rd::cpu::group_reduce(at<float>(row_loss), at<uint8_t>(outcome), count, groups, statistics);
}

void group_update(const rd::cpu::Statistics& statistics, int64_t num_groups, const rd::cpu::Update& update,
                  Address loss, Address coefficients) {
  rd::cpu::group_update(statistics, num_groups, update, at<float>(loss), at<float>(coefficients));
}

void row_scale(Address coefficients, Address outcome, int64_t count, const rd::Groups& groups,
               Address scale) {
  rd::cpu::row_scale(at<float>(coefficients), at<uint8_t>(outcome), count, groups, at<float>(scale));
}

void grouped_forward(const rd::Rows& rows, const rd::Groups& groups, const rd::cpu::Update& update,
                     const rd::cpu::Statistics& statistics, Address loss, Address scale,
                     const rd::Normaliser& normaliser, int threads) {
  rd::cpu::grouped_forward(rows, groups, update, statistics, at<float>(loss), at<float>(scale), normaliser,
                           threads);
}

py::buffer_info bytes_of(const rd::cpu::Block& block) {
  return py::buffer_info(static_cast<uint8_t*>(block.data()), static_cast<py::ssize_t>(block.bytes()));
}

// The vector exponential of the kernels, for measuring its error: x <= 0 or NaN.
void exponentials(Address x, Address out, int64_t count) {
  rd::cpu::kernels().exp(at<float>(x), at<float>(out), count);
}

std::string isa() { return rd::cpu::kernels().isa; }

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  py::module_ cpu = m.def_submodule("cpu");
  py::class_<rd::Rows>(cpu, "Rows").def(py::init(&rows));
  py::class_<rd::Target>(cpu, "Target").def(py::init(&target));
  py::class_<rd::Normaliser>(cpu, "Normaliser").def(py::init(&normaliser));
  py::class_<rd::RowResults>(cpu, "RowResults").def(py::init(&row_results));
  py::class_<rd::RowGradient>(cpu, "RowGradient").def(py::init(&row_gradient));
  py::class_<rd::Groups>(cpu, "Groups").def(py::init(&groups));
  py::class_<rd::cpu::Statistics>(cpu, "Statistics").def(py::init(&statistics));
  py::class_<rd::cpu::Update>(cpu, "Update").def(py::init(&update));
  // The memory of a tensor: a buffer, so that the tensor made of it keeps it alive.
  py::class_<rd::cpu::Block>(cpu, "Block", py::buffer_protocol())
      .def(py::init<std::size_t>())
      .def_property_readonly("fresh", &rd::cpu::Block::fresh)
      .def_buffer(&bytes_of);

  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  cpu.def("row_forward", &rd::cpu::row_forward, without_gil);
  cpu.def("row_backward", &rd::cpu::row_backward, without_gil);
  cpu.def("softmax_minus_onehot", &rd::cpu::softmax_minus_onehot, without_gil);
  cpu.def("group_reduce", &group_reduce, without_gil);
  cpu.def("group_update", &group_update, without_gil);
  cpu.def("row_scale", &row_scale, without_gil);
  cpu.def("grouped_forward", &grouped_forward, without_gil);
  cpu.def("cached_bytes", &rd::cpu::cached_bytes);
  cpu.def("empty_cache", &rd::cpu::empty_cache);
  cpu.def("set_cache_limit", &rd::cpu::set_cache_limit);
  cpu.def("exp", &exponentials, without_gil);
  cpu.def("isa", &isa);
  cpu.def("usable_isas", &rd::cpu::usable_isas);
  cpu.def("set_isa", &rd::cpu::set_isa);
  cpu.def("has_openmp", &has_openmp);
}
