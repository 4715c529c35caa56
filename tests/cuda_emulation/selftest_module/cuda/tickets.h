#pragma once

// In which order the threads come by, one number each; `order`: [blocks * threads].
void draw_tickets(unsigned* counter, unsigned* order, unsigned blocks, unsigned threads);
int attribute(int which);
