// Defines what all kinds of attention share: lanes, tiles of keys, spans, and their results.
//
// A lane is one head of one query. Its scores are s = q.k; in units of log2, t = s * scale *
// log2(e), capped and masked; with m the highest t so far,
//
//     p = 2^(t - m),   sum = sum * 2^(m_before - m) + p,   o = o * 2^(m_before - m) + p v
//
// over a span of keys, and its record of the span is (m, sum, o). Records are merged in the order
// of spans, and the lane's result is o / sum. Tiles and spans begin at multiples of their size, and
// every sum runs in one fixed order that does not depend on other lanes, nor on which threads
// compute which spans. The bits of a lane's result therefore depend only on its query and on the
// keys that it sees. An invisible key has t = -infinity and p = 0.
#pragma once
#include <algorithm>

#include "kv_layout.h"
#include "simd.h"

namespace REEF_ISA {

constexpr int kTile = 64;  // keys of a tile
constexpr int kRuns = kTile / kRun;
constexpr int kSpan = 1024;    // keys of a span, which a thread may compute apart from others
constexpr int kMaxLanes = 64;  // of a chunk

// Strides between lanes, in elements. They are odd multiples of a cache line, since powers of two
// would map all lanes to few sets of the cache.
constexpr int kOutStride = kMaxHeadDim + 16;

// Points to the keys and values of a tile, run by run. Runs that no lane sees are not set.
struct Tile {
    const uint8_t *keys[kRuns], *values[kRuns];
    const float *key_scales[kRuns], *value_scales[kRuns];
};

// Describes the keys of a tile that a lane sees: from <= key < to; none where from >= to.
struct Visible {
    int from, to;
    bool empty() const { return from >= to; }
    bool operator==(Visible other) const { return from == other.from && to == other.to; }
    uint64_t bits() const {
        if (empty()) return 0;
        const uint64_t below = to < kTile ? (uint64_t{1} << to) - 1 : ~uint64_t{0};
        return below & ~uint64_t{0} << from;
    }
    uint16_t bits(int run) const { return static_cast<uint16_t>(bits() >> run * kRun); }
};

// Describes rows of one request, and query heads that share a kv head.
struct Work {
    int request, first_row, rows;
    int kv_head, first_head, heads;
    int position;                               // of the first row's token
    int window;                                 // 0: none
    int lanes() const { return rows * heads; }  // lane = row * heads + head

    int first_key(int row) const {
        return window > 0 ? std::max(0, position + row - window + 1) : 0;
    }
    Visible visible(int lane, int start) const {  // of the tile at position `start`
        const int row = lane / heads, to = position + row + 1 - start;
        return {std::max(0, first_key(row) - start), std::min(kTile, to)};
    }
    Visible visible_to_any(int start) const {
        return {std::max(0, first_key(0) - start), std::min(kTile, position + rows - start)};
    }
};

inline const uint16_t* query_of(const ReefAttentionArgs& a, const Work& work, int lane) {
    const int row = work.first_row + lane / work.heads, head = work.first_head + lane % work.heads;
    return a.q + row * a.q_stride + int64_t{head} * a.kv.head_dim;
}

// Describes how t is computed from s.
struct ScoreRule {
    float scale;  // t = s * scale; with a cap, s * scale is 2 log2(e) times the argument of tanh
    float cap;    // in units of log2; 0: none
};

inline ScoreRule score_rule(const ReefAttentionArgs& a) {
    constexpr float kLog2E = 1.44269504089f;
    if (a.soft_cap == 0.f) return {a.scale * kLog2E, 0.f};
    return {2.f * kLog2E * a.scale / a.soft_cap, a.soft_cap * kLog2E};
}

// Holds the running results of a span's lanes.
struct Lanes {
    alignas(64) float out[kMaxLanes * kOutStride];
    alignas(64) float sums[kMaxLanes * 16];  // parts of each lane's sum
    float highest[kMaxLanes];

    void clear(int lanes, int width);
};

// ==== What decides bits, compiled once per instruction set (attention_lanes.cpp) ====

struct LaneState {
    float* highest;
    float* sums;  // [16]
};

// Computes p [kTile], in bf16, of one lane from its s [kTile], and returns 2^(m_before - m). p is
// rounded for the product with v, and `sum` adds the rounded p: an error of p then changes o in
// proportion to v - o, not to v.
float softmax(const float* s, Visible seen, const ScoreRule& rule, LaneState lane, bf16* p);

// Describes a lane of integers: s = (256 high + low - offset) * scale * the key's scale.
struct IntegerScores {
    const int32_t *high, *low;  // [kTile]
    int32_t offset;
    float scale;
};
// Holds the scales of a tile's values: each is `largest` times a share of kMostWeight.
struct ValueScales {
    alignas(64) float shares[kTile];  // 0 where a value is not seen
    float largest;
    Visible seen;
};
constexpr float kMostWeight = 65535.f;
void scale_values(const Tile& tile, Visible seen, ValueScales* scales);

// Describes what a lane's weights p become: 2^(t - n) * share, rounded, where n is the tile's
// highest t: none is too small for 16 bits that is not small beside another of its tile. o becomes
// o * factor + (256 high + low) v * scale.
struct IntegerWeights {
    uint8_t *high, *low;  // [kTile]
    float scale, factor;  // factor = 2^(m_before - m)
};
void softmax(const IntegerScores& s, const Tile& tile, const ValueScales& values,
             const ScoreRule& rule, LaneState lane, IntegerWeights* weights);

// Computes o = o * factor + products.
void add_products(const float* products, float factor, int width, float* out);
void add_products(const int32_t* high, const int32_t* low, const IntegerWeights& weights, int width,
                  float* out);

// Rounds a head's query to 16 bits: q = (256 high + low) * scale, both signed; scale is NaN where
// q is not finite. Writes `depth` bytes each, zeros behind head_dim, and returns the sum of all
// 256 high + low.
int32_t round_query(const bf16* q, int head_dim, int depth, int8_t* high, int8_t* low,
                    float* scale);

// A record is a lane's m, its sum, and from kRecordHead on its o.
constexpr int kRecordHead = 16;
constexpr int kRecord = kRecordHead + kMaxHeadDim;
void clear_record(float* record);
void write_record(const Lanes& lanes, int lane, int width, float* record);
void merge_record(const float* record, int width, float* total);
void finish_record(const float* total, int head_dim, uint16_t* out);

}  // namespace REEF_ISA
