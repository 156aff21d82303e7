// Finds the tiles of a request in its KV blocks.
#pragma once
#include <initializer_list>

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

// Prefetches a tile's values little by little, while its keys are read and something else is
// computed.
class ValuesAhead {
public:
    // Takes the runs that some lane sees of the tile at `start`, if there is a tile.
    ValuesAhead(const ReefKvLayer& kv, const Tile* tile, int start, const Work& work)
        : tile_(tile), lines_((kRun * value_bytes(kv) + 63) / 64), lanes_(work.lanes()) {
        if (!tile) return;
        const Runs runs(work.visible_to_any(start));
        run_ = runs.first;
        last_ = runs.last;
        step_ = ((last_ - run_) * lines_ + lanes_ - 1) / lanes_;
    }

    // Prefetches one lane's share.
    void fetch_share() {
        for (int i = 0; i < step_ && run_ < last_; ++i) {
            fetch(tile_->values[run_] + 64 * line_);
            if (++line_ < lines_) continue;
            line_ = 0;
            ++run_;
        }
    }

private:
    const Tile* tile_;
    const int lines_, lanes_;
    int run_ = 0, last_ = 0, step_ = 0, line_ = 0;
};

// Prefetches the first lines of each run, from which the processor's own prefetching goes on. To
// prefetch every line would be slower than the reading itself.
inline void fetch_starts(const Tile& tile, Runs runs) {
    for (int r = runs.first; r < runs.last; ++r)
        for (const uint8_t* at : {tile.keys[r], tile.values[r]}) {
            fetch(at);
            fetch(at + 64);
        }
}

}  // namespace REEF_ISA
