// Defines what packers, kernels and callers of linear layers share: panels and scratch.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace reef {

constexpr int kPanel = 32;  // outputs that are packed and computed together

constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

inline int panels_of(const ReefLinear& linear) {
    return (linear.out_features + kPanel - 1) / kPanel;
}

constexpr int kLargestInt8Group = 128;  // of 4-bit layers with int8 activations

// Returns the bytes between rows of quantized activations. Were it a multiple of 1 KiB, the rows
// that are multiplied together would compete for a few sets of the cache.
constexpr int64_t quantized_stride(int in_features) {
    const int64_t stride = round_up(in_features, 64);
    return stride % 1024 == 0 ? stride + 64 : stride;
}

// Computes the offsets of QuantizedRows (quantize.h) in scratch, and their end.
struct RowsLayout {
    int64_t stride, scales, totals, end;

    RowsLayout(int in_features, int64_t rows)
        : stride(quantized_stride(in_features)),
          scales(rows * stride),
          totals(scales + round_up(rows * 4, 64)),
          end(round_up(totals + rows * 4, 64)) {}
};

// Computes the offsets of WideRows (linear_int8_wide.h) in scratch, and their end.
struct WideLayout {
    int64_t stride, scales, totals, end;

    WideLayout(int in_features, int64_t rows)
        : stride(quantized_stride(in_features)),
          scales(rows * 2 * stride),
          totals(scales + rows * 4),
          end(round_up(totals + rows * 8, 64)) {}
};

constexpr int kShortGroup = 32;  // inputs that share a multiplier

// Computes the offset in scratch of what REEF_SHORT_INT8 keeps behind its QuantizedRows: int32
// [rows][groups], what the sum of a group starts with (short_int8.h).
struct ShortLayout {
    int64_t groups, starts, end;

    ShortLayout(int in_features, int64_t rows)
        : groups(in_features / kShortGroup),
          starts(RowsLayout(in_features, rows).end),
          end(starts + rows * groups * 4) {}
};

// Computes the offsets of QuantizedGroups in scratch, and their end.
struct GroupsLayout {
    int64_t stride, groups, scales, sums, end;

    GroupsLayout(const ReefLinear& linear, int64_t rows)
        : stride(quantized_stride(linear.in_features)),
          groups(linear.in_features / linear.group_size),
          scales(rows * stride),
          sums(scales + round_up(rows * groups * 4, 64)),
          end(round_up(sums + rows * groups * 4, 64)) {}
};

// Computes the offsets in scratch of what int4 prepares: x in the order of the weight's columns,
// where they are reordered, and float [rows][groups], the sums of x over each group.
struct Int4Layout {
    int64_t x = 0, sums, end;

    Int4Layout(const ReefLinear& linear, int64_t rows)
        : sums(linear.input_order ? round_up(rows * linear.in_features * 2, 64) : 0),
          end(sums + rows * (linear.in_features / linear.group_size) * 4) {}
};

// Returns the bytes of scratch of a linear layer: bf16 keeps x in tiles, int8 keeps quantized rows
// and the same rows in tiles.
inline int64_t linear_scratch_bytes(const ReefLinear& linear, int rows) {
    switch (linear.format) {
        case REEF_INT8:
            return RowsLayout(linear.in_features, rows).end +
                   rows * round_up(linear.in_features, 4);
        case REEF_NF4_INT8:
        case REEF_INT4_INT8: return GroupsLayout(linear, rows).end;
        case REEF_NF4: return 0;
        case REEF_INT4: return Int4Layout(linear, rows).end;
        case REEF_INT8_WIDE: return WideLayout(linear.in_features, rows).end;
        case REEF_SHORT_INT8: return ShortLayout(linear.in_features, rows).end;
        default: return rows * round_up(linear.in_features, 2) * 2;
    }
}

}  // namespace reef
