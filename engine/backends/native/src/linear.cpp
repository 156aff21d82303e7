// Selects the kernel of a linear layer by the format of its weights.
#include "linear.h"

#include "quantize.h"
#include "table.h"

namespace REEF_ISA {

reef::Task linear_prepare(const ReefLinearArgs* args, int threads) {
    switch (args->linear->format) {
        case REEF_BF16: return tile_bf16(args, threads);
        case REEF_INT8: return quantize_and_tile_rows(args, threads);
        case REEF_INT4: return prepare_int4(args);
        case REEF_INT8_WIDE: return round_wide_rows(args);
        case REEF_SHORT_INT8: return quantize_short(args);
        case REEF_NF4_INT8:
        case REEF_INT4_INT8: return quantize_groups(args);
        default: return {nullptr, args, 0};
    }
}

reef::Task linear(const ReefLinearArgs* args, int threads) {
    switch (args->linear->format) {
        case REEF_INT8: return linear_int8(args, threads);
        case REEF_NF4: return linear_nf4(args, threads);
        case REEF_NF4_INT8: return linear_nf4_int8(args, threads);
        case REEF_INT4: return linear_int4(args, threads);
        case REEF_INT8_WIDE: return linear_int8_wide(args);
        case REEF_INT4_INT8: return linear_int4_int8(args, threads);
        case REEF_SHORT_INT8: return linear_short_int8(args, threads);
        default: return linear_bf16(args, threads);
    }
}

}  // namespace REEF_ISA
