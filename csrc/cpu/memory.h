// Memory that was allocated but not touched yet.
#pragma once

#include <cstddef>

namespace rd::cpu {

// Asks for huge pages behind [start, start + bytes), whose contents may be anything. With 4 KiB pages the
// page faults of a fresh gradient cost twice its arithmetic. Only advice: nothing happens where it cannot be
// had, nor below the size from which malloc always takes fresh memory.
void prefer_huge_pages(void* start, std::size_t bytes);

}  // namespace rd::cpu
