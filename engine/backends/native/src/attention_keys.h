// Finds the tiles of a request in its KV blocks.
#pragma once
#include "attention_lanes.h"

namespace REEF_ISA {

// Prefetches the cache line at p into the second level only, since the first level is full.
inline void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Locates the KV of one request's kv head.
struct Keys {
    const ReefKvLayer& kv;
    const int32_t* block_table;
    int head;
};

// Describes the runs first <= run < last of a tile.
struct Runs {
    int first, last;
    explicit Runs(Visible seen) : first(seen.from / kRun), last((seen.to + kRun - 1) / kRun) {}
};

// Sets some runs of the tile that begins at position `start`.
inline void find_runs(const Keys& of, int start, Runs runs, Tile* tile) {
    const int of_key = key_bytes(of.kv), of_value = value_bytes(of.kv);
    for (int r = runs.first; r < runs.last; ++r) {
        const int position = start + r * kRun, offset = position % of.kv.block_size;
        const KvHead at = kv_head(of.kv, of.block_table[position / of.kv.block_size], of.head);
        tile->keys[r] = at.keys + int64_t{offset} * of_key;
        tile->values[r] = at.values + int64_t{offset} * of_value;
        if (!at.key_scales) continue;
        tile->key_scales[r] = at.key_scales + offset;
        tile->value_scales[r] = at.value_scales + offset;
    }
}

}  // namespace REEF_ISA
