// Writes a linear kernel's results, for every format of weights.
#pragma once
#include "linear.h"
#include "simd.h"

namespace REEF_ISA {

// Writes sixteen outputs of a row, or as many of them as the layer has.
inline void put(const ReefLinearArgs& args, int row, int output, F16 value) {
    const int left = args.linear->out_features - output;
    const int64_t at = row * args.y_stride + output;
    if (args.y_is_float) {
        float* y = static_cast<float*>(args.y) + at;
        left >= 16 ? store(y, value) : store(y, value, left);
    } else {
        bf16* y = static_cast<bf16*>(args.y) + at;
        left >= 16 ? store(y, value) : store(y, value, left);
    }
}

inline F16 some_of(const float* values, int output, int out_features) {
    const int left = out_features - output;
    return left >= 16 ? load(values + output) : load(values + output, left);
}

inline F16 bias_of(const ReefLinear& linear, int output) {
    return linear.bias ? some_of(linear.bias, output, linear.out_features) : zero();
}

}  // namespace REEF_ISA
