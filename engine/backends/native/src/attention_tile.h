// Computes attention on one tile of keys in bf16, with vector instructions: scores, softmax,
// weighted values. An invisible key's value, which may be NaN, enters no product.
#pragma once
#include "attention_lanes.h"

namespace REEF_ISA {

constexpr int kPairs = kRun / 2;  // pairs of positions in a run

#if defined(__AVX512BF16__)
constexpr int kLanes = 8;          // lanes computed together
constexpr int kAccumulators = 24;  // vectors of sums that fit into the registers
#else
constexpr int kLanes = 4;
constexpr int kAccumulators = 4;
#endif
constexpr int kQueryStride = kMaxHeadDim + 32;

// Points to a tile's keys and values, run by run.
struct Bf16Tile {
    const bf16* keys[kRuns];    // [head_dim / 2][16][2]
    const bf16* values[kRuns];  // [8][padded_dim][2]
};

// Returns how many vectors per lane can be summed at once with all accumulators in registers.
constexpr int vectors_for(int lanes) {
    return lanes * 4 <= kAccumulators ? 4 : lanes * 2 <= kAccumulators ? 2 : 1;
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
void scores(const bf16* q, const Bf16Tile& tile, const Bf16Tile& next, int first, int last,
            int head_dim, float* s) {
    constexpr int R = vectors_for(M);
    int r = first;
    for (; r + R <= last; r += R)
        score_runs<M, R, FETCH>(q, tile.keys + r, next.keys + r, head_dim, s + r * kRun);
    for (; r < last; ++r)
        score_runs<M, 1, FETCH>(q, tile.keys + r, next.keys + r, head_dim, s + r * kRun);
}

// ==== Values ====

// Adds p v to o [M], over whole pairs of positions first <= pair < last, for the N vectors of
// dimensions from number `vector` on.
template <int M, int N, bool FETCH>
inline void add_vectors(const bf16* p, const Bf16Tile& tile, const Bf16Tile& next, int first,
                        int last, int width, int vector, float* out) {
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
void add_values(const bf16* p, const Bf16Tile& tile, const Bf16Tile& next, int first, int last,
                int width, float* out) {
    constexpr int N = vectors_for(M);
    int vector = 0;
    for (; (vector + N) * 16 <= width; vector += N)
        add_vectors<M, N, FETCH>(p, tile, next, first, last, width, vector, out);
    for (; vector * 16 < width; ++vector)
        add_vectors<M, 1, FETCH>(p, tile, next, first, last, width, vector, out);
}

// Adds p v to one lane's o over keys from <= key < to. At either end one key of a pair may be
// invisible.
inline void add_edge(const bf16* p, const Bf16Tile& tile, int from, int to, int width, float* out) {
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
void attend_tile(const bf16* q, const Bf16Tile& tile, const Bf16Tile& next, const Visible* seen,
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
        const LaneState lane = {highest + m, sums + m * 16};
        rescale(out + m * kOutStride, width,
                softmax(s + m * kTile, seen[m], rule, lane, p + m * kTile));
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
