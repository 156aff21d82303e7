// Defines where a key or a value lies inside a KV block. KvLayout in kv.py mirrors it.
//
// A block holds one part per kv head, one after another, so that a head reads contiguous memory:
//
//     keys          [block_size / 16][head_dim / 2][16 positions][2 dimensions]
//     values        [block_size / 2][padded_dim][2 positions]
//     key_scales    float [block_size]     REEF_KV_INT8 only
//     value_scales  float [block_size]     REEF_KV_INT8 only
//
// Elements are bf16, or int8 codes with x = code * scale. Attention multiplies pairs, so a vector
// of keys is 16 positions' pair of dimensions, to be multiplied by one pair of the query, and a
// vector of values is 16 dimensions' pair of positions, to be multiplied by one pair of
// probabilities: neither needs a shuffle. padded_dim is head_dim rounded up to 16; the padding is
// never written, and what is computed from it is dropped.
#pragma once
#include "kernels.h"

namespace REEF_ISA {

constexpr int kRun = 16;          // positions whose keys lie side by side
constexpr int kMaxHeadDim = 256;  // kv.py refuses more

inline int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }

inline int element_bytes(const ReefKvLayer& kv) { return kv.format == REEF_KV_INT8 ? 1 : 2; }

// Return the offset in elements from the head's first key, or first value.
inline int64_t key_offset(int head_dim, int position, int dim) {
    const int64_t run = static_cast<int64_t>(position / kRun) * kRun * head_dim;
    return run + (dim / 2) * 2 * kRun + (position % kRun) * 2 + dim % 2;
}
inline int64_t value_offset(int head_dim, int position, int dim) {
    const int64_t pair = static_cast<int64_t>(position / 2) * 2 * padded_dim(head_dim);
    return pair + dim * 2 + position % 2;
}

// Locates one kv head's part of one block.
struct KvHead {
    uint8_t* keys;
    uint8_t* values;
    float* key_scales;  // null in REEF_KV_BF16
    float* value_scales;
};

inline KvHead kv_head(const ReefKvLayer& kv, int64_t block, int head) {
    const bool scaled = kv.format == REEF_KV_INT8;
    const int64_t dim_bytes = int64_t{kv.block_size} * element_bytes(kv);  // all positions, one dim
    const int64_t key_bytes = dim_bytes * kv.head_dim;
    const int64_t value_bytes = dim_bytes * padded_dim(kv.head_dim);
    const int64_t scale_bytes = scaled ? int64_t{kv.block_size} * 4 : 0;
    const int64_t head_bytes = key_bytes + value_bytes + 2 * scale_bytes;
    uint8_t* keys = kv.base + block * kv.block_bytes + head * head_bytes;
    uint8_t* values = keys + key_bytes;
    auto* scales = scaled ? reinterpret_cast<float*>(values + value_bytes) : nullptr;
    return {keys, values, scales, scaled ? scales + kv.block_size : nullptr};
}

}  // namespace REEF_ISA
