// Packs 4-bit codes, two to a byte, into [panel][step of 8 inputs][32 outputs][4 bytes], where the
// steps of two neighbouring groups alternate (fourbit.h); where a group is a whole row, all steps
// are in order.
//
// The eight codes of an output and a step stay one 32-bit word, in which they are reordered
// (fourbit_bf16.h, fourbit_int8.h). Outputs that fill up the last panel have code 0 and scale 0.
#include <algorithm>
#include <cstring>

#include "linear_layout.h"
#include "pack.h"

namespace reef {
namespace {

constexpr int kLine = 16;  // words in a cache line

// Moves nibbles 0, 2, 4, 6 into the low half, and 1, 3, 5, 7 into the high half.
uint32_t neighbours_apart(uint32_t codes) {
    const auto gather = [](uint32_t v) {
        v &= 0x0f0f0f0fu;
        v = (v | v >> 4) & 0x00ff00ffu;
        return (v | v >> 8) & 0xffffu;
    };
    return gather(codes) | gather(codes >> 4) << 16;
}

// Moves nibbles 0 to 3 into the low halves of the four bytes, and 4 to 7 into the high halves.
uint32_t halves_apart(uint32_t codes) {
    const auto spread = [](uint32_t v) {
        v = (v | v << 8) & 0x00ff00ffu;
        return (v | v << 4) & 0x0f0f0f0fu;
    };
    return spread(codes & 0xffff) | spread(codes >> 16) << 4;
}

// Returns the place of a step in its panel.
int64_t place_of(int64_t step, const ReefPackArgs& args) {
    const int64_t steps = args.group_size / 8, group = step / steps;
    if ((group | 1) * steps >= args.in_features / 8) return step;
    return (group & ~int64_t{1}) * steps + step % steps * 2 + (group & 1);
}

template <uint32_t (*kReorder)(uint32_t)>
void pack_panel(const void* p, int panel) {
    const auto& args = *static_cast<const ReefPackArgs*>(p);
    const int64_t steps = args.in_features / 8;
    uint32_t* packed = static_cast<uint32_t*>(args.packed) + panel * steps * kPanel;
    const int outputs = std::min(kPanel, args.out_features - panel * kPanel);
    if (outputs < kPanel) std::fill_n(packed, steps * kPanel, 0u);
    const auto* rows =
        static_cast<const uint8_t*>(args.weight) + panel * kPanel * args.weight_stride;
    for (int64_t begin = 0; begin < steps; begin += kLine) {
        const int64_t count = std::min<int64_t>(steps - begin, kLine);
        int64_t places[kLine];
        for (int64_t i = 0; i < count; ++i) places[i] = place_of(begin + i, args) * kPanel;
        for (int output = 0; output < outputs; ++output)
            for (int64_t i = 0; i < count; ++i) {
                uint32_t codes;
                std::memcpy(&codes, rows + output * args.weight_stride + (begin + i) * 4, 4);
                packed[places[i] + output] = kReorder(codes);
            }
    }
}

}  // namespace

Task pack_fourbit(const ReefPackArgs* args) {
    const int panels = (args->out_features + kPanel - 1) / kPanel;
    const bool bf16 = args->format == REEF_NF4 || args->format == REEF_INT4;
    return {bf16 ? pack_panel<neighbours_apart> : pack_panel<halves_apart>, args, panels};
}

}  // namespace reef
