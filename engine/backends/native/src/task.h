// Defines Task: a kernel's work, cut into chunks that may run in any order and on any thread.
#pragma once
#include <cstdint>

namespace reef {

// `run(args, chunk)` does chunk number `chunk` of [0, chunks). No two chunks write the same
// byte, and a chunk's result depends neither on the thread nor on the other chunks.
struct Task {
    void (*run)(const void* args, int chunk);
    const void* args;  // lives until the pool has run all chunks
    int chunks;
    // Delays the chunks until the later tasks of the call have ended; the first task only may wait.
    bool waits = false;
};

}  // namespace reef
