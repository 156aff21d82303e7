// Cuts calls of 4-bit linear layers into chunks, in the order of memory.
#pragma once
#include "linear.h"

namespace REEF_ISA {
namespace fourbit {

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Cuts a call into chunks: a block of rows, of nearly equal height, times a group of panels. A row
// takes `speed` hundredths of a nanosecond for each input of a panel.
struct Cut {
    int panels, blocks, panels_per_chunk, chunks;

    Cut(const ReefLinearArgs& args, int block_rows, int64_t speed)
        : panels(reef::panels_of(*args.linear)), blocks(ceil_div(args.rows, block_rows)) {
        // nanoseconds of one thread for a panel and a block: reading or multiplying, whichever is
        // longer
        const int64_t inputs = args.linear->in_features, rows = ceil_div(args.rows, blocks);
        const int64_t cost = 1 + inputs * (66 > speed * rows ? 66 : speed * rows) / 100;
        const int64_t share = cost * panels * blocks / 64;
        const int64_t wanted = share < 2500 ? 2500 : share > 20000 ? 20000 : share;
        panels_per_chunk = wanted / cost < panels ? static_cast<int>(wanted / cost) : panels;
        if (panels_per_chunk < 1) panels_per_chunk = 1;
        chunks = ceil_div(panels, panels_per_chunk) * blocks;
    }
};

// Returns the place, in the order of memory, that a chunk works on. The pool hands out chunks from
// the last to the first, about every N-th to each of N threads. Places are numbered so that each
// thread reads one of N regions from beginning to end, which the hardware prefetches; if threads
// read neighbouring places in turn, memory delivers half as much.
template <int kRegions>
int place_of(int chunk, int chunks) {
    const int turn = chunks - 1 - chunk, region = turn % kRegions;
    const int size = chunks / kRegions, longer = chunks % kRegions;
    return region * size + (region < longer ? region : longer) + turn / kRegions;
}

template <class Kernel, int kRegions>
void run_chunk(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const Cut cut = Kernel::cut(args);
    const int place = place_of<kRegions>(chunk, cut.chunks), parts = cut.chunks / cut.blocks;
    const int block = place / parts, panel = place % parts * cut.panels_per_chunk;
    const int first = static_cast<int>(int64_t{args.rows} * block / cut.blocks);
    const int last = static_cast<int>(int64_t{args.rows} * (block + 1) / cut.blocks);
    const int end = panel + cut.panels_per_chunk;
    Kernel::run(args, first, last - first, panel, end < cut.panels ? end : cut.panels);
}

template <class Kernel>
reef::Task task_of(const ReefLinearArgs* args, int threads) {
    const int chunks = Kernel::cut(*args).chunks;
    if (threads >= 16) return {run_chunk<Kernel, 16>, args, chunks};
    if (threads >= 8) return {run_chunk<Kernel, 8>, args, chunks};
    if (threads >= 4) return {run_chunk<Kernel, 4>, args, chunks};
    if (threads == 3) return {run_chunk<Kernel, 3>, args, chunks};
    if (threads == 2) return {run_chunk<Kernel, 2>, args, chunks};
    return {run_chunk<Kernel, 1>, args, chunks};
}

}  // namespace fourbit
}  // namespace REEF_ISA
