// Finds the first of the largest logits of each row, as fast as memory delivers them.
#include <algorithm>
#include <limits>

#include "simd.h"
#include "table.h"

namespace REEF_ISA {
namespace {

constexpr int kBlock = 1024;  // logits; the index is searched for in the best block only

struct Scan {
    F16 largest = set1(-std::numeric_limits<float>::infinity());
    F16 nan = zero();  // NaN in the lanes that have seen one, zero in the others

    void add(F16 v) {
        const F16 finite_or_nan = min(set1(std::numeric_limits<float>::max()), abs(v));
        nan = fma(finite_or_nan, zero(), nan);
        largest = max(v, largest);  // max returns its second operand where one is NaN
    }
};

// Returns the largest of n logits, and makes lanes of `nan` NaN where a logit is, as Scan::nan.
float block_largest(const float* logits, int n, F16& nan) {
    Scan scans[4];
    int i = 0;
    for (; i + 64 <= n; i += 64)
        for (int j = 0; j < 4; ++j) scans[j].add(load(logits + i + 16 * j));
    float result = -std::numeric_limits<float>::infinity();
    for (; i < n; ++i) {
        nan = fma(set1(std::isnan(logits[i]) ? logits[i] : 0.f), zero(), nan);
        result = logits[i] > result ? logits[i] : result;
    }
    nan = nan + ((scans[0].nan + scans[1].nan) + (scans[2].nan + scans[3].nan));
    const F16 both =
        max(max(scans[0].largest, scans[1].largest), max(scans[2].largest, scans[3].largest));
    return std::max(result, largest(both));
}

void greedy_row(const void* args, int row) {
    const auto& a = *static_cast<const ReefGreedyArgs*>(args);
    const float* logits = a.logits + row * a.logits_stride;
    float best = -std::numeric_limits<float>::infinity();
    int best_block = 0;
    F16 nan = zero();
    for (int start = 0; start < a.vocab; start += kBlock) {
        const float here = block_largest(logits + start, std::min(kBlock, a.vocab - start), nan);
        if (here > best) {
            best = here;
            best_block = start;
        }
    }
    const float* end = logits + std::min(a.vocab, best_block + kBlock);
    const float* found = std::find(logits + best_block, end, best);
    a.token_ids[row] = found == end ? best_block : static_cast<int32_t>(found - logits);
    a.highest[row] = best + sum(nan);
}

}  // namespace

reef::Task greedy(const ReefGreedyArgs* args, int) { return {greedy_row, args, args->rows}; }

}  // namespace REEF_ISA
