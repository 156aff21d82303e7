// Multiplies int8 weights by int8 activations, exactly, in int32; scales are per output and row.
//
// Activations are quantized first, row by row (QuantizedRows). The packed weights are unsigned,
// weight + 128, because the processor multiplies unsigned by signed bytes:
//     sum_k w q = sum_k (w + 128) q - 128 sum_k q.
// Sums of integers are exact, so that every instruction set may add them in its own order.
#pragma once
#include "linear_output.h"
#include "quantize.h"

namespace REEF_ISA {

// Computes sixteen outputs of a row, from the sums of (w + 128) q.
struct Int8Outputs {
    F16 scales, bias;

    Int8Outputs(const ReefLinearArgs& args, int output)
        : scales(some_of(static_cast<const float*>(args.linear->scales), output,
                         args.linear->out_features)),
          bias(bias_of(*args.linear, output)) {}

    F16 of(const QuantizedRows& x, int row, I16 sum) const {
        const I16 exact = sum + set1(-128 * x.totals[row]);
        return fma(to_float(exact) * scales, set1(x.scales[row]), bias);
    }
};

}  // namespace REEF_ISA
