// Multiplying tiles of rows by panels of outputs: what bf16 and int8 have in common.
//
// Both formats multiply four-byte words, two bf16 or four int8 neighbouring inputs. A panel is
// [word][32 outputs], two vectors per word. Rows go in tiles of at most kTileRows, all sums of a
// tile in registers; x is read where it lies for few rows, and for many from tiles
// [word][row of the tile] in scratch, which the prepare task fills. Either way a sum runs over
// the words in their order, which makes a row's bits independent of the rows beside it.
//
// A chunk is a group of panels times a block of tiles: each panel comes from memory once and is
// then multiplied by all tiles of the block, which stay in the second cache.
#pragma once
#include <algorithm>
#include <utility>

#include "linear.h"
#include "simd.h"

namespace REEF_ISA {

#if defined(__AVX512BF16__)
constexpr int kTileRows = 12;   // times 2 vectors of sums: 24 of 32 registers
constexpr int kDirectRows = 4;  // up to so many rows are read where they lie
constexpr int kPairedRows = 4;  // tiles of up to so many rows take two panels at a time
#else
constexpr int kTileRows = 2;  // times 4 vectors of sums: 8 of 16 registers
constexpr int kDirectRows = 2;
constexpr int kPairedRows = 0;
#endif
constexpr int kAhead = 16;  // words of a panel that are prefetched: 2 KB

// f(0), ..., f(N - 1), each argument a constant
template <class F, int... I>
__attribute__((always_inline)) inline void unroll(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
__attribute__((always_inline)) inline void unroll(F f) {
    unroll(f, std::make_integer_sequence<int, N>{});
}

struct Tiling {
    int words, panels;
    int tiles;                    // of rows, whose sizes differ by one at most
    int tiles_per_block, blocks;
    int panels_per_group, groups;

    Tiling(const ReefLinearArgs& args, int words);
    int first_row(int tile, int rows) const {
        return static_cast<int>(static_cast<int64_t>(tile) * rows / tiles);
    }
    int64_t panel_bytes() const { return int64_t{4} * kPanel * words; }
};

inline Tiling::Tiling(const ReefLinearArgs& args, int num_words)
    : words(num_words), panels(reef::panels_of(*args.linear)) {
    constexpr int64_t kBlockBytes = 384 * 1024;
    tiles = (args.rows + kTileRows - 1) / kTileRows;
    const int64_t fitting = std::max<int64_t>(kBlockBytes / (int64_t{4} * kTileRows * words), 1);
    blocks = static_cast<int>((tiles + fitting - 1) / fitting);
    tiles_per_block = (tiles + blocks - 1) / blocks;
    blocks = (tiles + tiles_per_block - 1) / tiles_per_block;
    // Nanoseconds of one thread for a panel and a block: reading or multiplying, whichever is longer.
    const int64_t rows = (args.rows + blocks - 1) / blocks;
    const int64_t cost = std::max<int64_t>(panel_bytes() / 26, rows * words * 6 / 10) + 1;
    const int64_t wanted = std::clamp<int64_t>(cost * panels * blocks / 128, 3000, 300000);
    panels_per_group = static_cast<int>(std::clamp<int64_t>(wanted / cost, 1, panels));
    groups = (panels + panels_per_group - 1) / panels_per_group;
}

// Where a tile finds word k of its row r: at base + r * row + k * step bytes.
struct DirectX {
    const uint8_t* base;
    int64_t row;
    const uint8_t* word(int r, int64_t k) const { return base + r * row + k * 4; }
};
template <int kRows>
struct TiledX {
    const uint8_t* base;
    const uint8_t* word(int r, int64_t k) const { return base + (k * kRows + r) * 4; }
};

// Adds words [begin, end) of kPanels neighbouring panels to the sums [row][half of a panel].
// `ahead`: what is prefetched at word 0.
template <class Format, int kRows, int kPanels, class X>
__attribute__((always_inline)) inline void multiply(
    const X& x, const uint8_t* panel, int64_t panel_bytes, const uint8_t* ahead, int begin, int end,
    typename Format::Sum (&sums)[kRows][2 * kPanels]) {
    for (int64_t k = begin; k < end; ++k) {
        typename Format::Words weights[2 * kPanels];
        unroll<2 * kPanels>([&](auto i) {
            const int64_t offset = (i / 2) * panel_bytes + k * 128 + (i % 2) * 64;
            _mm_prefetch(reinterpret_cast<const char*>(ahead + offset), _MM_HINT_T0);
            weights[i] = Format::load(panel + offset);
        });
        unroll<kRows>([&](auto r) {
            const auto repeated = Format::repeat(x.word(r, k));
            unroll<2 * kPanels>([&](auto i) {
                sums[r][i] = Format::dot(weights[i], repeated, sums[r][i]);
            });
        });
    }
}

// Sixteen outputs of a row, or those of them that the layer has.
inline void put(const ReefLinearArgs& args, int row, int output, F16 value) {
    const int left = args.linear->out_features - output;
    const int64_t at = row * args.y_stride + output;
    if (args.y_is_float) {
        float* y = static_cast<float*>(args.y) + at;
        left >= 16 ? store(y, value) : store(y, value, left);
    } else {
        bf16* y = static_cast<bf16*>(args.y) + at;
        left >= 16 ? store(y, value) : store(y, value, left);
    }
}

inline F16 some_of(const float* values, int output, int out_features) {
    const int left = out_features - output;
    return left >= 16 ? load(values + output) : load(values + output, left);
}

inline F16 bias_of(const ReefLinear& linear, int output) {
    return linear.bias ? some_of(linear.bias, output, linear.out_features) : zero();
}

struct Place {  // of a tile: what it multiplies
    int row, panel;
    const uint8_t* next;  // what will be read after these panels
};

template <class Format, int kRows, int kPanels, class X>
void multiply_tile(const ReefLinearArgs& args, const X& x, const Tiling& tiling, const Place& place) {
    const int64_t panel_bytes = tiling.panel_bytes();
    const uint8_t* panel = static_cast<const uint8_t*>(args.linear->packed) + place.panel * panel_bytes;
    const int split = std::max(tiling.words - kAhead, 0);
    typename Format::Sum sums[kRows][2 * kPanels] = {};
    multiply<Format, kRows, kPanels>(x, panel, panel_bytes, panel + kAhead * 128, 0, split, sums);
    multiply<Format, kRows, kPanels>(x, panel, panel_bytes, place.next - split * 128, split,
                                     tiling.words, sums);
    unroll<kRows>([&](auto r) {
        unroll<2 * kPanels>([&](auto i) {
            const int output = place.panel * kPanel + i * 16;
            if (output < args.linear->out_features)
                put(args, place.row + r, output, Format::result(args, place.row + r, output, sums[r][i]));
        });
    });
}

template <class Format, int kRows, int kPanels>
void multiply_rows(const ReefLinearArgs& args, const Tiling& tiling, const Place& place) {
    if (const uint8_t* tiled = Format::tiles(args)) {
        const TiledX<kRows> x{tiled + int64_t{4} * place.row * tiling.words};
        multiply_tile<Format, kRows, kPanels>(args, x, tiling, place);
    } else if constexpr (kRows <= kDirectRows) {
        multiply_tile<Format, kRows, kPanels>(args, Format::rows(args, place.row), tiling, place);
    }
}

using MultiplyRows = void (*)(const ReefLinearArgs&, const Tiling&, const Place&);

template <class Format, int kPanels, int... I>
MultiplyRows multiply_rows_of(int rows, std::integer_sequence<int, I...>) {
    static constexpr MultiplyRows functions[] = {multiply_rows<Format, I + 1, kPanels>...};
    return functions[rows - 1];
}
template <class Format, int kPanels>
MultiplyRows multiply_rows_of(int rows) {
    constexpr int kMost = kPanels == 1 ? kTileRows : kPairedRows;
    return multiply_rows_of<Format, kPanels>(rows, std::make_integer_sequence<int, kMost>{});
}

// All tiles of a block by kPanels panels.
template <class Format, int kPanels>
void multiply_block(const ReefLinearArgs& args, const Tiling& tiling, int block, Place place) {
    const int begin = block * tiling.tiles_per_block;
    const int end = std::min(begin + tiling.tiles_per_block, tiling.tiles);
    for (int tile = begin; tile < end; ++tile) {
        place.row = tiling.first_row(tile, args.rows);
        const int rows = tiling.first_row(tile + 1, args.rows) - place.row;
        multiply_rows_of<Format, kPanels>(rows)(args, tiling, place);
    }
}

template <class Format>
void multiply_chunk(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const Tiling tiling(args, Format::words(args.linear->in_features));
    const int block = chunk % tiling.blocks;
    int panel = chunk / tiling.blocks * tiling.panels_per_group;
    const int end = std::min(panel + tiling.panels_per_group, tiling.panels);
    const auto* packed = static_cast<const uint8_t*>(args.linear->packed);
    const auto after = [&](int next) { return packed + std::min(next, end - 1) * tiling.panel_bytes(); };
    if constexpr (kPairedRows > 0) {
        if (args.rows <= kPairedRows)
            for (; panel + 2 <= end; panel += 2)
                multiply_block<Format, 2>(args, tiling, block, {0, panel, after(panel + 2)});
    }
    for (; panel < end; ++panel)
        multiply_block<Format, 1>(args, tiling, block, {0, panel, after(panel + 1)});
}

template <class Format>
reef::Task multiply_task(const ReefLinearArgs* args) {
    const Tiling tiling(*args, Format::words(args->linear->in_features));
    return {multiply_chunk<Format>, args, tiling.groups * tiling.blocks};
}

// Words [0, words) of rows that lie `stride` bytes apart, as a tile.
inline void tile_words(const uint8_t* rows, int64_t stride, int count, int64_t words, uint8_t* tile) {
    for (int r = 0; r < count; ++r)
        for (int64_t k = 0; k < words; ++k)
            std::memcpy(tile + (k * count + r) * 4, rows + r * stride + k * 4, 4);
}

// Tiles of x that one chunk of a prepare task fills: some microseconds.
inline int tiles_per_chunk(const Tiling& tiling) {
    return 1 + static_cast<int>(int64_t{8192} / (int64_t{kTileRows} * tiling.words));
}

template <class Fill>  // fill(tile) for the tiles of a chunk
void for_tiles_of_chunk(const Tiling& tiling, int chunk, Fill fill) {
    const int begin = chunk * tiles_per_chunk(tiling);
    const int end = std::min(begin + tiles_per_chunk(tiling), tiling.tiles);
    for (int tile = begin; tile < end; ++tile) fill(tile);
}

inline int tile_chunks(const Tiling& tiling) {
    return (tiling.tiles + tiles_per_chunk(tiling) - 1) / tiles_per_chunk(tiling);
}

}  // namespace REEF_ISA
