// Computes attention on one tile of 64 keys: scores, online softmax, weighted values.
//
// A lane is one head of one query. Its scores are s = q.k over the dimensions in order; in units
// of log2, t = s * scale * log2(e), capped and masked; with m the highest t so far,
//
//     p = 2^(t - m),   sum = sum * 2^(m_before - m) + p,   o = o * 2^(m_before - m) + p v
//
// and the lane's result is o / sum. Tiles begin at multiples of 64 positions and are taken in
// order, and every sum runs in one fixed order that does not depend on other lanes. The bits of a
// lane's result therefore depend only on its query and on the keys that it sees. An invisible key
// has t = -infinity and p = 0, and its value, which may be NaN, enters no product.
//
// p is rounded to bf16 for the product with v, and `sum` adds the rounded p: an error of p then
// changes o in proportion to v - o, not to v. With int8 values p * scale is rounded, and `sum` adds
// p unrounded.
#pragma once
#include <algorithm>

#include "kv_layout.h"
#include "simd.h"

namespace REEF_ISA {

constexpr int kTile = 64;  // keys of a tile
constexpr int kRuns = kTile / kRun;
constexpr int kPairs = kRun / 2;  // pairs of positions in a run

#if defined(__AVX512BF16__)
constexpr int kLanes = 8;          // lanes computed together
constexpr int kAccumulators = 24;  // vectors of sums that fit into the registers
#else
constexpr int kLanes = 4;
constexpr int kAccumulators = 4;
#endif

// Strides between lanes, in elements. They are odd multiples of a cache line, since powers of two
// would map all lanes to few sets of the cache.
constexpr int kQueryStride = kMaxHeadDim + 32;
constexpr int kOutStride = kMaxHeadDim + 16;

// Points to the keys and values of a tile, run by run. Runs that no lane sees are not set.
struct Tile {
    const bf16* keys[kRuns];    // [head_dim / 2][16][2]
    const bf16* values[kRuns];  // [8][padded_dim][2]
    const float* key_scales[kRuns];
    const float* value_scales[kRuns];
};

// Prefetches the cache line at p into the second level only, since the first level is full.
inline void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Describes the keys of a tile that a lane sees: from <= key < to; none where from >= to.
struct Visible {
    int from, to;
    bool empty() const { return from >= to; }
    uint16_t bits(int run) const {
        const uint64_t below = to < kTile ? (uint64_t{1} << to) - 1 : ~uint64_t{0};
        return static_cast<uint16_t>((below & ~uint64_t{0} << from) >> run * kRun);
    }
};

// Describes how t is computed from s.
struct ScoreRule {
    float scale;  // t = s * scale; with a cap, s * scale is 2 log2(e) times the argument of tanh
    float cap;    // in units of log2; 0: none
    bool scaled;  // keys and values are int8 with scales
};

struct LaneState {
    float* highest;  // m
    float* sums;     // [16]: parts of sum
    float* out;      // o
};

// Returns how many vectors per lane can be summed at once with all accumulators in registers.
constexpr int vectors_for(int lanes) {
    return lanes * 4 <= kAccumulators ? 4 : lanes * 2 <= kAccumulators ? 2 : 1;
}

// ==== Vectors ====

// Returns a[i] where bit i is set, else b[i].
#if defined(__AVX512BF16__)
inline F16 keep(F16 a, uint16_t bits, F16 b) { return {_mm512_mask_blend_ps(bits, b.v, a.v)}; }
#else
inline __m256 keep(__m256 a, int bits, __m256 b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane), lane);
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(kept));
}
inline F16 keep(F16 a, uint16_t bits, F16 b) {
    return {keep(a.lo, bits, b.lo), keep(a.hi, bits >> 8, b.hi)};
}
#endif

