// The module rd_kernels._cuda: the CUDA kernels as Python functions. Importing it needs no driver and no GPU.
#include "common/bindings.h"

#include "cuda/launch.h"

namespace py = pybind11;

namespace {

using namespace rd;
using namespace rd::cuda;

void group_reduce_at(const Queue& queue, Address row_loss, Address outcome, int64_t rows,
                     const Groups& groups, const Statistics& statistics, const Scratch& scratch) {
  group_reduce(queue, at<float>(row_loss), at<uint8_t>(outcome), rows, groups, statistics, scratch);
}

void group_update_at(const Queue& queue, const Statistics& statistics, int64_t num_groups,
                     const Update& update, Address loss, Address coefficients) {
  group_update(queue, statistics, num_groups, update, at<float>(loss), at<float>(coefficients));
}

void row_scale_at(const Queue& queue, Address coefficients, Address outcome, int64_t rows,
                  const Groups& groups, Address scale) {
  row_scale(queue, at<float>(coefficients), at<uint8_t>(outcome), rows, groups, at<float>(scale));
}

void pack_mask_at(const Queue& queue, Address mask, int64_t rows, int64_t num_groups, Address bits) {
  pack_mask(queue, at<bool>(mask), rows, num_groups, at<uint32_t>(bits));
}

void grouped_forward_at(const Queue& queue, const Rows& rows, const RowResults& results, const Groups& groups,
                        const Update& update, const Statistics& statistics, Address loss,
                        Address coefficients, const Scratch& scratch) {
  grouped_forward(queue, rows, results, groups, update, statistics, at<float>(loss), at<float>(coefficients),
                  scratch);
}

void scale_rows_at(const Queue& queue, const Matrix& x, Address scale, const Matrix& out) {
  scale_rows(queue, x, at<float>(scale), out);
}

void compact_at(const Queue& queue, Address labels, int64_t rows, int64_t ignore_index, int64_t capacity,
                Address index, Address position, Address count) {
  compact(queue, at<int64_t>(labels), rows, ignore_index, capacity, at<int64_t>(index), at<int64_t>(position),
          at<int64_t>(count));
}

void gather_rows_at(const Queue& queue, const Matrix& x, Address index, const Matrix& out) {
  gather_rows(queue, x, at<int64_t>(index), out);
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  bind_arguments(m, /*has_float16=*/true);
  py::class_<Queue>(m, "Queue", py::module_local()).def(py::init([](int device, Address stream) {
    return Queue{device, at<void>(stream)};
  }));
  py::class_<Weighting>(m, "Weighting", py::module_local())
      .def(py::init([](Address class_weight, Address weight_sum, float smoothing) {
        return Weighting{at<float>(class_weight), at<float>(weight_sum), smoothing};
      }));
  py::class_<Scratch>(m, "Scratch", py::module_local())
      .def(py::init([](Address partials, Address bad, Address counters) {
        return Scratch{at<float>(partials), at<uint32_t>(bad), at<uint32_t>(counters)};
      }));
  py::class_<Matrix>(m, "Matrix", py::module_local())
      .def(py::init([](Address data, const std::string& dtype, int64_t rows, int64_t width, int64_t stride) {
        return Matrix{at<void>(data), dtype_named(dtype, true), rows, width, stride};
      }));

  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  m.def("row_forward", &row_forward, without_gil);
  m.def("row_backward", &row_backward, without_gil);
  m.def("softmax_minus_onehot", &softmax_minus_onehot, without_gil);
  m.def("group_reduce", &group_reduce_at, without_gil);
  m.def("group_update", &group_update_at, without_gil);
  m.def("row_scale", &row_scale_at, without_gil);
  m.def("pack_mask", &pack_mask_at, without_gil);
  m.def("grouped_forward", &grouped_forward_at, without_gil);
  m.def("scale_rows", &scale_rows_at, without_gil);
  m.def("compact", &compact_at, without_gil);
  m.def("gather_rows", &gather_rows_at, without_gil);
  m.def("missing", &missing);
  m.def("set_programmatic_launch", &set_programmatic_launch);
  m.attr("chunk_rows") = kChunkRows;
  m.attr("device_type") = device_type();
}
