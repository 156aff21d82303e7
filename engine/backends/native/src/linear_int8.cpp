// Multiplies int8 weights by int8 activations (linear_int8.h) with vector instructions.
#include "linear_int8.h"

#include "linear_tiles.h"
#include "simd_int8.h"
#include "table.h"

namespace REEF_ISA {
namespace {

struct Int8 {
    using Words = Q64;
    using Sum = I16;
    const ReefLinearArgs& args;
    const QuantizedRows x;

    explicit Int8(const ReefLinearArgs& all) : args(all), x(quantized_rows(all)) {}

    static Words load(const uint8_t* p) { return load_fours(p); }
    static Words repeat(const uint8_t* p) { return repeat_four(p); }
    static Sum dot(Words weights, Words x, Sum sum) { return dot_fours(weights, x, sum); }
    static int words(int in_features) { return (in_features + 3) / 4; }

    static bool is_tiled(const ReefLinearArgs& args) { return args.rows > kDirectRows; }
    uint8_t* tiles() const {
        if (!is_tiled(args)) return nullptr;
        const reef::RowsLayout layout(args.linear->in_features, args.rows);
        return static_cast<uint8_t*>(args.scratch) + layout.end;
    }
    DirectX rows(int row) const {
        return {reinterpret_cast<const uint8_t*>(x.q + row * x.stride), x.stride};
    }
    F16 result(int row, int output, Sum sum) const {
        return Int8Outputs(args, output).of(x, row, sum);
    }
};

void quantize_tiles(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const Int8 format(args);
    const Tiling tiling(args, Int8::words(args.linear->in_features));
    for_tiles_of_chunk(tiling, chunk, [&](int tile) {
        const int row = tiling.first_row(tile, args.rows);
        const int end = tiling.first_row(tile + 1, args.rows);
        for (int r = row; r < end; ++r) quantize_row(args, format.x, r);
        const auto* q = reinterpret_cast<const uint8_t*>(format.x.q + row * format.x.stride);
        uint8_t* out = format.tiles() + int64_t{4} * row * tiling.words;
        tile_words(q, format.x.stride, end - row, tiling.words, out);
    });
}

}  // namespace

reef::Task quantize_and_tile_rows(const ReefLinearArgs* args, int) {
    if (!Int8::is_tiled(*args)) return quantize_rows(args);
    const Tiling tiling(*args, Int8::words(args->linear->in_features));
    return {quantize_tiles, args, tile_chunks(tiling)};
}

reef::Task linear_int8(const ReefLinearArgs* args, int) { return multiply_task<Int8>(args); }

}  // namespace REEF_ISA
