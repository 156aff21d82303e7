// Multiplies tiles of rows by panels of outputs, for bf16 and int8 alike.
//
// Both formats multiply four-byte words, two bf16 or four int8 neighbouring inputs. A panel is
// [word][32 outputs], two vectors per word. Rows are computed in tiles of at most kTileRows, with
// all sums of a tile in registers. Few rows of x are read in place; many are read from tiles
// [word][row of the tile] in scratch, which the prepare task fills. Either way a sum runs over the
// words in their order, so that the bits of a row's result do not depend on the other rows.
//
// A chunk is a group of panels times a block of tiles: each panel is read from memory once and is
// multiplied by all tiles of the block, which stay in the second-level cache.
#pragma once
#include <algorithm>
#include <utility>

#include "linear_output.h"
#include "simd.h"

namespace REEF_ISA {

#if defined(__AVX512BF16__)
constexpr int kTileRows = 12;   // times 2 vectors of sums: 24 of 32 registers
constexpr int kDirectRows = 4;  // at most so many rows are read in place
#else
constexpr int kTileRows = 2;  // times 4 vectors of sums: 8 of 16 registers
constexpr int kDirectRows = 2;
#endif
// How many words (4 KB in all) a panel is prefetched ahead by tiles of many rows, which take so
// long for each word that the hardware does not prefetch far enough. With few rows it does.
constexpr int kAhead = 32;
constexpr int kPrefetchedRows = 4;

// Calls f(0), ..., f(N - 1), with constants as arguments.
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
    int tiles;   // of rows; their sizes differ by one at most
    int blocks;  // of tiles
    int groups;  // of panels

    // Kernels with other tiles multiply `speed` times as fast.
    Tiling(const ReefLinearArgs& args, int words, int tile_rows = kTileRows, int speed = 1);
    int first_row(int tile, int rows) const { return share(tile, tiles, rows); }
    int first_tile(int block) const { return share(block, blocks, tiles); }
    // Returns the first panel of a group. Each pair of groups is longer than the pair before: the
    // pool hands out the last groups first, so that the last to begin are the shortest.
    int first_panel(int group) const {
        const int64_t pairs = groups / 2, pair = group / 2;
        if (groups % 2) return share(group, groups, panels);
        return share(pair * (pair + 1) + group % 2 * (pair + 1), pairs * (pairs + 1), panels);
    }
    int64_t panel_bytes() const { return int64_t{4} * kPanel * words; }

private:
    // Returns where part `i` begins if `whole` is cut into `parts` parts.
    static int share(int64_t i, int64_t parts, int64_t whole) {
        return static_cast<int>(i * whole / parts);
    }
};

// Returns how many groups to cut work of `cost` nanoseconds into. Groups are long, because memory
// delivers less to threads that often change their place, and two, four or eight threads get equal
// shares of them.
inline int64_t groups_of(int64_t cost, int64_t most) {
    if (cost < 3000) return 1;
    if (cost < 32000) return 4;
    return std::max<int64_t>(std::min(cost / 24000, most) / 8 * 8, 8);
}

inline Tiling::Tiling(const ReefLinearArgs& args, int num_words, int tile_rows, int speed)
    : words(num_words), panels(reef::panels_of(*args.linear)) {
    constexpr int64_t kBlockBytes = 256 * 1024;
    tiles = (args.rows + tile_rows - 1) / tile_rows;
    const int64_t fitting = std::max<int64_t>(kBlockBytes / (int64_t{4} * tile_rows * words), 1);
    blocks = static_cast<int>((tiles + fitting - 1) / fitting);
    // nanoseconds of one thread for a block: reading or multiplying, whichever is longer
    const int64_t reading = panels * panel_bytes() / 26;
    const int64_t multiplying = panels * int64_t{args.rows} * words / blocks * 6 / (10 * speed);
    const int64_t wanted = groups_of(std::max(reading, multiplying), 256 / blocks);
    groups = static_cast<int>(std::min<int64_t>(panels, wanted));
}

// Locate word k of row r of a tile: DirectX in x itself, TiledX in scratch.
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

// Adds words [begin, end) of a panel to the sums [row][half of the panel], and prefetches `ahead`
// at word 0, the next word of `ahead` at word 1, and so on.
template <class Format, int kRows, class X>
__attribute__((always_inline)) inline void multiply(const X& x, const uint8_t* panel,
                                                    const uint8_t* ahead, int begin, int end,
                                                    typename Format::Sum (&sums)[kRows][2]) {
    for (int64_t k = begin; k < end; ++k) {
        if constexpr (kRows > kPrefetchedRows) {
            _mm_prefetch(reinterpret_cast<const char*>(ahead + k * 128), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(ahead + k * 128 + 64), _MM_HINT_T0);
        }
        const auto low = Format::load(panel + k * 128), high = Format::load(panel + k * 128 + 64);
        unroll<kRows>([&](auto r) {
            const auto repeated = Format::repeat(x.word(r, k));
            sums[r][0] = Format::dot(low, repeated, sums[r][0]);
            sums[r][1] = Format::dot(high, repeated, sums[r][1]);
        });
    }
}

// Prefetches the line of y that a row of a tile will be written to, while the tile is multiplied.
inline void expect_write(const ReefLinearArgs& args, int row, int output) {
    const int64_t at = (row * args.y_stride + output) * (args.y_is_float ? 4 : 2);
    __builtin_prefetch(static_cast<uint8_t*>(args.y) + at, 1);
}

// Describes what to multiply: the tile that begins at a row, and a panel.
struct Place {
    int row, panel;
    const uint8_t* next;  // the panel that is read after this one
};

