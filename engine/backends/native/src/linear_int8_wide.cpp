// Multiplies int8 weights by activations of 16 bits, exactly, in int32: for the output layer, whose
// few rows have large outliers and are read for every token.
//
// An activation is x = scale (256 high + low), two signed bytes, so that a row's rounding error is
// 1/65024 of its largest value. Each byte is multiplied as linear_int8.cpp does it, in the same
// packed weights, weight + 128; the two sums are added once, at the end.
#include "linear_tiles.h"
#include "simd_int8.h"
#include "table.h"

namespace REEF_ISA {
namespace {

constexpr float kLargest = 127 * 256;  // of 256 high + low
constexpr int kAheadBytes = 4096;      // that a panel is prefetched ahead
#if defined(__AVX512BF16__)
constexpr int kWideRows = 6;  // of a tile: times 2 digits and 2 vectors, 24 of 32 registers
#else
constexpr int kWideRows = 1;  // times 2 digits and 4 vectors: 8 of 16 registers
#endif

constexpr float kTooSmall = 1e-35f;  // rows of smaller x count as zeros, lest kLargest / x overflow

// Loads sixteen values from `k` on, with zeros behind the end of the row.
F16 load_row(const bf16* x, int k, int in_features) {
    const int left = in_features - k;
    return left >= 16 ? load(x + k) : left > 0 ? load(x + k, left) : zero();
}

// Returns max |x|, or NaN where an x is infinite or NaN, since 0 * x is NaN then.
float largest_of_row(const bf16* x, int in_features) {
    F16 most = zero(), poison = zero();
    for (int k = 0; k < in_features; k += 16) {
        const F16 value = load_row(x, k, in_features);
        most = max(most, abs(value));
        poison = fma(value, zero(), poison);
    }
    return largest(most) + sum(poison);
}

int words_of(const ReefLinearArgs& args) { return (args.linear->in_features + 3) / 4; }

// Cuts the rows into tiles of at most kWideRows, and the panels as other formats do.
Tiling tiling_of(const ReefLinearArgs& args) {
    Tiling tiling(args, words_of(args));
    tiling.tiles = (args.rows + kWideRows - 1) / kWideRows;
    tiling.blocks = 1;
    return tiling;
}

// Locates the rounded rows in scratch.
struct WideRows {
    uint8_t* words;  // of a tile: [word][row of the tile][high, low][4 inputs]
    float* scales;
    int32_t* totals;  // [row][high, low]: of all inputs

    explicit WideRows(const ReefLinearArgs& args) {
        const reef::WideLayout layout(args.linear->in_features, args.rows);
        words = static_cast<uint8_t*>(args.scratch);
        scales = reinterpret_cast<float*>(words + layout.scales);
        totals = reinterpret_cast<int32_t*>(words + layout.totals);
    }
};

// Splits sixteen whole numbers into high and low bytes, and adds these up.
void split(F16 values, int8_t (&high)[16], int8_t (&low)[16], int32_t (&totals)[2]) {
    int32_t whole[16];
    store_int32(whole, values);
    for (int i = 0; i < 16; ++i) {
        const int32_t upper = (whole[i] + 128) >> 8, lower = whole[i] - upper * 256;
        high[i] = static_cast<int8_t>(upper);
        low[i] = static_cast<int8_t>(lower);
        totals[0] += upper;
        totals[1] += lower;
    }
}

// Rounds row `row` into place `r` of a tile of `count` rows, whose words are at `tile`.
void round_row(const ReefLinearArgs& args, const WideRows& out, int row, int r, int count,
               uint8_t* tile) {
    const int in_features = args.linear->in_features, words = words_of(args);
    const bf16* x = args.x + row * args.x_stride;
    const float most = largest_of_row(x, in_features);
    const bool is_zero = !(most >= kTooSmall);  // or NaN
    out.scales[row] = is_zero ? most * 0.f : most / kLargest;
    const F16 inverse = set1(is_zero ? 0.f : kLargest / most);
    int32_t totals[2] = {};
    for (int k = 0; k < words; k += 4) {
        int8_t high[16] = {}, low[16] = {};
        if (!is_zero) split(round(load_row(x, 4 * k, in_features) * inverse), high, low, totals);
        for (int i = 0; i < 4 && k + i < words; ++i) {
            uint8_t* word = tile + (int64_t{k + i} * count + r) * 8;
            std::memcpy(word, high + 4 * i, 4);
            std::memcpy(word + 4, low + 4 * i, 4);
        }
    }
    std::memcpy(out.totals + 2 * row, totals, sizeof(totals));
}

void round_tile(const void* p, int tile) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const WideRows out(args);
    const Tiling tiling = tiling_of(args);
    const int first = tiling.first_row(tile, args.rows);
    const int count = tiling.first_row(tile + 1, args.rows) - first;
    uint8_t* words = out.words + int64_t{8} * first * tiling.words;
    for (int r = 0; r < count; ++r) round_row(args, out, first + r, r, count, words);
}

// Writes sixteen outputs of a row, given the sums of its high and low bytes.
void finish(const ReefLinearArgs& args, const WideRows& x, int row, int output, I16 high, I16 low) {
    const ReefLinear& linear = *args.linear;
    const F16 upper = to_float(minus(high, 128 * x.totals[2 * row]));
    const F16 lower = to_float(minus(low, 128 * x.totals[2 * row + 1]));
    const F16 scales =
        some_of(static_cast<const float*>(linear.scales), output, linear.out_features);
    const F16 value = fma(upper, set1(256.f), lower) * scales;
    put(args, row, output, fma(value, set1(x.scales[row]), bias_of(linear, output)));
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
    const uint8_t* x = all.x.words + int64_t{8} * row * words;
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
        finish(args, all.x, row + r, output, sums[r][0][0], sums[r][1][0]);
        if (output + 16 < args.linear->out_features)
            finish(args, all.x, row + r, output + 16, sums[r][0][1], sums[r][1][1]);
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
