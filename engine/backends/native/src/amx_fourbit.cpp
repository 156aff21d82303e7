// Multiplies 4-bit codes by many rows of int8 activations (fourbit_int8.h), in AMX tiles.
//
// Two groups of a panel are decoded to signed bytes once for all rows. With 16 rows they make four
// tile products, as a group has two halves of 16 outputs. Vector instructions scale and add the
// sums of groups as the other kernels do, while the tiles of the next rows multiply: a product
// takes long until its sums can be stored.
#include "amx.h"
#include "fourbit_int8.h"
#include "linear_amx.h"
#include "linear_tiles.h"

namespace REEF_ISA {
namespace fourbit {
namespace {

constexpr int kAmxBlockRows = 128;  // that share decoded groups
constexpr int kPairBytes = 2 * reef::kLargestInt8Group * kPanel;
constexpr int kTileSums = kAmxRows * 16;

template <class Format>
class AmxFourbit {
public:
    static Cut cut(const ReefLinearArgs& args) { return Cut(args, kAmxBlockRows, 7); }

    static void run(const ReefLinearArgs& args, int first, int count, int panel, int end) {
        AmxFourbit layer(args, first, count);
        for (; panel < end; ++panel) layer.multiply_panel(panel);
    }

private:
    using Rows = typename Format::Rows;
    using Sum = typename Format::Sum;
    using Sums = int32_t[2][2][kTileSums];  // [group][half][row][16 outputs]

    struct Unit {
        int row;            // the first of at most 16
        int group, groups;  // the first group, and how many there are: 2 or 1
    };

    const ReefLinearArgs& args_;
    const Rows rows_;
    const int first_, count_;  // the block's rows
    AmxTiles tiles_;
    alignas(64) float totals_[kAmxBlockRows * kPanel];
    alignas(64) uint8_t decoded_[kPairBytes];
    alignas(64) Sums sums_[2];

    AmxFourbit(const ReefLinearArgs& args, int first, int count)
        : args_(args), rows_(Format::rows(args)), first_(first), count_(count) {}

    void multiply_panel(int number) {
        const Panel panel = panel_of(*args_.linear, number);
        std::memset(totals_, 0, static_cast<size_t>(count_) * kPanel * sizeof(float));
        Unit before{0, 0, 0};
        int slot = 0;
        for (int group = 0; group < panel.groups; group += 2) {
            const int groups = group + 1 < panel.groups ? 2 : 1;
            decode_slice<typename Format::Signed>(panel, group, group + groups, decoded_);
            for (int row = 0; row < count_; row += kAmxRows, slot ^= 1) {
                const Unit now{row, group, groups};
                expect(panel, number, now);
                sum(panel, now, sums_[slot]);
                add(panel, before, sums_[slot ^ 1]);
                before = now;
            }
        }
        add(panel, before, sums_[slot ^ 1]);
        for (int row = 0; row < count_; ++row)
            for (int half = 0; half < 2; ++half)
                write(args_, first_ + row, number * kPanel + 16 * half,
                      load(totals_ + row * kPanel + 16 * half));
    }

    int height(int row) const { return count_ - row < kAmxRows ? count_ - row : kAmxRows; }

    // Prefetches a unit's share of the codes that are decoded next, and what its rows write.
    void expect(const Panel& panel, int number, const Unit& unit) const {
        const int64_t bytes = int64_t{panel.group_size} * kPanel;  // of two groups
        const uint8_t* next = panel.codes_of(unit.group) + bytes;
        const int row = unit.row, last = row + height(row);
        for (int64_t i = row * bytes / count_; i < last * bytes / count_; i += 64)
            prefetch(next + i);
        for (int r = row; unit.group == 0 && r < last; ++r)
            expect_write(args_, first_ + r, number * kPanel);
    }

    // Stores the sums of a unit. Where it has one group, that is summed twice.
    void sum(const Panel& panel, const Unit& unit, Sums& sums) {
        const int size = panel.group_size, rows = height(unit.row);
        const int depth = size % kAmxDepth == 0 ? kAmxDepth : kAmxDepth / 2;
        const int64_t stride = rows_.stride, other = unit.groups == 2 ? size : 0;
        const uint8_t* x = rows_.x + (first_ + unit.row) * stride + int64_t{unit.group} * size;
        tiles_.shape(rows, rows, depth);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int k = 0; k < size; k += depth) {
            const uint8_t* weights = decoded_ + k * kPanel;
            _tile_loadd(4, x + k, stride);
            _tile_loadd(6, weights, kWordBytes);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(7, weights + kWordBytes / 2, kWordBytes);
            _tile_dpbssd(1, 4, 7);
            weights += other * kPanel;
            _tile_loadd(5, x + k + other, stride);
            _tile_loadd(6, weights, kWordBytes);
            _tile_dpbssd(2, 5, 6);
            _tile_loadd(7, weights + kWordBytes / 2, kWordBytes);
            _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, sums[0][0], 64);
        _tile_stored(1, sums[0][1], 64);
        _tile_stored(2, sums[1][0], 64);
        _tile_stored(3, sums[1][1], 64);
    }

    void add(const Panel& panel, const Unit& unit, const Sums& sums) {
        if (unit.groups == 2) {
            add_groups<2, 0>(panel, unit, sums);
            add_groups<2, 1>(panel, unit, sums);
        } else if (unit.groups == 1) {
            add_groups<1, 0>(panel, unit, sums);
            add_groups<1, 1>(panel, unit, sums);
        }
    }

    template <int kGroups, int kHalf>
    void add_groups(const Panel& panel, const Unit& unit, const Sums& sums) {
        typename Format::Weights weights[kGroups];
        unroll<kGroups>(
            [&](auto g) { weights[g] = Format::weights(panel, unit.group + g, kHalf); });
        const Rows rows = rows_;  // a copy, which stores of totals cannot change
        const int row = first_ + unit.row, last = height(unit.row);
        float* totals = totals_ + unit.row * kPanel + 16 * kHalf;
#pragma GCC unroll 4
        for (int r = 0; r < last; ++r) {
            F16 total = load(totals + r * kPanel);
            unroll<kGroups>([&](auto g) {
                const Sum sum = (Sum)_mm512_load_si512(sums[g][kHalf] + r * 16);
                total = Format::add(weights[g], rows, row + r, unit.group + g, sum, total);
            });
            store(totals + r * kPanel, total);
        }
    }
};

}  // namespace
}  // namespace fourbit

reef::Task amx_fourbit(const ReefLinearArgs* args, int threads) {
    using namespace fourbit;
    if (args->linear->format == REEF_NF4_INT8) return task_of<AmxFourbit<Nf4Int8>>(args, threads);
    if (args->linear->zeros == nullptr) return task_of<AmxFourbit<Int4Int8>>(args, threads);
    return task_of<AmxFourbit<Int4ZerosInt8>>(args, threads);
}

}  // namespace REEF_ISA
