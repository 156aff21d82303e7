// Selects the kernels that compute in AMX tiles.
#include "attention_amx.h"
#include "linear_amx.h"
#include "quantize.h"
#include "table.h"

namespace REEF_ISA {
namespace {

// From so many rows on tiles are faster than vector instructions.
constexpr int kInt8Rows = 8, kWideRows = 7, kFourbitRows = 9, kShortRows = 9;

bool uses_tiles(const ReefLinearArgs& args) {
    switch (args.linear->format) {
        case REEF_INT8: return args.rows >= kInt8Rows;
        case REEF_INT8_WIDE: return args.rows >= kWideRows;
        case REEF_SHORT_INT8: return args.rows >= kShortRows;
        case REEF_NF4_INT8:
        case REEF_INT4_INT8: return args.rows >= kFourbitRows;
        default: return false;
    }
}

reef::Task prepare(const ReefLinearArgs* args, int threads) {
    if (!uses_tiles(*args)) return linear_prepare(args, threads);
    switch (args->linear->format) {
        case REEF_INT8:
        case REEF_SHORT_INT8: return quantize_rows(args);
        case REEF_INT8_WIDE: return amx_round_wide_rows(args);
        default: return quantize_groups(args);
    }
}

reef::Task multiply(const ReefLinearArgs* args, int threads) {
    if (!uses_tiles(*args)) return linear(args, threads);
    switch (args->linear->format) {
        case REEF_INT8: return amx_int8(args);
        case REEF_INT8_WIDE: return amx_int8_wide(args);
        case REEF_SHORT_INT8: return amx_short_int8(args, threads);
        default: return amx_fourbit(args, threads);
    }
}

reef::Task attend(const reef::AttentionCall* args, int threads) {
    return amx_attends(*args) ? amx_attention(args, threads) : attention(args, threads);
}

}  // namespace

reef::Kernels with_amx(reef::Kernels table) {
    table.linear_prepare = prepare;
    table.linear = multiply;
    table.attention = attend;
    return table;
}

}  // namespace REEF_ISA
