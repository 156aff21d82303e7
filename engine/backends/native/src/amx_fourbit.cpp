// Multiplies 4-bit codes by many rows of int8 activations (fourbit_int8.h), in AMX tiles.
//
// A slice of a panel is decoded to signed bytes once for all rows. A tile product sums one group,
// or a part of it, of 16 rows and 16 outputs; vector instructions then scale and add the group's
// sums as the other kernels do, while the next group is multiplied.
#include "amx.h"
#include "fourbit_int8.h"
#include "linear_amx.h"
#include "linear_tiles.h"

namespace REEF_ISA {
namespace fourbit {
namespace {

constexpr int kAmxBlockRows = 128;      // that share a decoded slice
constexpr int kSliceBytes = 32 * 1024;  // of decoded weights, in the first-level cache

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
                tiles.shape(height, 0, depth);
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
        alignas(64) int32_t sums[2][kAmxRows * 16];
        F16 all[kRows];
        unroll<kRows>([&](auto r) { all[r] = load(totals + r * kPanel); });
        const uint8_t* x = rows.x + first * rows.stride + int64_t{group} * panel.group_size;
        const int64_t group_bytes = int64_t{panel.group_size} * kPanel;
        sum_group(panel.group_size, decoded, depth, x, rows.stride, sums[0]);
        for (int g = group, slot = 0; g < end; ++g, slot ^= 1) {
            if (g + 1 < end) {
                decoded += group_bytes, x += panel.group_size;
                sum_group(panel.group_size, decoded, depth, x, rows.stride, sums[slot ^ 1]);
            }
            unroll<kRows>([&](auto r) {
                const Sum sum = (Sum)_mm512_load_si512(sums[slot] + r * 16);
                all[r] = Format::add(panel, rows, first + r, g, half, sum, all[r]);
            });
        }
        unroll<kRows>([&](auto r) { store(totals + r * kPanel, all[r]); });
    }

    // Stores the sums of one group, [row][16 outputs].
    static void sum_group(int size, const uint8_t* decoded, int depth, const uint8_t* x,
                          int64_t stride, int32_t* sums) {
        _tile_zero(0);
        for (int k = 0; k < size; k += depth) {
            _tile_loadd(4, x + k, stride);
            _tile_loadd(6, decoded + k * kPanel, kWordBytes);
            _tile_dpbssd(0, 4, 6);
        }
        _tile_stored(0, sums, 64);
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
