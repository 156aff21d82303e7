// The linear kernels, one per format of the weights, and what they share.
//
// All packed weights lie in panels of 32 outputs, padded with zeros; a panel is read once from
// beginning to end for all rows. A row's sum over its inputs runs in one fixed order.
#pragma once
#include "linear_layout.h"

namespace REEF_ISA {

using reef::kPanel;

// Activations of the formats that multiply integers, in ReefLinearArgs::scratch:
// q int8 [rows, stride] with stride = in_features rounded up to 64 and zeros behind, then
// scales float [rows], then sums int32 [rows, stride / 64]: of each 64 neighbouring q,
// then totals int32 [rows]: of all q of a row.
// x = q * scale, scale = max |x| / 127.
struct QuantizedRows {
    int8_t* q;
    int64_t stride;
    float* scales;
    int32_t* sums;
    int32_t* totals;
};
QuantizedRows quantized_rows(const ReefLinearArgs* args);
reef::Task quantize_rows(const ReefLinearArgs* args, int threads);

// What bf16 and int8 prepare: x in tiles for many rows (linear_tiles.h).
reef::Task tile_bf16(const ReefLinearArgs* args, int threads);
reef::Task quantize_and_tile_rows(const ReefLinearArgs* args, int threads);
reef::Task prepare_int4(const ReefLinearArgs* args);

reef::Task linear_bf16(const ReefLinearArgs* args, int threads);
reef::Task linear_int8(const ReefLinearArgs* args, int threads);
reef::Task linear_nf4(const ReefLinearArgs* args, int threads);
reef::Task linear_nf4_int8(const ReefLinearArgs* args, int threads);
reef::Task linear_int4(const ReefLinearArgs* args, int threads);

}  // namespace REEF_ISA
