// Finds the tiles of a request in its KV blocks, and copies them side by side.
#pragma once
#include "attention_tile.h"

namespace REEF_ISA {

// Locates the KV of one request's kv head.
struct Keys {
    const ReefKvLayer& kv;
    const int32_t* block_table;
    int head;
};

// Sets the runs first <= run < last of the tile that begins at position `start`.
inline void find_runs(const Keys& of, int start, int first, int last, Tile* tile) {
    const int head_dim = of.kv.head_dim, bytes = element_bytes(of.kv);
    for (int r = first; r < last; ++r) {
        const int position = start + r * kRun, offset = position % of.kv.block_size;
        const KvHead at = kv_head(of.kv, of.block_table[position / of.kv.block_size], of.head);
        const uint8_t* keys = at.keys + bytes * key_offset(head_dim, offset, 0);
        const uint8_t* values = at.values + bytes * value_offset(head_dim, offset, 0);
        tile->keys[r] = reinterpret_cast<const bf16*>(keys);
        tile->values[r] = reinterpret_cast<const bf16*>(values);
        if (!at.key_scales) continue;
        tile->key_scales[r] = at.key_scales + offset;
        tile->value_scales[r] = at.value_scales + offset;
    }
}

// Copies n elements of a run, n a multiple of 32, and prefetches those of the run `next`.
inline void copy_run(const bf16* from, const bf16* next, int n, bf16* x) {
    for (int i = 0; i < n; i += 32) {
        fetch(next + i);
        store_pairs(x + i, load_pairs(from + i));
    }
}

// Copies int8 codes as bf16, which holds every whole number up to 127 exactly.
inline void copy_run(const int8_t* from, const int8_t* next, int n, bf16* x) {
#if defined(__AVX512BF16__)
    const auto sixteen = [](const int8_t* p) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return F16{_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))};
    };
    for (int i = 0; i < n; i += 32) {
        fetch(next + i);
        store_pairs(x + i, round_pairs(sixteen(from + i), sixteen(from + i + 16)));
    }
#else
    for (int i = 0; i < n; i += 8) {
        fetch(next + i);
        const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i));
        const __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)));
        const __m256i high = _mm256_srli_epi32(bits, 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x88);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(x + i), _mm256_castsi256_si128(packed));
    }
#endif
}

// Holds a copy of a tile in bf16, its runs side by side.
struct LocalTile {
    alignas(64) bf16 keys[kTile * kMaxHeadDim];
    alignas(64) bf16 values[kTile * kMaxHeadDim];
};

// Replaces runs first <= r < last of a tile by copies in `local`. The blocks hold Elements.
template <class Element>
void copy_runs(const Tile& next, int first, int last, int head_dim, LocalTile* local, Tile* tile) {
    const auto elements = [](const bf16* p) { return reinterpret_cast<const Element*>(p); };
    const int key_run = kRun * head_dim, value_run = kRun * padded_dim(head_dim);
    for (int r = first; r < last; ++r) {
        bf16 *keys = local->keys + r * key_run, *values = local->values + r * value_run;
        copy_run(elements(tile->keys[r]), elements(next.keys[r]), key_run, keys);
        copy_run(elements(tile->values[r]), elements(next.values[r]), value_run, values);
        tile->keys[r] = keys;
        tile->values[r] = values;
    }
}

}  // namespace REEF_ISA
