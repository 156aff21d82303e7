// Defines ReefContext, the handle that a caller of the C ABI holds.
#pragma once
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace avx2 { extern const reef::Kernels table; }
namespace avx512 {
extern const reef::Kernels table;
reef::Kernels with_amx(reef::Kernels table);
}  // namespace avx512

struct ReefContext {
    const reef::Kernels kernels;
    reef::Pool pool;

    ReefContext(const reef::Kernels& table, int threads) : kernels(table), pool(threads) {}

    template <class Args>
    void run(reef::Task (*kernel)(const Args*, int), const Args* args) {
        pool.run(kernel(args, pool.threads()));
    }

    void attend(const ReefAttentionArgs& args) {
        reef::AttentionCall call{args};
        const auto floats = static_cast<size_t>(kernels.attention_plan(&call, pool.threads()));
        if (floats == 0) return run(kernels.attention, &call);
        if (records_.size() < floats) records_.resize(floats);
        call.records = records_.data();
        reef::Task tasks[] = {kernels.attention_merge(&call, pool.threads()),
                              kernels.attention(&call, pool.threads())};
        tasks[0].waits = true;
        pool.run(tasks, 2);
    }

private:
    std::vector<float> records_;
};
