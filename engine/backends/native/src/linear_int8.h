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
        return of_exact(x, row, sum + set1(-128 * x.totals[row]));
    }
    F16 of_exact(const QuantizedRows& x, int row, I16 sum) const {  // of the sums of w q
        return fma(to_float(sum) * scales, set1(x.scales[row]), bias);
    }
};

// Writes `count` rows of a panel, given [row][32 outputs] sums of (w + 128) q.
inline void put_panel(const ReefLinearArgs& args, const QuantizedRows& x, int row, int count,
                      int panel, const int32_t* sums) {
    for (int half = 0; half < kPanel; half += 16) {
        const int output = panel * kPanel + half;
        if (output >= args.linear->out_features) return;
        const Int8Outputs outputs(args, output);
        for (int r = 0; r < count; ++r)
            put(args, row + r, output, outputs.of(x, row + r, load(sums + r * kPanel + half)));
    }
}

}  // namespace REEF_ISA
