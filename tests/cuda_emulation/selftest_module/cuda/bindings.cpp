#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "tickets.h"

PYBIND11_MODULE(_cuda, m) {
  m.def("tickets", [](unsigned blocks, unsigned threads) {
    unsigned counter = 0;
    std::vector<unsigned> order(blocks * threads);
    draw_tickets(&counter, order.data(), blocks, threads);
    return order;
  });
  m.def("attribute", &attribute);
}
