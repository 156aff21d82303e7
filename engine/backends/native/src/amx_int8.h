// Multiplies int8 weights by 32 rows of int8 activations at a time, in AMX tiles (amx.h).
//
// A tile of weights is 16 words of a panel; a tile of x is 64 inputs of 16 rows. Where kBoth is
// false there are at most 16 rows.
#pragma once
#include "amx.h"
#include "linear.h"

namespace REEF_ISA {

constexpr int kRows = 2 * kAmxRows;
constexpr int kStepWords = kAmxDepth / 4;

template <bool kBoth>
inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kBoth) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

template <bool kBoth>
inline void multiply_step(const int8_t* x, int64_t stride, const uint8_t* weights) {
    _tile_loadd(4, x, stride);
    _tile_loadd(6, weights, kPanel * 4);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, weights + kPanel * 2, kPanel * 4);
    _tile_dpbsud(1, 4, 7);
    if constexpr (kBoth) {
        _tile_loadd(5, x + kAmxRows * stride, stride);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
}

// Store and load sums [row][32 outputs].
template <bool kBoth>
inline void store_sums(int32_t* sums) {
    _tile_stored(0, sums, kPanel * 4);
    _tile_stored(1, sums + kPanel / 2, kPanel * 4);
    if constexpr (kBoth) {
        _tile_stored(2, sums + kAmxRows * kPanel, kPanel * 4);
        _tile_stored(3, sums + kAmxRows * kPanel + kPanel / 2, kPanel * 4);
    }
}
template <bool kBoth>
inline void load_sums(const int32_t* sums) {
    _tile_loadd(0, sums, kPanel * 4);
    _tile_loadd(1, sums + kPanel / 2, kPanel * 4);
    if constexpr (kBoth) {
        _tile_loadd(2, sums + kAmxRows * kPanel, kPanel * 4);
        _tile_loadd(3, sums + kAmxRows * kPanel + kPanel / 2, kPanel * 4);
    }
}

}  // namespace REEF_ISA
