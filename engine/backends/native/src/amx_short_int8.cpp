// Multiplies int8 weights that are stored in four bits (short_int8.h) in AMX tiles.
//
// A slice of a panel is unpacked once for all rows of a block. It is unpacked while the slice
// before it is multiplied: vector instructions are free while tiles multiply.
#include <algorithm>

#include "amx_int8.h"
#include "linear_amx.h"
#include "short_int8.h"

namespace REEF_ISA {
namespace short_int8 {
namespace {

constexpr int kBlockRows = 256;  // that share unpacked slices
constexpr int kSliceSteps = 16;  // of 64 inputs: 32 KB
constexpr int kTileBytes = kAmxDepth * kPanel;
constexpr int kUnpackedBytes = kGroup * kPanel;

// Groups [group, end) of a panel.
struct Slice {
    int panel, group, end;
    int groups() const { return end - group; }
};

// Unpacks a slice, a part of it at each of `turns` turns.
class Unpacking {
public:
    Unpacking(const ReefLinear& linear, const Slice& slice, uint8_t* out, int turns)
        : panel_(linear, slice.panel),
          group_(slice.group),
          groups_(slice.groups()),
          turns_(turns),
          due_(turns - 1),
          out_(out) {}

    void take_turn() {
        for (due_ += groups_; due_ >= turns_; due_ -= turns_, ++group_, out_ += kUnpackedBytes)
            unpack_group(panel_.codes_of(group_), panel_.multipliers_of(group_), out_);
    }

private:
    const Panel panel_;
    int group_;
    const int groups_, turns_;
    int due_;  // groups, times turns_
    uint8_t* out_;
};

class AmxShort {
public:
    static fourbit::Cut cut(const ReefLinearArgs& args) {
        return fourbit::Cut(args, kBlockRows, 5);
    }

    static void run(const ReefLinearArgs& args, int first, int count, int panel, int end) {
        AmxShort layer(args, first, count);
        layer.multiply_panels(panel, end);
    }

private:
    const ReefLinearArgs& args_;
    const QuantizedRows x_;
    const int first_, count_;  // the block's rows
    const int groups_, slices_;
    AmxTiles tiles_;
    alignas(64) int32_t sums_[kBlockRows * kPanel];
    alignas(64) uint8_t weights_[2][kSliceSteps * kTileBytes];

    AmxShort(const ReefLinearArgs& args, int first, int count)
        : args_(args),
          x_(quantized_rows(args)),
          first_(first),
          count_(count),
          groups_(args.linear->in_features / kGroup),
          slices_(fourbit::ceil_div(groups_, 2 * kSliceSteps)) {}

    void multiply_panels(int panel, int end) {
        Slice next = slice(panel, 0);
        Unpacking(*args_.linear, next, weights_[0], 1).take_turn();
        for (int i = 0; i < (end - panel) * slices_; ++i) {
            const Slice now = next;
            next = slice(panel + (i + 1) / slices_, (i + 1) % slices_);
            if (next.panel == end) next = {now.panel, 0, 0};  // there is none
            multiply(now, weights_[i % 2], next, weights_[(i + 1) % 2]);
        }
    }

    // Slices are of nearly equal length, and of whole steps but for the last.
    Slice slice(int panel, int number) const {
        const int steps = (groups_ + 1) / 2, end = steps * (number + 1) / slices_;
        return {panel, 2 * (steps * number / slices_), std::min(2 * end, groups_)};
    }

    // Adds a slice to the sums of all rows, and unpacks the next slice meanwhile.
    void multiply(const Slice& now, const uint8_t* weights, const Slice& next, uint8_t* unpacked) {
        const int steps = (now.groups() + 1) / 2, blocks = fourbit::ceil_div(count_, kRows);
        Unpacking unpacking(*args_.linear, next, unpacked, steps * blocks);
        for (int row = 0; row < count_; row += kRows) {
            const int count = std::min(count_ - row, kRows);
            tiles_.shape(std::min(count, kAmxRows), std::max(count - kAmxRows, 0), kAmxDepth);
            if (count > kAmxRows) multiply_rows<true>(row, now.group, steps, weights, unpacking);
            else multiply_rows<false>(row, now.group, steps, weights, unpacking);
            if (now.end == groups_)
                put_panel(args_, x_, first_ + row, count, now.panel, sums_ + row * kPanel);
        }
    }

    template <bool kBoth>
    void multiply_rows(int row, int group, int steps, const uint8_t* weights,
                       Unpacking& unpacking) {
        const int8_t* q = x_.q + (first_ + row) * x_.stride + group * kGroup;
        int32_t* sums = sums_ + row * kPanel;
        if (group == 0) zero_sums<kBoth>();
        else load_sums<kBoth>(sums);
        for (int step = 0; step < steps; ++step, q += kAmxDepth, weights += kTileBytes) {
            multiply_step<kBoth>(q, x_.stride, weights);
            unpacking.take_turn();
        }
        store_sums<kBoth>(sums);
    }
};

}  // namespace
}  // namespace short_int8

reef::Task amx_short_int8(const ReefLinearArgs* args, int threads) {
    return fourbit::task_of<short_int8::AmxShort>(args, threads);
}

}  // namespace REEF_ISA
