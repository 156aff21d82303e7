// Configures the tile registers of AMX, for the files that are compiled with it (amx_*.cpp). The
// tiles of linear layers:
//
//     0 1  sums of the first rows, for 16 outputs each      4  the first rows of x
//     2 3  sums of the second rows                          5  the second rows of x
//                                                         6 7  weights of 16 outputs each
#pragma once
#include <initializer_list>

#include "simd.h"

namespace REEF_ISA {

constexpr int kAmxRows = 16;   // of a tile register
constexpr int kAmxDepth = 64;  // bytes of a tile's row

// Describes the shapes of all tile registers.
class TileConfig {
public:
    void set(int tile, int count, int bytes) {  // a tile without rows is not used
        data_.rows[tile] = static_cast<uint8_t>(count);
        data_.row_bytes[tile] = static_cast<uint16_t>(count ? bytes : 0);
    }
    void load() const { _tile_loadconfig(&data_); }

private:
    struct alignas(64) Data {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };
    Data data_;
};

// Shapes the tile registers, and releases them at its end, so that the kernel need not save them.
class AmxTiles {
public:
    AmxTiles() = default;
    AmxTiles(const AmxTiles&) = delete;
    ~AmxTiles() { _tile_release(); }

    // Sets the first and second rows of x, at most 16 each, and the depth in inputs, a multiple
    // of 4.
    void shape(int first, int second, int depth) {
        if (first == first_ && second == second_ && depth == depth_) return;
        first_ = first, second_ = second, depth_ = depth;
        TileConfig config;
        for (int tile : {0, 1}) config.set(tile, first, 64);
        for (int tile : {2, 3}) config.set(tile, second, 64);
        config.set(4, first, depth);
        config.set(5, second, depth);
        for (int tile : {6, 7}) config.set(tile, depth / 4, 64);
        config.load();
    }

private:
    int first_ = -1, second_ = -1, depth_ = -1;
};

}  // namespace REEF_ISA
