// Declares the linear kernels, one per format of the weights, and what they share.
//
// All packed weights lie in panels of 32 outputs, padded with zeros; a panel is read once from
// beginning to end for all rows. A row's sum over its inputs runs in one fixed order.
#pragma once
#include "linear_layout.h"

namespace REEF_ISA {

using reef::kPanel;

// Return the prepare tasks. bf16 and int8 bring many rows of x into tiles (linear_tiles.h).
reef::Task tile_bf16(const ReefLinearArgs* args, int threads);
reef::Task quantize_and_tile_rows(const ReefLinearArgs* args, int threads);
reef::Task prepare_int4(const ReefLinearArgs* args);
reef::Task round_wide_rows(const ReefLinearArgs* args);
reef::Task quantize_short(const ReefLinearArgs* args);

reef::Task linear_bf16(const ReefLinearArgs* args, int threads);
reef::Task linear_int8(const ReefLinearArgs* args, int threads);
reef::Task linear_nf4(const ReefLinearArgs* args, int threads);
reef::Task linear_int4(const ReefLinearArgs* args, int threads);
reef::Task linear_int8_wide(const ReefLinearArgs* args);
reef::Task linear_nf4_int8(const ReefLinearArgs* args, int threads);
reef::Task linear_int4_int8(const ReefLinearArgs* args, int threads);
reef::Task linear_short_int8(const ReefLinearArgs* args, int threads);

}  // namespace REEF_ISA
