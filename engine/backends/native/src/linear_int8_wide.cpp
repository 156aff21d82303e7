// Multiplies int8 weights by activations of 16 bits (linear_int8_wide.h) with vector instructions.
#include "linear_int8_wide.h"

#include "linear_tiles.h"
#include "table.h"

namespace REEF_ISA {
namespace {

constexpr int kAheadBytes = 4096;  // that a panel is prefetched ahead
#if defined(__AVX512BF16__)
constexpr int kWideRows = 6;  // of a tile: times 2 digits and 2 vectors, 24 of 32 registers
#else
constexpr int kWideRows = 1;  // times 2 digits and 4 vectors: 8 of 16 registers
#endif

int words_of(const ReefLinearArgs& args) { return (args.linear->in_features + 3) / 4; }

// Cuts the rows into tiles of at most kWideRows, and the panels as other formats do.
Tiling tiling_of(const ReefLinearArgs& args) {
    Tiling tiling(args, words_of(args));
    tiling.tiles = (args.rows + kWideRows - 1) / kWideRows;
    tiling.blocks = 1;
    return tiling;
}

// Rounds the rows of a tile to words [word][row of the tile][high, low][4 inputs].
void round_tile(const void* p, int tile) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const WideRows out(args);
    const Tiling tiling = tiling_of(args);
    const int first = tiling.first_row(tile, args.rows);
    const int count = tiling.first_row(tile + 1, args.rows) - first;
    uint8_t* words = out.bytes + int64_t{8} * first * tiling.words;
    for (int r = 0; r < count; ++r)
        round_wide_row(args, out, first + r, tiling.words, [&](int k, int byte) {
            return words + ((int64_t{k} * count + r) * 2 + byte) * 4;
        });
}

struct Wide {
    const ReefLinearArgs& args;
    const WideRows x;
    const Tiling tiling;
};

// Multiplies the tile of kRows rows from `row` on by a panel; its first tile prefetches what
// follows the panel in memory, the next panel.
template <int kRows, bool kIsFirst>
void multiply_wide(const Wide& all, int row, int panel) {
    const ReefLinearArgs& args = all.args;
    const int words = all.tiling.words, output = panel * kPanel;
    const uint8_t* weights =
        static_cast<const uint8_t*>(args.linear->packed) + panel * all.tiling.panel_bytes();
    const uint8_t* x = all.x.bytes + int64_t{8} * row * words;
    I16 sums[kRows][2][2] = {};  // [row][high, low][half of the panel]
    unroll<kRows>([&](auto r) { expect_write(args, row + r, output); });
    for (int64_t k = 0; k < words; ++k) {
        const uint8_t* word = weights + k * 128;
        if constexpr (kIsFirst) {
            _mm_prefetch(reinterpret_cast<const char*>(word + kAheadBytes), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(word + kAheadBytes + 64), _MM_HINT_T0);
        }
        const Q64 left = load_fours(word), right = load_fours(word + 64);
        unroll<2 * kRows>([&](auto i) {
            const Q64 repeated = repeat_four(x + (k * 2 * kRows + i) * 4);
            I16(&both)[2] = sums[i / 2][i % 2];
            both[0] = dot_fours(left, repeated, both[0]);
            both[1] = dot_fours(right, repeated, both[1]);
        });
    }
    unroll<kRows>([&](auto r) {
        put_wide(args, all.x, row + r, output, sums[r][0][0], sums[r][1][0]);
        if (output + 16 < args.linear->out_features)
            put_wide(args, all.x, row + r, output + 16, sums[r][0][1], sums[r][1][1]);
    });
}

using MultiplyWide = void (*)(const Wide&, int row, int panel);

template <bool kIsFirst, int... I>
MultiplyWide multiply_wide_of(int rows, std::integer_sequence<int, I...>) {
    static constexpr MultiplyWide functions[] = {multiply_wide<I + 1, kIsFirst>...};
    return functions[rows - 1];
}

void multiply_group(const void* p, int group) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const Wide all{args, WideRows(args), tiling_of(args)};
    constexpr auto kAllRows = std::make_integer_sequence<int, kWideRows>{};
    for (int panel = all.tiling.first_panel(group); panel < all.tiling.first_panel(group + 1);
         ++panel) {
        for (int tile = 0; tile < all.tiling.tiles; ++tile) {
            const int row = all.tiling.first_row(tile, args.rows);
            const int rows = all.tiling.first_row(tile + 1, args.rows) - row;
            const MultiplyWide multiply = tile == 0 ? multiply_wide_of<true>(rows, kAllRows)
                                                    : multiply_wide_of<false>(rows, kAllRows);
            multiply(all, row, panel);
        }
    }
}

}  // namespace

reef::Task round_wide_rows(const ReefLinearArgs* args) {
    return {round_tile, args, tiling_of(*args).tiles};
}

reef::Task linear_int8_wide(const ReefLinearArgs* args) {
    return {multiply_group, args, tiling_of(*args).groups};
}

}  // namespace REEF_ISA
