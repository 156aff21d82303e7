// Multiplies 4-bit codes by many rows of int8 activations (fourbit_int8.h), in AMX tiles.
//
// A slice of a panel is decoded to signed bytes once for all rows. A tile product sums one group,
// or a part of it, of 16 rows and 16 outputs; vector instructions then scale and add the group's
// sums as the other kernels do. Four groups are in tile registers at once, as a product takes long
// until its sums can be stored.
#include "amx.h"
#include "fourbit_int8.h"
#include "linear_amx.h"
#include "linear_tiles.h"

namespace REEF_ISA {
namespace fourbit {
namespace {

constexpr int kAmxBlockRows = 128;      // that share a decoded slice
constexpr int kSliceBytes = 32 * 1024;  // of decoded weights, in the first-level cache
constexpr int kTogether = 4;            // groups
constexpr int kTileSums = kAmxRows * 16;

template <class Format>
struct AmxFourbit {
    using Rows = typename Format::Rows;
    using Sum = typename Format::Sum;

    static Cut cut(const ReefLinearArgs& args) { return Cut(args, kAmxBlockRows, 7); }

    static void run(const ReefLinearArgs& args, int first, int count, int panel, int end) {
        const Rows rows = Format::rows(args);
        AmxTiles tiles;
        for (; panel < end; ++panel) multiply_panel(args, rows, tiles, first, count, panel);
    }

private:
    static void multiply_panel(const ReefLinearArgs& args, const Rows& rows, AmxTiles& tiles,
                               int first, int count, int panel_number) {
        alignas(64) uint8_t decoded[kSliceBytes];
        alignas(64) float totals[kAmxBlockRows * kPanel];
        std::memset(totals, 0, static_cast<size_t>(count) * kPanel * sizeof(float));
        const Panel panel = panel_of(*args.linear, panel_number);
        const int depth = panel.group_size % kAmxDepth == 0 ? kAmxDepth : kAmxDepth / 2;
        const int per_slice = kSliceBytes / (panel.group_size * kPanel);
        for (int group = 0; group < panel.groups; group += per_slice) {
            const int end = group + per_slice < panel.groups ? group + per_slice : panel.groups;
            decode_slice<typename Format::Signed>(panel, group, end, decoded);
            for (int row = 0; row < count; row += kAmxRows) {
                const int height = count - row < kAmxRows ? count - row : kAmxRows;
                tiles.shape(height, height, depth);
                const auto multiply =
                    multiply_of(height, std::make_integer_sequence<int, kAmxRows>{});
                for (int half = 0; half < 2; ++half)
                    multiply(panel, decoded + half * kWordBytes / 2, depth, rows, first + row,
                             group, end, half, totals + row * kPanel + 16 * half);
            }
        }
        for (int row = 0; row < count; ++row)
            for (int half = 0; half < 2; ++half)
                write(args, first + row, panel_number * kPanel + 16 * half,
                      load(totals + row * kPanel + 16 * half));
    }

    // Adds groups [group, end) of kRows rows and half a panel to totals [kRows][32].
    template <int kRows>
    static void multiply(const Panel& all_panel, const uint8_t* decoded, int depth,
                         const Rows& all_rows, int first, int group, int end, int half,
                         float* totals) {
        const Panel panel = all_panel;  // copies, which stores of tiles cannot change
        const Rows rows = all_rows;
        alignas(64) int32_t sums[2][kTogether][kTileSums];
        F16 all[kRows];
        unroll<kRows>([&](auto r) { all[r] = load(totals + r * kPanel); });
        const uint8_t* x = rows.x + first * rows.stride + int64_t{group} * panel.group_size;
        const int size = panel.group_size;
        sum_groups(size, end - group, decoded, depth, x, rows.stride, sums[0]);
        for (int g = group, slot = 0; g < end; g += kTogether, slot ^= 1) {
            const int left = end - g - kTogether;
            if (left > 0) {
                decoded += int64_t{kTogether} * size * kPanel, x += kTogether * size;
                sum_groups(size, left, decoded, depth, x, rows.stride, sums[slot ^ 1]);
            }
            for (int i = 0; i < kTogether && g + i < end; ++i)
                unroll<kRows>([&](auto r) {
                    const Sum sum = (Sum)_mm512_load_si512(sums[slot][i] + r * 16);
                    all[r] = Format::add(panel, rows, first + r, g + i, half, sum, all[r]);
                });
        }
        unroll<kRows>([&](auto r) { store(totals + r * kPanel, all[r]); });
    }

    // Stores the sums of four groups, [group][row][16 outputs]. Where fewer are left, the last one
    // is summed again.
    static void sum_groups(int size, int left, const uint8_t* decoded, int depth, const uint8_t* x,
                           int64_t stride, int32_t (*sums)[kTileSums]) {
        const int64_t x1 = left > 1 ? size : 0;
        const int64_t x2 = left > 2 ? 2 * size : x1, x3 = left > 3 ? 3 * size : x2;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int k = 0; k < size; k += depth) {
            const uint8_t *from = x + k, *weights = decoded + k * kPanel;
            _tile_loadd(4, from, stride);
            _tile_loadd(6, weights, kWordBytes);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(5, from + x1, stride);
            _tile_loadd(7, weights + x1 * kPanel, kWordBytes);
            _tile_dpbssd(1, 5, 7);
            _tile_loadd(4, from + x2, stride);
            _tile_loadd(6, weights + x2 * kPanel, kWordBytes);
            _tile_dpbssd(2, 4, 6);
            _tile_loadd(5, from + x3, stride);
            _tile_loadd(7, weights + x3 * kPanel, kWordBytes);
            _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }

    using Multiply = void (*)(const Panel&, const uint8_t*, int, const Rows&, int, int, int, int,
                              float*);
    template <int... kIndex>
    static Multiply multiply_of(int rows, std::integer_sequence<int, kIndex...>) {
        static constexpr Multiply kernels[] = {multiply<kIndex + 1>...};
        return kernels[rows - 1];
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
