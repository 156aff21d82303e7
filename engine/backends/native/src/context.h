// Defines ReefContext, the handle that a caller of the C ABI holds.
#pragma once
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
};
