// Multiplies bf16 weights by bf16 activations; sums are float32 and are rounded once.
//
// Weights are packed [panel][pair of inputs][32 outputs][2]. `dot` of simd.h adds the two products
// of a pair, in the order of the instruction set; pairs are added in turn (linear_tiles.h).
#include "linear_tiles.h"
#include "table.h"

namespace REEF_ISA {
namespace {

struct Bf16 {
    using Words = B32;
    using Sum = F16;
    const ReefLinearArgs& args;

    explicit Bf16(const ReefLinearArgs& all) : args(all) {}

    static Words load(const uint8_t* p) { return load_pairs(reinterpret_cast<const bf16*>(p)); }
    static Words repeat(const uint8_t* p) { return repeat_pair(reinterpret_cast<const bf16*>(p)); }
    static Sum dot(Words weights, Words x, Sum sum) { return REEF_ISA::dot(weights, x, sum); }
    static int words(int in_features) { return (in_features + 1) / 2; }

    // Rows of an odd width are always copied, since their last pair would include the next row.
    static bool is_tiled(const ReefLinearArgs& args) {
        return args.rows > kDirectRows || args.linear->in_features % 2 != 0;
    }
    const uint8_t* tiles() const {
        return is_tiled(args) ? static_cast<const uint8_t*>(args.scratch) : nullptr;
    }
    DirectX rows(int row) const {
        return {reinterpret_cast<const uint8_t*>(args.x + row * args.x_stride), args.x_stride * 2};
    }
    F16 result(int, int output, Sum sum) const { return sum + bias_of(*args.linear, output); }
};

void fill_tile(const ReefLinearArgs& args, const Tiling& tiling, int tile) {
    const int row = tiling.first_row(tile, args.rows);
    const int count = tiling.first_row(tile + 1, args.rows) - row;
    const int in_features = args.linear->in_features;
    const bf16* x = args.x + row * args.x_stride;
    uint8_t* out = static_cast<uint8_t*>(args.scratch) + int64_t{4} * row * tiling.words;
    tile_words(reinterpret_cast<const uint8_t*>(x), args.x_stride * 2, count, in_features / 2, out);
    if (in_features % 2 == 0) return;
    auto* last = reinterpret_cast<uint32_t*>(out) + int64_t{count} * (tiling.words - 1);
    for (int r = 0; r < count; ++r) last[r] = x[r * args.x_stride + in_features - 1];
}

void fill_chunk(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const Tiling tiling(args, Bf16::words(args.linear->in_features));
    for_tiles_of_chunk(tiling, chunk, [&](int tile) { fill_tile(args, tiling, tile); });
}

}  // namespace

reef::Task tile_bf16(const ReefLinearArgs* args, int) {
    if (!Bf16::is_tiled(*args)) return {nullptr, args, 0};
    return {fill_chunk, args, tile_chunks(Tiling(*args, Bf16::words(args->linear->in_features)))};
}

reef::Task linear_bf16(const ReefLinearArgs* args, int) { return multiply_task<Bf16>(args); }

}  // namespace REEF_ISA
