// Computes attention over keys and values in bf16 with vector instructions.
#pragma once
#include "attention_keys.h"
#include "attention_tile.h"

namespace REEF_ISA {

// Adds the tile at position `start` to lanes [lane, lane + M) of the work.
template <int M, bool FETCH>
void attend_lanes(const reef::AttentionCall& a, const Work& work, const Bf16Tile& tile,
                  const Bf16Tile& next, int start, int lane, const bf16* q, Lanes* lanes) {
    Visible seen[M];
    for (int m = 0; m < M; ++m) seen[m] = work.visible(lane + m, start);
    attend_tile<M, FETCH>(q + lane * kQueryStride, tile, next, seen, score_rule(a), a.kv.head_dim,
                          lanes->highest + lane, lanes->sums + lane * 16,
                          lanes->out + lane * kOutStride);
}

template <bool FETCH>
constexpr decltype(&attend_lanes<1, FETCH>) kAttendLanes[] = {
    attend_lanes<1, FETCH>, attend_lanes<2, FETCH>, attend_lanes<3, FETCH>, attend_lanes<4, FETCH>,
#if defined(__AVX512BF16__)
    attend_lanes<5, FETCH>, attend_lanes<6, FETCH>, attend_lanes<7, FETCH>, attend_lanes<8, FETCH>,
#endif
};

class Bf16Attention {
public:
    Bf16Attention(const reef::AttentionCall& a, const Work& work) : a_(a), work_(work) {
        for (int lane = 0; lane < work.lanes(); ++lane)
            std::copy_n(query_of(a, work, lane), a.kv.head_dim, q_ + lane * kQueryStride);
    }

    void begin(const Tile&, int) {}

    // A tile that many lanes read is copied first, so that its runs lie side by side; any other
    // tile is read in place, and the next one is prefetched meanwhile.
    void add(const Tile& found, int start, const Tile* found_next, Lanes* lanes) {
        Bf16Tile tile = as_bf16(found);
        const Bf16Tile next = as_bf16(found_next ? *found_next : found);
        const int blocks = (work_.lanes() + kLanes - 1) / kLanes;
        if (blocks == 1)
            return kAttendLanes<true>[work_.lanes() - 1](a_, work_, tile, next, start, 0, q_,
                                                         lanes);
        copy(next, Runs(work_.visible_to_any(start)), &tile);
        for (int block = 0, lane = 0; block < blocks; ++block) {  // of nearly equal size
            const int count = (work_.lanes() - lane) / (blocks - block);
            kAttendLanes<false>[count - 1](a_, work_, tile, next, start, lane, q_, lanes);
            lane += count;
        }
    }

private:
    static Bf16Tile as_bf16(const Tile& tile) {
        Bf16Tile result;
        for (int r = 0; r < kRuns; ++r) {
            result.keys[r] = reinterpret_cast<const bf16*>(tile.keys[r]);
            result.values[r] = reinterpret_cast<const bf16*>(tile.values[r]);
        }
        return result;
    }

    void copy(const Bf16Tile& next, Runs runs, Bf16Tile* tile) {
        const int key_run = kRun * a_.kv.head_dim, value_run = kRun * padded_dim(a_.kv.head_dim);
        for (int r = runs.first; r < runs.last; ++r) {
            bf16 *keys = keys_ + r * key_run, *values = values_ + r * value_run;
            copy_run(tile->keys[r], next.keys[r], key_run, keys);
            copy_run(tile->values[r], next.values[r], value_run, values);
            tile->keys[r] = keys;
            tile->values[r] = values;
        }
    }

    // Copies n elements of a run, n a multiple of 32, and prefetches those of the run `next`.
    static void copy_run(const bf16* from, const bf16* next, int n, bf16* to) {
        for (int i = 0; i < n; i += 32) {
            fetch(next + i);
            std::memcpy(to + i, from + i, 64);
        }
    }

    const reef::AttentionCall& a_;
    const Work& work_;
    alignas(64) bf16 q_[kMaxLanes * kQueryStride];
    alignas(64) bf16 keys_[kTile * kMaxHeadDim];
    alignas(64) bf16 values_[kTile * kMaxHeadDim];
};

}  // namespace REEF_ISA
