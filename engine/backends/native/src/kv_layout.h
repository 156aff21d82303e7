// Defines where a key or a value lies inside a KV block. KvLayout in kv.py mirrors it.
//
// A block holds one part per kv head, one after another, so that a head reads contiguous memory:
//
//     REEF_KV_BF16  keys    bf16 [block_size / 16][head_dim / 2][16 positions][2 dimensions]
//                   values  bf16 [block_size / 2][padded_dim][2 positions]
//     REEF_KV_INT8  keys    uint8 [block_size / 16][head_dim / 4][16 positions][4 dimensions]
//                   values  int8 [block_size / 4][padded_dim][4 positions]
//                   key_scales, value_scales  float [block_size] each
//
// A key is (code - 128) * scale, a value is code * scale. Attention multiplies pairs of bf16, or
// fours of bytes of which one side is unsigned: a vector of keys is 16 positions' pair or four of
// dimensions, to be multiplied by one pair or four of the query, and a vector of values is 16
// dimensions' pair or four of positions, to be multiplied by one pair or four of probabilities.
// Neither needs a shuffle. padded_dim is head_dim rounded up to 16; padding is never written, and
// what is computed from it is dropped. So are the last
// dimensions of a key whose head_dim is no multiple of 4.
#pragma once
#include "kernels.h"

namespace REEF_ISA {

constexpr int kRun = 16;          // positions whose keys lie side by side
constexpr int kMaxHeadDim = 256;  // kv.py refuses more

inline int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }

// Returns the bytes of one position's key.
inline int key_bytes(const ReefKvLayer& kv) {
    return kv.format == REEF_KV_INT8 ? (kv.head_dim + 3) / 4 * 4 : 2 * kv.head_dim;
}
// Returns the bytes of one position's value, padding included.
inline int value_bytes(const ReefKvLayer& kv) {
    return padded_dim(kv.head_dim) * (kv.format == REEF_KV_INT8 ? 1 : 2);
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
    const int64_t keys = int64_t{kv.block_size} * key_bytes(kv);
    const int64_t values = int64_t{kv.block_size} * value_bytes(kv);
    const int64_t scales = scaled ? int64_t{kv.block_size} * 4 : 0;
    uint8_t* at = kv.base + block * kv.block_bytes + head * (keys + values + 2 * scales);
    auto* first_scale = scaled ? reinterpret_cast<float*>(at + keys + values) : nullptr;
    return {at, at + keys, first_scale, scaled ? first_scale + kv.block_size : nullptr};
}

}  // namespace REEF_ISA