template <int kRows, class Format, class X>
void multiply_tile(const Format& format, const X& x, const Tiling& tiling, const Place& place) {
    const ReefLinearArgs& args = format.args;
    const auto* packed = static_cast<const uint8_t*>(args.linear->packed);
    const uint8_t* panel = packed + place.panel * tiling.panel_bytes();
    const int split = std::max(tiling.words - kAhead, 0);
    const int output = place.panel * kPanel;
    typename Format::Sum sums[kRows][2] = {};
    unroll<kRows>([&](auto r) { expect_write(args, place.row + r, output); });
    multiply<Format>(x, panel, panel + kAhead * 128, 0, split, sums);
    multiply<Format>(x, panel, place.next - split * 128, split, tiling.words, sums);
    unroll<kRows>([&](auto r) {
        const int row = place.row + r;
        put(args, row, output, format.result(row, output, sums[r][0]));
        if (output + 16 < args.linear->out_features)
            put(args, row, output + 16, format.result(row, output + 16, sums[r][1]));
    });
}

template <class Format, int kRows>
void multiply_rows(const Format& format, const Tiling& tiling, const Place& place) {
    if (const uint8_t* tiled = format.tiles()) {
        const TiledX<kRows> x{tiled + int64_t{4} * place.row * tiling.words};
        multiply_tile<kRows>(format, x, tiling, place);
    } else if constexpr (kRows <= kDirectRows) {
        multiply_tile<kRows>(format, format.rows(place.row), tiling, place);
    }
}

template <class Format>
using MultiplyRows = void (*)(const Format&, const Tiling&, const Place&);

template <class Format, int... I>
MultiplyRows<Format> multiply_rows_of(int rows, std::integer_sequence<int, I...>) {
    static constexpr MultiplyRows<Format> functions[] = {multiply_rows<Format, I + 1>...};
    return functions[rows - 1];
}
template <class Format>
MultiplyRows<Format> multiply_rows_of(int rows) {
    return multiply_rows_of<Format>(rows, std::make_integer_sequence<int, kTileRows>{});
}

// Multiplies all tiles of a block by one panel.
template <class Format>
void multiply_block(const Format& format, const Tiling& tiling, int block, Place place) {
    for (int tile = tiling.first_tile(block); tile < tiling.first_tile(block + 1); ++tile) {
        place.row = tiling.first_row(tile, format.args.rows);
        const int rows = tiling.first_row(tile + 1, format.args.rows) - place.row;
        multiply_rows_of<Format>(rows)(format, tiling, place);
    }
}

template <class Format>
void multiply_chunk(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const Format format(args);
    const Tiling tiling(args, Format::words(args.linear->in_features));
    const int group = chunk / tiling.blocks, end = tiling.first_panel(group + 1);
    const auto* packed = static_cast<const uint8_t*>(args.linear->packed);
    for (int panel = tiling.first_panel(group); panel < end; ++panel) {
        const uint8_t* next = packed + std::min(panel + 1, end - 1) * tiling.panel_bytes();
        multiply_block(format, tiling, chunk % tiling.blocks, {0, panel, next});
    }
}

template <class Format>
reef::Task multiply_task(const ReefLinearArgs* args) {
    const Tiling tiling(*args, Format::words(args->linear->in_features));
    return {multiply_chunk<Format>, args, tiling.groups * tiling.blocks};
}

// Copies words [begin, words) of `count` rows, `stride` bytes apart, into a tile of `width` rows.
inline void tile_words(const uint8_t* rows, int64_t stride, int count, int64_t begin, int64_t words,
                       int width, uint8_t* tile) {
    for (int r = 0; r < count; ++r)
        for (int64_t k = begin; k < words; ++k)
            std::memcpy(tile + (k * width + r) * 4, rows + r * stride + k * 4, 4);
}

// Copies words [0, words) of four rows into a tile of `width` rows, four words at a time.
inline void tile_four_rows(const uint8_t* rows, int64_t stride, int64_t words, int width,
                           uint8_t* tile) {
    int64_t k = 0;
    for (; k + 4 <= words; k += 4) {
        __m128 four[4];
        for (int r = 0; r < 4; ++r)
            four[r] = _mm_loadu_ps(reinterpret_cast<const float*>(rows + r * stride + k * 4));
        _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
        for (int i = 0; i < 4; ++i)
            _mm_storeu_ps(reinterpret_cast<float*>(tile + (k + i) * width * 4), four[i]);
    }
    tile_words(rows, stride, 4, k, words, width, tile);
}

// Copies words [0, words) of `count` rows into a tile of `count` rows.
inline void tile_words(const uint8_t* rows, int64_t stride, int count, int64_t words,
                       uint8_t* tile) {
    if (count < 4) return tile_words(rows, stride, count, 0, words, count, tile);
    for (int r = 0; r < count; r += 4) {
        const int first = std::min(r, count - 4);  // rows that two fours share are written twice
        tile_four_rows(rows + first * stride, stride, words, count, tile + first * 4);
    }
}

// Returns the tiles of x that one chunk of a prepare task fills: some microseconds of work.
inline int tiles_per_chunk(const Tiling& tiling) {
    return 1 + static_cast<int>(int64_t{8192} / (int64_t{kTileRows} * tiling.words));
}

// Calls fill(tile) for each tile of a chunk of a prepare task.
template <class Fill>
void for_tiles_of_chunk(const Tiling& tiling, int chunk, Fill fill) {
    const int begin = chunk * tiles_per_chunk(tiling);
    const int end = std::min(begin + tiles_per_chunk(tiling), tiling.tiles);
    for (int tile = begin; tile < end; ++tile) fill(tile);
}

inline int tile_chunks(const Tiling& tiling) {
    return (tiling.tiles + tiles_per_chunk(tiling) - 1) / tiles_per_chunk(tiling);
}

}  // namespace REEF_ISA
