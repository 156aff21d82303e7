// Runs chunks of work on several threads. The caller waits for chunks, never for threads.
//
// A barrier makes all threads wait for one that the kernel has descheduled, a whole time slice each
// time. Here the caller works too and can finish a job alone: it only ever waits for chunks that
// other threads have begun.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "task.h"

namespace reef {

class Pool {
public:
    // Starts the workers. `threads` counts the caller: a pool of one runs all chunks in the caller.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return 1 + static_cast<int>(workers_.size()); }

    // Runs every chunk of every task, from the last to the first. Tasks of one call must not depend
    // on each other, except one that waits. The caller must make one call at a time.
    void run(const Task* tasks, int num_tasks);
    void run(const Task& task) { run(&task, 1); }

private:
    void serve();
    void take_chunks(uint32_t job);
    void run_chunk(uint32_t index) const;
    void wait_for_later_tasks(uint32_t index) const;
    void begin(uint32_t job, uint32_t chunks);
    uint32_t wait_for_job(uint32_t last);

    std::vector<std::thread> workers_;
    const Task* tasks_ = nullptr;
    uint32_t num_tasks_ = 0;
    // (job << 32) | chunks not yet taken. One word, so that a late worker can never take a chunk
    // of a job other than the one it woke for.
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<uint32_t> unfinished_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace reef
