// Rounds activations to 16 bits, for layers that multiply int8 weights by both of their bytes.
//
// An activation is x = scale (256 high + low), two signed bytes, so that a row's rounding error is
// 1/65024 of its largest value. The packed weights are those of linear_int8.h, weight + 128; the
// exact sums of both bytes are added once, at the end.
#pragma once
#include "linear_output.h"
#include "quantize.h"
#include "simd_int8.h"

namespace REEF_ISA {

constexpr float kLargestWide = 127 * 256;  // of 256 high + low
constexpr float kTooSmallWide = 1e-32f;    // counts as zero, lest kLargestWide / x overflow

// Locates the rounded rows in ReefLinearArgs::scratch.
struct WideRows {
    uint8_t* bytes;   // in the order that a kernel reads
    int64_t stride;   // bytes of a row's high or low bytes, zeros behind the inputs
    float* scales;    // [row]
    int32_t* totals;  // [row][high, low]: of all inputs

    explicit WideRows(const ReefLinearArgs& args) {
        const reef::WideLayout layout(args.linear->in_features, args.rows);
        bytes = static_cast<uint8_t*>(args.scratch);
        stride = layout.stride;
        scales = reinterpret_cast<float*>(bytes + layout.scales);
        totals = reinterpret_cast<int32_t*>(bytes + layout.totals);
    }
};

// Splits sixteen whole numbers into high and low bytes, and adds these up.
inline void split_bytes(F16 values, int8_t (&bytes)[2][16], int32_t* totals) {
    int32_t whole[16];
    store_int32(whole, values);
    for (int i = 0; i < 16; ++i) {
        const int32_t high = (whole[i] + 128) >> 8, low = whole[i] - high * 256;
        bytes[0][i] = static_cast<int8_t>(high);
        bytes[1][i] = static_cast<int8_t>(low);
        totals[0] += high;
        totals[1] += low;
    }
}

// Rounds a row to `words` words, fours of inputs, of high and of low bytes; word k of them is
// written to place(k, 0) and place(k, 1).
template <class Place>
void round_wide_row(const ReefLinearArgs& args, const WideRows& out, int row, int words,
                    Place place) {
    const int in_features = args.linear->in_features;
    const bf16* x = args.x + row * args.x_stride;
    const float most = largest_of(x, in_features);
    const bool is_zero = !(most >= kTooSmallWide);  // or NaN
    const F16 inverse = set1(is_zero ? 0.f : kLargestWide / most);
    int32_t* totals = out.totals + 2 * row;
    out.scales[row] = is_zero ? most * 0.f : most / kLargestWide;
    totals[0] = totals[1] = 0;
    for (int k = 0; k < words; k += 4) {
        int8_t bytes[2][16] = {};
        if (!is_zero) split_bytes(round(load_row(x, 4 * k, in_features) * inverse), bytes, totals);
        for (int i = 0; i < 4 && k + i < words; ++i)
            for (int byte = 0; byte < 2; ++byte)
                std::memcpy(place(k + i, byte), bytes[byte] + 4 * i, 4);
    }
}

// Writes sixteen outputs of a row, given the sums of its high and low bytes.
inline void put_wide(const ReefLinearArgs& args, const WideRows& x, int row, int output, I16 high,
                     I16 low) {
    const ReefLinear& linear = *args.linear;
    const F16 upper = to_float(minus(high, 128 * x.totals[2 * row]));
    const F16 lower = to_float(minus(low, 128 * x.totals[2 * row + 1]));
    const auto* scales = static_cast<const float*>(linear.scales);
    const F16 value = fma(upper, set1(256.f), lower) * some_of(scales, output, linear.out_features);
    put(args, row, output, fma(value, set1(x.scales[row]), bias_of(linear, output)));
}

}  // namespace REEF_ISA
