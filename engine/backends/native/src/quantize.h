// Rounds activations to int8, for layers that multiply integers.
#pragma once
#include "linear_layout.h"
#include "simd.h"
#include "task.h"

namespace REEF_ISA {

constexpr float kTooSmall = 1e-35f;  // smaller x count as zeros, lest 127 / x overflow

// Loads sixteen values from `k` on, with zeros behind the end at `count`.
inline F16 load_row(const bf16* x, int k, int count) {
    const int left = count - k;
    return left >= 16 ? load(x + k) : left > 0 ? load(x + k, left) : zero();
}

// Returns max |x|, or NaN where an x is infinite or NaN, since 0 * x is NaN then.
inline float largest_of(const bf16* x, int count) {
    F16 most = zero(), poison = zero();
    for (int k = 0; k < count; k += 16) {
        const F16 value = load_row(x, k, count);
        most = max(most, abs(value));
        poison = fma(value, zero(), poison);
    }
    return largest(most) + sum(poison);
}

// Locates in ReefLinearArgs::scratch what an int8 layer multiplies:
//     q       int8 [rows, stride], zeros behind the inputs
//     scales  float [rows]: x = q * scale, scale = max |x| / 127
//     totals  int32 [rows]: the sum of all q of a row
struct QuantizedRows {
    int8_t* q;
    int64_t stride;
    float* scales;
    int32_t* totals;
};
QuantizedRows quantized_rows(const ReefLinearArgs& args);
void quantize_row(const ReefLinearArgs& args, const QuantizedRows& out, int row);
reef::Task quantize_rows(const ReefLinearArgs* args);

// Locates what a 4-bit layer with int8 activations multiplies. A scale per group of the weight
// keeps a few large activations from coarsening all others of the row.
//     q       int8 [rows, stride], in the order of the weight's columns
//     scales  float [groups, rows]: x = q * scale, scale = max |x| of the group / 127
//     sums    int32 [groups, rows]: of the q of a group
struct QuantizedGroups {
    int8_t* q;
    int64_t stride, groups;
    float* scales;
    int32_t* sums;
};
QuantizedGroups quantized_groups(const ReefLinearArgs& args);
reef::Task quantize_groups(const ReefLinearArgs* args);

}  // namespace REEF_ISA
