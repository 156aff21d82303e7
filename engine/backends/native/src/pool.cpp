#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace reef {
namespace {

// How often a worker looks for a job before it sleeps, about a tenth of a millisecond: longer than
// the gap between two operations of a step, short enough to free the core between two steps.
constexpr int kSpins = 4000;
constexpr int kSpinsBeforeYield = 2000;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Waits until at most `at_most` chunks are unfinished; other threads are running the rest.
void wait_for_unfinished(const std::atomic<uint32_t>& unfinished, uint32_t at_most) {
    for (int spins = 0; unfinished.load(std::memory_order_acquire) > at_most; ++spins) {
        if (spins < kSpinsBeforeYield) relax();
        else std::this_thread::yield();
    }
}

inline uint32_t job_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }
inline uint32_t left_of(uint64_t ticket) { return static_cast<uint32_t>(ticket); }

}  // namespace

Pool::Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(const Task* tasks, int num_tasks) {
    uint32_t chunks = 0;
    for (int i = 0; i < num_tasks; ++i) chunks += static_cast<uint32_t>(tasks[i].chunks);
    if (chunks == 0) return;
    tasks_ = tasks;
    num_tasks_ = static_cast<uint32_t>(num_tasks);
    if (workers_.empty() || chunks == 1) {
        for (uint32_t i = chunks; i-- > 0;) run_chunk(i);
        return;
    }
    const uint32_t job = job_of(ticket_.load(std::memory_order_relaxed)) + 1;
    begin(job, chunks);
    take_chunks(job);
    wait_for_unfinished(unfinished_, 0);
}

void Pool::begin(uint32_t job, uint32_t chunks) {
    unfinished_.store(chunks, std::memory_order_relaxed);
    ticket_.store(static_cast<uint64_t>(job) << 32 | chunks, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }  // no worker is between its last look and sleep
    wake_.notify_all();
}

void Pool::take_chunks(uint32_t job) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (job_of(ticket) == job && left_of(ticket) != 0) {
        if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
        wait_for_later_tasks(left_of(ticket) - 1);
        run_chunk(left_of(ticket) - 1);
        unfinished_.fetch_sub(1, std::memory_order_acq_rel);
        ticket = ticket_.load(std::memory_order_acquire);
    }
}

// Waits for the tasks after that of chunk `index`, if that task waits. Its own chunks cannot end
// meanwhile, so the number of unfinished chunks tells when the later tasks have ended.
void Pool::wait_for_later_tasks(uint32_t index) const {
    const Task* task = tasks_;
    uint32_t end = static_cast<uint32_t>(task->chunks);
    while (index >= end) end += static_cast<uint32_t>((++task)->chunks);
    if (task->waits) wait_for_unfinished(unfinished_, end);
}

void Pool::run_chunk(uint32_t index) const {
    const Task* task = tasks_;
    while (index >= static_cast<uint32_t>(task->chunks))
        index -= static_cast<uint32_t>((task++)->chunks);
    task->run(task->args, static_cast<int>(index));
}

void Pool::serve() {
    for (uint32_t job = 0; !stop_;) {
        job = wait_for_job(job);
        take_chunks(job);
    }
}

// Returns the number of a job other than `last`, or anything once the pool stops.
uint32_t Pool::wait_for_job(uint32_t last) {
    for (int spins = 0; spins < kSpins; ++spins) {
        const uint32_t job = job_of(ticket_.load(std::memory_order_acquire));
        if (job != last || stop_.load(std::memory_order_relaxed)) return job;
        relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock,
               [&] { return stop_ || job_of(ticket_.load(std::memory_order_seq_cst)) != last; });
    sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    return job_of(ticket_.load(std::memory_order_acquire));
}

}  // namespace reef
