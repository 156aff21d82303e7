// Computes attention over keys and values in int8, without making floats of either.
//
// A query is rounded to 16 bits, and so are a tile's weights, each lane's by a scale of its own; a
// product of 16 bits is two products of bytes, whose sums are exact. An invisible key's weight is
// zero, whatever its codes are.
//
// Products computes sums of bytes: multiply(...) below says which.
#pragma once
#include "attention_keys.h"
#include "simd_int8.h"

namespace REEF_ISA {

// Strides between lanes, in elements: odd multiples of a cache line.
constexpr int kDepthStride = kMaxHeadDim + 64;  // of queries in bytes
constexpr int kTileStride = kTile + 16;         // of scores

// Describes sums c[lane][column * 16 + i] += a[lane][4 g + j] * b[column][g][i][j] over fours g and
// their members j, for both halves of a.
struct ByteProducts {
    const uint8_t *high, *low;  // a: halves, lane by lane
    int64_t stride;             // of a in bytes
    int fours;                  // in use
    const uint8_t* b;           // [columns][column_bytes]
    int64_t column_bytes;
    int first, last;             // columns
    int32_t *c_high, *c_low;     // not added to, but set
    int64_t c_stride;
};

template <class Products>
class Int8Attention {
public:
    Int8Attention(const reef::AttentionCall& a, const Work& work)
        : a_(a),
          work_(work),
          rule_(score_rule(a)),
          width_(padded_dim(a.kv.head_dim)),
          fours_((a.kv.head_dim + 3) / 4),
          products_(work.lanes()) {
        for (int lane = 0; lane < work.lanes(); ++lane) {
            const int row = work.first_row + lane / work.heads;
            const int head = work.first_head + lane % work.heads;
            const uint16_t* q = a.q + row * a.q_stride + int64_t{head} * a.kv.head_dim;
            const int64_t at = int64_t{lane} * kDepthStride;
            // a key's code counts from 128
            offset_[lane] = 128 * round_query(q, a.kv.head_dim, Products::depth(a.kv.head_dim),
                                              high_ + at, low_ + at, scale_ + lane);
        }
    }

    void add(const Tile& tile, const Tile& next, Runs runs, int start, Lanes* lanes) {
        copy(tile, next, runs);
        const auto bytes = [](const int8_t* p) { return reinterpret_cast<const uint8_t*>(p); };
        products_.template multiply<false>({bytes(high_), bytes(low_), kDepthStride, fours_, keys_,
                                            kTile / kRuns * Products::depth(a_.kv.head_dim),
                                            runs.first, runs.last, s_high_, s_low_, kTileStride});
        IntegerWeights weights[kMaxLanes];
        for (int lane = 0; lane < work_.lanes(); ++lane) {
            weights[lane] = {p_high_ + lane * kTile, p_low_ + lane * kTile, 0.f, 1.f};
            const int64_t at = int64_t{lane} * kTileStride;
            softmax({s_high_ + at, s_low_ + at, offset_[lane], scale_[lane]}, tile,
                    work_.visible(lane, start), rule_,
                    {lanes->highest + lane, lanes->sums + lane * 16}, weights + lane);
        }
        products_.template multiply<true>({p_high_, p_low_, kTile, kTile / 4, values_, kTile * 16,
                                           0, width_ / 16, o_high_, o_low_, kOutStride});
        for (int lane = 0; lane < work_.lanes(); ++lane) {
            const int64_t at = int64_t{lane} * kOutStride;
            add_products(o_high_ + at, o_low_ + at, weights[lane], width_, lanes->out + at);
        }
    }

private:
    // Copies keys as [run][four][16][4] and values as [16 dimensions][16 fours][16][4], and
    // prefetches the next tile.
    void copy(const Tile& tile, const Tile& next, Runs runs) {
        const int key_run = 64 * fours_, key_stride = kRun * Products::depth(a_.kv.head_dim);
        for (int r = runs.first; r < runs.last; ++r) {
            for (int i = 0; i < key_run; i += 64) {
                fetch(next.keys[r] + i);
                std::memcpy(keys_ + r * key_stride + i, tile.keys[r] + i, 64);
            }
            const uint8_t *from = tile.values[r], *ahead = next.values[r];
            for (int four = 0; four < kRun / 4; ++four)
                for (int d = 0; d < width_; d += 16, from += 64, ahead += 64) {
                    fetch(ahead);
                    std::memcpy(values_ + d * kTile + (r * kRun / 4 + four) * 64, from, 64);
                }
        }
    }

    const reef::AttentionCall& a_;
    const Work& work_;
    const ScoreRule rule_;
    const int width_, fours_;
    Products products_;
    float scale_[kMaxLanes];
    int32_t offset_[kMaxLanes];
    alignas(64) int8_t high_[kMaxLanes * kDepthStride], low_[kMaxLanes * kDepthStride];
    alignas(64) uint8_t keys_[kTile * kMaxHeadDim], values_[kTile * kMaxHeadDim];
    alignas(64) int32_t s_high_[kMaxLanes * kTileStride], s_low_[kMaxLanes * kTileStride];
    alignas(64) uint8_t p_high_[kMaxLanes * kTile], p_low_[kMaxLanes * kTile];
    alignas(64) int32_t o_high_[kMaxLanes * kOutStride], o_low_[kMaxLanes * kOutStride];
};

// Computes byte products with vector instructions.
class VectorProducts {
public:
    explicit VectorProducts(int lanes) : lanes_(lanes) {}

    // Returns the bytes of a query or key: whole vectors.
    static int depth(int head_dim) { return padded_dim(head_dim); }

    // UNSIGNED: a is unsigned and b signed, else a is signed and b unsigned.
    template <bool UNSIGNED>
    void multiply(const ByteProducts& p) const {
        for (int lane = 0; lane < lanes_;) {
            const int count = std::min(lanes_ - lane, kLanesAtOnce);
            for (int column = p.first; column < p.last; ++column)
                multiply_lanes<UNSIGNED>(p, lane, count, column);
            lane += count;
        }
    }

private:
#if defined(__AVX512BF16__)
    static constexpr int kLanesAtOnce = 8;
#else
    static constexpr int kLanesAtOnce = 2;
#endif

    template <bool UNSIGNED, int M = kLanesAtOnce>
    static void multiply_lanes(const ByteProducts& p, int lane, int count, int column) {
        if constexpr (M > 1)
            if (count < M) return multiply_lanes<UNSIGNED, M - 1>(p, lane, count, column);
        const uint8_t* b = p.b + column * p.column_bytes;
        const uint8_t *high = p.high + lane * p.stride, *low = p.low + lane * p.stride;
        I16 highs[M], lows[M];
        for (int m = 0; m < M; ++m) highs[m] = lows[m] = set1(0);
        for (int four = 0; four < p.fours; ++four) {
            const Q64 all = load_fours(b + four * 64);
            for (int m = 0; m < M; ++m) {
                highs[m] = dot<UNSIGNED>(repeat_four(high + m * p.stride + four * 4), all, highs[m]);
                lows[m] = dot<UNSIGNED>(repeat_four(low + m * p.stride + four * 4), all, lows[m]);
            }
        }
        for (int m = 0; m < M; ++m) {
            const int64_t at = (lane + m) * p.c_stride + column * 16;
            store(p.c_high + at, highs[m]);
            store(p.c_low + at, lows[m]);
        }
    }

    template <bool UNSIGNED>
    static I16 dot(Q64 a, Q64 b, I16 c) {
        return UNSIGNED ? dot_fours(a, b, c) : dot_fours(b, a, c);
    }

    const int lanes_;
};

}  // namespace REEF_ISA
