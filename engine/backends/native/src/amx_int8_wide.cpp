// Multiplies int8 weights by many rows of 16-bit activations (linear_int8_wide.h), in AMX tiles.
//
// The high bytes of sixteen rows are one tile and their low bytes another. Both are multiplied by
// each tile of weights, 16 words of a panel as they are packed.
#include <algorithm>

#include "amx.h"
#include "linear_amx.h"
#include "linear_int8_wide.h"
#include "linear_tiles.h"

namespace REEF_ISA {
namespace {

constexpr int kStepWords = kAmxDepth / 4;
constexpr int kStepBytes = kStepWords * kPanel * 4;
constexpr int kStepAhead = 4 * kStepBytes;
constexpr int kRoundedRows = 4;  // of a chunk: some microseconds of work

struct AmxWide {
    const ReefLinearArgs& args;
    const WideRows x;  // bytes: [high, low][row][stride]
    const Tiling tiling;
    AmxTiles tiles;

    explicit AmxWide(const ReefLinearArgs& all)
        : args(all),
          x(all),
          tiling(all, static_cast<int>(reef::round_up(all.linear->in_features, 4) / 4), kAmxRows,
                 5) {}

    uint8_t* row_of(int row, int byte) const {
        return x.bytes + (int64_t{byte} * args.rows + row) * x.stride;
    }

    // Multiplies all rows by one panel.
    void multiply_panel(int panel) {
        const auto* weights = static_cast<const uint8_t*>(args.linear->packed) +
                              int64_t{panel} * tiling.panel_bytes();
        const int whole = tiling.words / kStepWords * kStepWords;
        std::memcpy(rest_, weights + int64_t{whole} * kPanel * 4,
                    static_cast<size_t>(tiling.words - whole) * kPanel * 4);
        for (int row = 0; row < args.rows; row += kAmxRows) {
            const int count = std::min(args.rows - row, kAmxRows);
            tiles.shape(count, count, kAmxDepth);
            multiply_rows(weights, row);
            for (int r = 0; r < count; ++r) write(panel * kPanel, row + r, r);
        }
    }

private:
    alignas(64) int32_t sums_[2][2][kAmxRows][16];  // [high, low][half of the panel][row]
    // The last words of a panel, as tiles must not read beyond them. What follows them is
    // multiplied by the zeros behind the inputs of x.
    alignas(64) uint8_t rest_[kStepBytes] = {};

    void multiply_rows(const uint8_t* weights, int row) {
        const uint8_t *high = row_of(row, 0), *low = row_of(row, 1);
        const int steps = tiling.words / kStepWords;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int step = 0; step < steps; ++step, weights += kStepBytes) {
            if (row == 0) prefetch(weights + kStepAhead);
            multiply_step(high + step * kAmxDepth, low + step * kAmxDepth, weights);
        }
        if (tiling.words % kStepWords)
            multiply_step(high + steps * kAmxDepth, low + steps * kAmxDepth, rest_);
        _tile_stored(0, sums_[0][0], 64);
        _tile_stored(1, sums_[0][1], 64);
        _tile_stored(2, sums_[1][0], 64);
        _tile_stored(3, sums_[1][1], 64);
    }

    void multiply_step(const uint8_t* high, const uint8_t* low, const uint8_t* weights) const {
        _tile_loadd(4, high, x.stride);
        _tile_loadd(6, weights, kPanel * 4);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, weights + kPanel * 2, kPanel * 4);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, low, x.stride);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }

    static void prefetch(const uint8_t* step) {
        for (int i = 0; i < kStepBytes; i += 64)
            _mm_prefetch(reinterpret_cast<const char*>(step + i), _MM_HINT_T0);
    }

    void write(int output, int row, int r) const {
        for (int half = 0; half < 2 && output + 16 * half < args.linear->out_features; ++half)
            put_wide(args, x, row, output + 16 * half, load(sums_[0][half][r]),
                     load(sums_[1][half][r]));
    }
};

void multiply_group(const void* p, int group) {
    AmxWide layer(*static_cast<const ReefLinearArgs*>(p));
    const Tiling& tiling = layer.tiling;
    for (int panel = tiling.first_panel(group); panel < tiling.first_panel(group + 1); ++panel)
        layer.multiply_panel(panel);
}

void round_rows(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const AmxWide layer(args);
    const int end = std::min((chunk + 1) * kRoundedRows, args.rows);
    for (int row = chunk * kRoundedRows; row < end; ++row)
        round_wide_row(args, layer.x, row, static_cast<int>(layer.x.stride / 4),
                       [&](int k, int byte) { return layer.row_of(row, byte) + int64_t{k} * 4; });
}

}  // namespace

reef::Task amx_round_wide_rows(const ReefLinearArgs* args) {
    return {round_rows, args, (args->rows + kRoundedRows - 1) / kRoundedRows};
}

reef::Task amx_int8_wide(const ReefLinearArgs* args) {
    return {multiply_group, args, AmxWide(*args).tiling.groups};
}

}  // namespace REEF_ISA
