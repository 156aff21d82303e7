// Packs a weight [out, in] of a checkpoint into the layout that its kernel reads.
#pragma once
#include <cstdint>

#include "kernels.h"

extern "C" {

struct ReefPackArgs {  // mirrored in structs.py, listed in layout.cpp
    int32_t format;    // ReefFormat
    int32_t in_features, out_features;
    int32_t group_size;     // 4-bit formats: as packed
    const void* weight;     // row-major: bf16, int8, or 4-bit codes two in a byte
    int64_t weight_stride;  // bytes from one output to the next
    void* packed;           // 64-byte aligned, all of it is written
};

}  // extern "C"

namespace reef {

Task pack_bf16(const ReefPackArgs* args);
Task pack_int8(const ReefPackArgs* args);
Task pack_fourbit(const ReefPackArgs* args);  // pack4.cpp

}  // namespace reef
