// The module rd_kernels._native: the CPU kernels as Python functions.
#include "common/bindings.h"

#include "cpu/dispatch.h"
#include "cpu/groups.h"
#include "cpu/memory.h"
#include "cpu/rows.h"
#include "cpu/rules.h"

namespace py = pybind11;

namespace {

using rd::Address;
using rd::at;

rd::Target target(Address class_weight, double smoothing) { return {at<float>(class_weight), 0, smoothing}; }

void group_reduce(Address row_loss, Address outcome, int64_t count, const rd::Groups& groups,
                  const rd::Statistics& statistics) {
  rd::cpu::group_reduce(at<float>(row_loss), at<uint8_t>(outcome), count, groups, statistics);
}

void group_update(const rd::Statistics& statistics, int64_t num_groups, const rd::Update& update,
                  Address loss, Address coefficients) {
  rd::cpu::group_update(statistics, num_groups, update, at<float>(loss), at<float>(coefficients));
}

void row_scale(Address coefficients, Address outcome, int64_t count, const rd::Groups& groups,
               Address scale) {
  rd::cpu::row_scale(at<float>(coefficients), at<uint8_t>(outcome), count, groups, at<float>(scale));
}

void pack_mask(Address mask, int64_t rows, int64_t num_groups, Address words) {
  rd::cpu::pack_mask(at<uint8_t>(mask), rows, num_groups, at<uint32_t>(words));
}

void grouped_forward(const rd::Rows& rows, const rd::Groups& groups, const rd::Update& update,
                     const rd::Statistics& statistics, Address loss, Address scale,
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
  rd::bind_arguments(cpu, /*has_float16=*/false);
  py::class_<rd::Target>(cpu, "Target", py::module_local()).def(py::init(&target));
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
  cpu.def("pack_mask", &pack_mask, without_gil);
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
