// Multiplies int8 weights by many rows of int8 activations (linear_int8.h), in AMX tiles.
//
// A tile of weights is 16 words of a panel, as they are packed; a tile of x is 64 inputs of 16
// rows, as they are quantized. Each panel is multiplied by 32 rows at a time.
#include "amx_int8.h"

#include "linear_amx.h"
#include "linear_int8.h"
#include "linear_tiles.h"

namespace REEF_ISA {
namespace {

constexpr int kStepBytes = kStepWords * kPanel * 4;
constexpr int kPanelAhead = 2 * kStepBytes;

inline void prefetch(const uint8_t* step) {
    for (int i = 0; i < kStepBytes; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(step + i), _MM_HINT_T0);
}

struct AmxInt8 {
    const ReefLinearArgs& args;
    const QuantizedRows x;
    const Tiling tiling;
    AmxTiles tiles;

    explicit AmxInt8(const ReefLinearArgs& all)
        : args(all),
          x(quantized_rows(all)),
          tiling(all, static_cast<int>(reef::round_up(all.linear->in_features, 4) / 4), kRows, 5) {}

    // Multiplies all blocks of rows [row, end) by one panel.
    void multiply_panel(int panel, int row, int end) {
        const auto* weights = static_cast<const uint8_t*>(args.linear->packed) +
                              int64_t{panel} * tiling.panel_bytes();
        const int whole = tiling.words / kStepWords * kStepWords;
        alignas(64) uint8_t rest[kStepBytes];  // the last words: tiles must not read beyond them
        std::memcpy(rest, weights + int64_t{whole} * kPanel * 4,
                    static_cast<size_t>(tiling.words - whole) * kPanel * 4);
        bool is_first = true;
        for (; row < end; row += kRows, is_first = false) {
            const int count = std::min(end - row, kRows);
            tiles.shape(std::min(count, kAmxRows), std::max(count - kAmxRows, 0), kAmxDepth);
            if (count > kAmxRows) multiply_rows<true>(weights, rest, row, is_first);
            else multiply_rows<false>(weights, rest, row, is_first);
            put_panel(args, x, row, count, panel, sums_[0]);
        }
    }

private:
    alignas(64) int32_t sums_[kRows][kPanel];

    // Computes sums_. The rest of `rest` is multiplied by the zeros behind the inputs of x.
    template <bool kBoth>
    void multiply_rows(const uint8_t* weights, const uint8_t* rest, int row, bool prefetches) {
        const int8_t* q = x.q + row * x.stride;
        const int steps = tiling.words / kStepWords;
        zero_sums<kBoth>();
        for (int step = 0; step < steps; ++step, weights += kStepBytes, q += kAmxDepth) {
            if (prefetches) prefetch(weights + kPanelAhead);
            multiply_step<kBoth>(q, x.stride, weights);
        }
        if (tiling.words % kStepWords) multiply_step<kBoth>(q, x.stride, rest);
        store_sums<kBoth>(sums_[0]);
    }
};

void multiply_chunk(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    AmxInt8 layer(args);
    const Tiling& tiling = layer.tiling;
    const int group = chunk / tiling.blocks, block = chunk % tiling.blocks;
    const int row = tiling.first_tile(block) * kRows;
    const int end = std::min(tiling.first_tile(block + 1) * kRows, args.rows);
    for (int panel = tiling.first_panel(group); panel < tiling.first_panel(group + 1); ++panel)
        layer.multiply_panel(panel, row, end);
}

}  // namespace

reef::Task amx_int8(const ReefLinearArgs* args) {
    const AmxInt8 layer(*args);
    return {multiply_chunk, args, layer.tiling.groups * layer.tiling.blocks};
}

}  // namespace REEF_ISA
