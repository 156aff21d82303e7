// Rotates q and k of each row by its position's angle, then writes k and v to the row's slot.
//
// A chunk is a block of rows. Rotation: x' = x * cos + swapped * sin, where swapped exchanges the
// halves of the first rotary_dim dimensions and the table's sine carries the sign; computed in
// float32 and rounded once. int8 codes: x ~ code * scale, scale = max |x| / 127 of one position's
// head.
#include <algorithm>

#include "kv_layout.h"
#include "simd.h"
#include "table.h"

namespace REEF_ISA {
namespace {

constexpr int kChunkElements = 4096;  // of qkv: a few microseconds, most of them in cache misses

int64_t row_elements(const ReefStoreArgs& a) {
    return int64_t{a.heads + 2 * a.kv.kv_heads} * a.kv.head_dim;
}

int rows_per_chunk(const ReefStoreArgs& a) {
    return static_cast<int>(std::max<int64_t>(1, kChunkElements / row_elements(a)));
}

// Load or store sixteen values, or n where fewer are left.
template <class T>
F16 load_up_to(const T* x, int n) {
    return n >= 16 ? load(x) : load(x, n);
}
void store_up_to(bf16* x, F16 a, int n) {
    if (n >= 16) store(x, a);
    else store(x, a, n);
}

// ==== Rotary ====

void rotate(bf16* x, const float* cos, const float* sin, int half) {
    for (int d = 0; d < half; d += 16) {
        const int n = half - d;
        bf16 *below = x + d, *above = x + half + d;
        const F16 low = load_up_to(below, n), high = load_up_to(above, n);
        const F16 cos_low = load_up_to(cos + d, n), cos_high = load_up_to(cos + half + d, n);
        const F16 sin_low = load_up_to(sin + d, n), sin_high = load_up_to(sin + half + d, n);
        store_up_to(below, fma(low, cos_low, high * sin_low), n);
        store_up_to(above, fma(high, cos_high, low * sin_high), n);
    }
}

// ==== Writing to a slot ====

// Writes a position's key or value among those of other positions. `group` elements lie side by
// side: dimensions of a key, positions of a value.
template <class T>
void write_key(const T* key, int head_dim, int position, int group, int64_t row, T* keys) {
    T* to = keys + position / kRun * kRun * row + position % kRun * group;
    for (int d = 0; d < head_dim; d += group, to += kRun * group)
        std::memcpy(to, key + d, std::min(group, head_dim - d) * sizeof(T));
}

template <class T>
void write_value(const T* value, int head_dim, int position, int group, int64_t row, T* values) {
    T* to = values + position / group * group * row + position % group;
    for (int d = 0; d < head_dim; ++d) to[d * group] = value[d];
}

// Returns max |x| / 127, or NaN where an x is NaN or infinite: the vector is then read as NaN.
float scale_of(const bf16* x, int n) {
    F16 most = zero(), finite = zero();
    for (int d = 0; d < n; d += 16) {
        const F16 a = load_up_to(x + d, n - d);
        most = max(most, abs(a));
        finite = fma(a, zero(), finite);
    }
    return largest(most) / 127.f + sum(finite);
}

void quantize(const bf16* x, int n, float scale, int8_t* codes) {
    const float inverse = scale > 0.f ? 1.f / scale : 0.f;
    for (int d = 0; d < n; d += 16) {
        float whole[16];
        store(whole, round(load_up_to(x + d, n - d) * set1(inverse)));
        for (int i = 0; i < std::min(16, n - d); ++i)
            codes[d + i] = static_cast<int8_t>(std::max(-127.f, std::min(127.f, whole[i])));
    }
}

void write_codes(const ReefKvLayer& kv, const bf16* key, const bf16* value, int position,
                 const KvHead& to) {
    int8_t codes[kMaxHeadDim];
    to.key_scales[position] = scale_of(key, kv.head_dim);
    quantize(key, kv.head_dim, to.key_scales[position], codes);
    uint8_t from_128[kMaxHeadDim];
    for (int d = 0; d < kv.head_dim; ++d) from_128[d] = static_cast<uint8_t>(codes[d] + 128);
    write_key(from_128, kv.head_dim, position, 4, key_bytes(kv), to.keys);

    to.value_scales[position] = scale_of(value, kv.head_dim);
    quantize(value, kv.head_dim, to.value_scales[position], codes);
    write_value(codes, kv.head_dim, position, 4, value_bytes(kv),
                reinterpret_cast<int8_t*>(to.values));
}

void write_bf16(const ReefKvLayer& kv, const bf16* key, const bf16* value, int position,
                const KvHead& to) {
    write_key(key, kv.head_dim, position, 2, key_bytes(kv) / 2, reinterpret_cast<bf16*>(to.keys));
    write_value(value, kv.head_dim, position, 2, value_bytes(kv) / 2,
                reinterpret_cast<bf16*>(to.values));
}

void store_row(const ReefStoreArgs& a, int row) {
    const int head_dim = a.kv.head_dim;
    bf16* q = a.qkv + row * a.qkv_stride;
    bf16* k = q + int64_t{a.heads} * head_dim;
    const bf16* v = k + int64_t{a.kv.kv_heads} * head_dim;
    const int64_t angles = int64_t{a.rotary_dim} * (a.rotary_dim ? a.positions[row] : 0);
    for (int h = 0; h < a.heads + a.kv.kv_heads; ++h)
        rotate(q + int64_t{h} * head_dim, a.cos + angles, a.sin + angles, a.rotary_dim / 2);

    const int block = a.slot_mapping[row] / a.kv.block_size;
    const int position = a.slot_mapping[row] % a.kv.block_size;
    for (int h = 0; h < a.kv.kv_heads; ++h, k += head_dim, v += head_dim) {
        const KvHead to = kv_head(a.kv, block, h);
        if (a.kv.format == REEF_KV_INT8) write_codes(a.kv, k, v, position, to);
        else write_bf16(a.kv, k, v, position, to);
    }
}

void store_rows(const void* args, int chunk) {
    const auto& a = *static_cast<const ReefStoreArgs*>(args);
    const int rows = rows_per_chunk(a);
    const int end = std::min(a.rows, (chunk + 1) * rows);
    for (int row = chunk * rows; row < end; ++row) store_row(a, row);
}

}  // namespace

reef::Task store(const ReefStoreArgs* args, int) {
    const int rows = rows_per_chunk(*args);
    return {store_rows, args, (args->rows + rows - 1) / rows};
}

}  // namespace REEF_ISA
