// Packs bf16 and int8 weights into panels of 32 outputs.
//
//     bf16  [panel][pair of inputs][32 outputs][2 inputs]
//     int8  [panel][four inputs][32 outputs][4 inputs], each plus 128, hence unsigned
//
// Either way the four-byte words of a panel are transposed: a kernel reads the words of 32 outputs
// from two neighbouring cache lines, and multiplies them by one word of x. Inputs that fill up the
// last word are 0 (int8: 0 plus 128), and so are all inputs of outputs that fill up the last panel.
#include "pack.h"

#include <algorithm>
#include <cstring>

#include "context.h"
#include "linear_layout.h"

namespace reef {
namespace {

constexpr int kLine = 16;  // words in a cache line

const uint8_t* output_row(const ReefPackArgs& args, int output) {
    return static_cast<const uint8_t*>(args.weight) + output * args.weight_stride;
}

// Returns the word at byte `offset` of a row of `bytes` bytes, with zeros behind its end.
uint32_t last_word(const uint8_t* row, int64_t offset, int64_t bytes) {
    uint32_t word = 0;
    std::memcpy(&word, row + offset, static_cast<size_t>(std::min<int64_t>(bytes - offset, 4)));
    return word;
}

// Packs words [begin, end) of one output into its column of the panel.
void pack_words(const uint8_t* row, int64_t bytes, int64_t begin, int64_t end, uint32_t flip,
                uint32_t* column) {
    const int64_t whole = std::min(end, bytes / 4);
    for (int64_t word = begin; word < whole; ++word) {
        uint32_t value;
        std::memcpy(&value, row + word * 4, 4);
        column[word * kPanel] = value ^ flip;
    }
    for (int64_t word = std::max(begin, whole); word < end; ++word)
        column[word * kPanel] = last_word(row, word * 4, bytes) ^ flip;
}

// Packs one panel of rows of `bytes` bytes each; `flip` turns signed bytes into unsigned ones.
void pack_panel(const ReefPackArgs& args, int panel, int64_t bytes, uint32_t flip) {
    const int64_t words = (bytes + 3) / 4;
    uint32_t* packed = static_cast<uint32_t*>(args.packed) + panel * words * kPanel;
    const int outputs = std::min(kPanel, args.out_features - panel * kPanel);
    if (outputs < kPanel) std::fill_n(packed, words * kPanel, flip);
    for (int64_t begin = 0; begin < words; begin += kLine) {
        const int64_t end = std::min(begin + kLine, words);
        for (int i = 0; i < outputs; ++i)
            pack_words(output_row(args, panel * kPanel + i), bytes, begin, end, flip, packed + i);
    }
}

void pack_bf16_panel(const void* args, int panel) {
    const auto& pack = *static_cast<const ReefPackArgs*>(args);
    pack_panel(pack, panel, int64_t{2} * pack.in_features, 0);
}

void pack_int8_panel(const void* args, int panel) {
    const auto& pack = *static_cast<const ReefPackArgs*>(args);
    pack_panel(pack, panel, pack.in_features, 0x80808080u);
}

int panels(const ReefPackArgs* args) { return (args->out_features + kPanel - 1) / kPanel; }

Task pack(const ReefPackArgs* args) {
    switch (args->format) {
        case REEF_INT8:
        case REEF_INT8_WIDE: return pack_int8(args);
        case REEF_NF4:
        case REEF_NF4_INT8:
        case REEF_INT4:
        case REEF_INT4_INT8:
        case REEF_SHORT_INT8: return pack_fourbit(args);
        default: return pack_bf16(args);
    }
}

}  // namespace

Task pack_bf16(const ReefPackArgs* args) { return {pack_bf16_panel, args, panels(args)}; }
Task pack_int8(const ReefPackArgs* args) { return {pack_int8_panel, args, panels(args)}; }

}  // namespace reef

extern "C" {

void reef_pack(ReefContext* context, const ReefPackArgs* args) {
    context->pool.run(reef::pack(args));
}

int64_t reef_linear_scratch_bytes(const ReefLinear* linear, int32_t rows) {
    return reef::linear_scratch_bytes(*linear, rows);
}

}  // extern "C"