// Returns 2^a with a relative error of at most 3e-6, and none for whole a. 2^-infinity is 0, and
// NaN stays NaN.
#if defined(__AVX512BF16__)
inline F16 exp2(F16 a) {
    const F16 r = {_mm512_reduce_ps(a.v, 0x09)};  // a - floor(a)
#else
inline F16 floor(F16 a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
inline F16 exp2(F16 a) {
    // power_of_two(-127) is 0; min and max return the second operand where it is NaN
    a = min(set1(127.f), max(set1(-127.f), a));
    const F16 n = floor(a);
    const F16 r = a - n;
#endif
    F16 p = set1(1.3426697252e-2f);
    p = fma(p, r, set1(5.2242451124e-2f));
    p = fma(p, r, set1(2.4128021745e-1f));
    p = fma(p, r, set1(6.9304484280e-1f));
    p = fma(p, r, set1(1.f));
#if defined(__AVX512BF16__)
    return {_mm512_scalef_ps(p.v, a.v)};
#else
    return p * power_of_two(n);
#endif
}

inline float exp2(float a) {
    float all[16];
    store(all, exp2(set1(a)));
    return all[0];
}

// Rounds 32 neighbouring values to bf16. AVX-512 rounds denormals to zero, AVX2 keeps them.
inline B32 round_pairs(F16 first, F16 second) {
#if defined(__AVX512BF16__)
    return {_mm512_cvtne2ps_pbh(second.v, first.v)};
#else
    bf16 rounded[32];
    store(rounded, first);
    store(rounded + 16, second);
    return load_pairs(rounded);
#endif
}

inline void store_pairs(bf16* p, B32 a) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(p, (__m512i)a.v);
#else
    auto* q = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(q, a.lo);
    _mm256_storeu_si256(q + 1, a.hi);
#endif
}

inline B32 repeat_bits(uint32_t bits) {
#if defined(__AVX512BF16__)
    return {(__m512bh)_mm512_set1_epi32(static_cast<int>(bits))};
#else
    return {_mm256_set1_epi32(static_cast<int>(bits)), _mm256_set1_epi32(static_cast<int>(bits))};
#endif
}

inline B32 operator&(B32 a, B32 b) {
#if defined(__AVX512BF16__)
    return {(__m512bh)_mm512_and_si512((__m512i)a.v, (__m512i)b.v)};
#else
    return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
#endif
}

// ==== Scores ====

// Computes s [M, kTile] of M queries and R runs of keys. FETCH: prefetches the runs of `next`.
template <int M, int R, bool FETCH>
inline void score_runs(const bf16* q, const bf16* const* keys, const bf16* const* next,
                       int head_dim, float* s) {
    F16 sums[M][R];
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) sums[m][r] = zero();
    for (int d = 0; d < head_dim; d += 2) {
        B32 k[R];
        for (int r = 0; r < R; ++r) k[r] = load_pairs(keys[r] + d * kRun);
        for (int r = 0; r < R && FETCH; ++r) fetch(next[r] + d * kRun);
        for (int m = 0; m < M; ++m) {
            const B32 pair = repeat_pair(q + m * kQueryStride + d);
            for (int r = 0; r < R; ++r) sums[m][r] = dot(k[r], pair, sums[m][r]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) store(s + m * kTile + r * kRun, sums[m][r]);
}

// Computes s for the runs first <= r < last, and leaves other scores as they are.
template <int M, bool FETCH>
void scores(const bf16* q, const Tile& tile, const Tile& next, int first, int last, int head_dim,
            float* s) {
    constexpr int R = vectors_for(M);
    int r = first;
    for (; r + R <= last; r += R)
        score_runs<M, R, FETCH>(q, tile.keys + r, next.keys + r, head_dim, s + r * kRun);
    for (; r < last; ++r)
        score_runs<M, 1, FETCH>(q, tile.keys + r, next.keys + r, head_dim, s + r * kRun);
}

// ==== Softmax ====

inline F16 to_log2(F16 s, const ScoreRule& rule) {
    const F16 t = s * set1(rule.scale);
    if (rule.cap == 0.f) return t;
    const F16 tanh = set1(1.f) - set1(2.f) / (exp2(t) + set1(1.f));
    return tanh * set1(rule.cap);
}

// Computes p [kTile] of one lane from its s, and returns 2^(m_before - m). Never inlined, so that
// multiplications and additions are fused in the same way for every number of lanes.
[[gnu::noinline]] inline float softmax(const float* s, const Tile& tile, Visible seen,
                                       const ScoreRule& rule, LaneState lane, bf16* p) {
    F16 t[kRuns];
    for (int r = 0; r < kRuns; ++r) {
        F16 scores = load(s + r * kRun);
        if (rule.scaled && seen.bits(r)) scores = scores * load(tile.key_scales[r]);
        t[r] = keep(to_log2(scores, rule), seen.bits(r), set1(-INFINITY));
    }
    const float before = *lane.highest;
    const float highest = std::max(before, largest(max(max(t[0], t[1]), max(t[2], t[3]))));
    for (int r = 0; r < kRuns; ++r) t[r] = exp2(t[r] - set1(highest));
    const float factor = highest == before ? 1.f : exp2(before - highest);
    F16 sums = load(lane.sums) * set1(factor);
    for (int r = 0; r < kRuns && rule.scaled; ++r) {
        sums = sums + t[r];
        if (seen.bits(r)) t[r] = keep(t[r] * load(tile.value_scales[r]), seen.bits(r), zero());
    }
    for (int r = 0; r < kRuns; r += 2) {
        const B32 pairs = round_pairs(t[r], t[r + 1]);
        if (!rule.scaled) sums = dot(pairs, repeat_bits(0x3f803f80), sums);  // bf16 ones
        store_pairs(p + r * kRun, pairs);
    }
    store(lane.sums, sums);
    *lane.highest = highest;
    return factor;
}

// ==== Values ====

// Adds p v to o [M], over whole pairs of positions first <= pair < last, for the N vectors of
// dimensions from number `vector` on.
template <int M, int N, bool FETCH>
inline void add_vectors(const bf16* p, const Tile& tile, const Tile& next, int first, int last,
                        int width, int vector, float* out) {
    F16 o[M][N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) o[m][n] = load(out + m * kOutStride + (vector + n) * 16);
    for (int pair = first; pair < last;) {
        const int run = pair / kPairs, end = std::min(last, (run + 1) * kPairs);
        const int64_t offset = int64_t{pair % kPairs} * 2 * width + vector * 32;
        const bf16 *v = tile.values[run] + offset, *ahead = next.values[run] + offset;
        for (; pair < end; ++pair, v += 2 * width, ahead += 2 * width) {
            B32 row[N];
            for (int n = 0; n < N; ++n) row[n] = load_pairs(v + n * 32);
            for (int n = 0; n < N && FETCH; ++n) fetch(ahead + n * 32);
            for (int m = 0; m < M; ++m) {
                const B32 weight = repeat_pair(p + m * kTile + 2 * pair);
                for (int n = 0; n < N; ++n) o[m][n] = dot(row[n], weight, o[m][n]);
            }
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) store(out + m * kOutStride + (vector + n) * 16, o[m][n]);
}

template <int M, bool FETCH>
void add_values(const bf16* p, const Tile& tile, const Tile& next, int first, int last, int width,
                float* out) {
    constexpr int N = vectors_for(M);
    int vector = 0;
    for (; (vector + N) * 16 <= width; vector += N)
        add_vectors<M, N, FETCH>(p, tile, next, first, last, width, vector, out);
    for (; vector * 16 < width; ++vector)
        add_vectors<M, 1, FETCH>(p, tile, next, first, last, width, vector, out);
}

// Adds p v to one lane's o over keys from <= key < to. At either end one key of a pair may be
// invisible.
inline void add_edge(const bf16* p, const Tile& tile, int from, int to, int width, float* out) {
    for (int pair = from / 2; pair * 2 < to; ++pair) {
        const bool even = pair * 2 >= from, odd = pair * 2 + 1 < to;
        const B32 seen = repeat_bits((even ? 0xffffu : 0u) | (odd ? 0xffff0000u : 0u));
        const B32 weight = repeat_pair(p + 2 * pair);
        const bf16* v = tile.values[pair / kPairs] + (pair % kPairs) * 2 * width;
        for (int d = 0; d < width; d += 16)
            store(out + d, dot(load_pairs(v + 2 * d) & seen, weight, load(out + d)));
    }
}

inline void rescale(float* out, int width, float factor) {
    if (factor == 1.f) return;
    for (int d = 0; d < width; d += 16) store(out + d, load(out + d) * set1(factor));
}

// ==== A tile ====

// Adds one tile to M lanes, and does not touch other lanes. FETCH: prefetches `next` meanwhile; all
// runs of `next` must be set.
template <int M, bool FETCH>
void attend_tile(const bf16* q, const Tile& tile, const Tile& next, const Visible* seen,
                 const ScoreRule& rule, int head_dim, float* highest, float* sums, float* out) {
    alignas(64) float s[M * kTile];
    alignas(64) bf16 p[M * kTile];
    const int width = padded_dim(head_dim);
    Visible any = {kTile, 0}, all = {0, kTile};
    for (int m = 0; m < M; ++m) {
        all = {std::max(all.from, seen[m].from), std::min(all.to, seen[m].to)};
        if (seen[m].empty()) continue;
        any = {std::min(any.from, seen[m].from), std::max(any.to, seen[m].to)};
    }
    if (any.empty()) return;
    scores<M, FETCH>(q, tile, next, any.from / kRun, (any.to + kRun - 1) / kRun, head_dim, s);
    for (int m = 0; m < M; ++m) {
        if (seen[m].empty()) continue;
        const LaneState lane = {highest + m, sums + m * 16, out + m * kOutStride};
        rescale(lane.out, width, softmax(s + m * kTile, tile, seen[m], rule, lane, p + m * kTile));
    }
    // Pairs of keys that all lanes see are added for all lanes at once, others lane by lane.
    const auto add_edges = [&](int from, int to) {
        for (int m = 0; m < M; ++m) {
            const int first = std::max(from, seen[m].from), last = std::min(to, seen[m].to);
            add_edge(p + m * kTile, tile, first, last, width, out + m * kOutStride);
        }
    };
    const int first = (all.from + 1) / 2, last = all.to / 2;
    if (first >= last) return add_edges(0, kTile);
    add_edges(0, first * 2);
    add_values<M, FETCH>(p, tile, next, first, last, width, out);
    add_edges(last * 2, kTile);
}

}  // namespace REEF_ISA
