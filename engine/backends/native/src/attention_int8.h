// Computes attention over keys and values in int8, without making floats of either.
//
// A query is rounded to 16 bits, and so are a tile's weights, each lane's by a scale of its own; a
// product of 16 bits is two products of bytes, whose sums are exact. An invisible key's weight is
// zero, whatever its codes are.
//
// Products computes the sums of bytes, for at most Products::kLanesAtOnce lanes at a time: with
// vector instructions below, in tiles in amx_attention.cpp.
#pragma once
#include "attention_pipeline.h"
#include "simd_int8.h"

namespace REEF_ISA {

// Strides between lanes: odd multiples of a cache line.
constexpr int kByteStride = kMaxHeadDim + 64;  // of queries
constexpr int kScoreStride = kTile + 16;

// Holds halves of 16-bit numbers, lane by lane.
template <class T>
struct Halves {
    T *high, *low;
    int64_t stride;
    Halves at(int lane) const { return {high + lane * stride, low + lane * stride, stride}; }
};

template <class Products>
class Int8Attention {
public:
    static constexpr int kLanesAtOnce = Products::kLanesAtOnce;

    Int8Attention(const reef::AttentionCall& a, const Work& work, int lanes)
        : work_(work),
          rule_(score_rule(a)),
          width_(padded_dim(a.kv.head_dim)),
          products_(a.kv.head_dim, lanes) {
        for (int lane = 0; lane < work.lanes(); ++lane) {
            const int row = work.first_row + lane / work.heads;
            const int head = work.first_head + lane % work.heads;
            const uint16_t* q = a.q + row * a.q_stride + int64_t{head} * a.kv.head_dim;
            const Halves<int8_t> to = queries().at(lane);
            // a key's code counts from 128
            offset_[lane] =
                128 * round_query(q, a.kv.head_dim, width_, to.high, to.low, scale_ + lane);
        }
    }

    void keys(const Step& step) {
        products_.keys(queries().at(step.first), step.tile.keys, runs(step), scores(step));
    }

    void weights(const Step& step, ValuesAhead* ahead, Lanes* lanes) {
        ValueScales values;
        for (int i = 0; i < step.count; ++i) {
            const int lane = step.first + i;
            const Halves<int32_t> s = scores(step).at(i);
            const Visible seen = work_.visible(lane, step.start);
            if (i == 0 || !(seen == values.seen)) scale_values(step.tile, seen, &values);
            weights_[i] = {p_high_ + i * kTile, p_low_ + i * kTile, 0.f, 1.f};
            softmax({s.high, s.low, offset_[lane], scale_[lane]}, step.tile, values, rule_,
                    {lanes->highest + lane, lanes->sums + lane * 16}, weights_ + i);
            ahead->fetch_share();
        }
    }

    void values(const Step& step, Lanes* lanes) {
        products_.values({p_high_, p_low_, kTile}, step.tile.values, runs(step), width_,
                         {o_high_, o_low_, kOutStride});
        for (int i = 0; i < step.count; ++i)
            add_products(o_high_ + i * kOutStride, o_low_ + i * kOutStride, weights_[i], width_,
                         lanes->out + (step.first + i) * kOutStride);
    }

private:
    Halves<int8_t> queries() { return {q_high_, q_low_, kByteStride}; }
    Halves<int32_t> scores(const Step& step) {
        return {s_high_[step.buffer], s_low_[step.buffer], kScoreStride};
    }
    Runs runs(const Step& step) const { return Runs(work_.visible_to_any(step.start)); }

    const Work& work_;
    const ScoreRule rule_;
    const int width_;
    Products products_;
    float scale_[kMaxLanes];
    int32_t offset_[kMaxLanes];
    IntegerWeights weights_[kLanesAtOnce];
    alignas(64) int8_t q_high_[kMaxLanes * kByteStride], q_low_[kMaxLanes * kByteStride];
    alignas(64) int32_t s_high_[kStepBuffers][kLanesAtOnce * kScoreStride];
    alignas(64) int32_t s_low_[kStepBuffers][kLanesAtOnce * kScoreStride];
    alignas(64) uint8_t p_high_[kLanesAtOnce * kTile], p_low_[kLanesAtOnce * kTile];
    alignas(64) int32_t o_high_[kLanesAtOnce * kOutStride], o_low_[kLanesAtOnce * kOutStride];
};

// Computes byte products with vector instructions.
class VectorProducts {
public:
#if defined(__AVX512BF16__)
    static constexpr int kLanesAtOnce = 8;
#else
    static constexpr int kLanesAtOnce = 2;
#endif

    VectorProducts(int head_dim, int lanes) : fours_((head_dim + 3) / 4), lanes_(lanes) {}

    // Sets s = q k, of which k is unsigned.
    void keys(Halves<int8_t> q, const uint8_t* const* keys, Runs runs, Halves<int32_t> s) const {
        const Halves<const uint8_t> bytes = {reinterpret_cast<const uint8_t*>(q.high),
                                             reinterpret_cast<const uint8_t*>(q.low), q.stride};
        for (int r = runs.first; r < runs.last; ++r) {
            const auto four = [&](int i) { return keys[r] + i * 64; };
            multiply<false>(bytes, fours_, four, {s.high + r * kRun, s.low + r * kRun, s.stride});
        }
    }

    // Sets o = p v, of which p is unsigned.
    void values(Halves<const uint8_t> p, const uint8_t* const* values, Runs runs, int width,
                Halves<int32_t> o) const {
        constexpr int kFours = kRun / 4;
        const int first = runs.first * kFours;
        const Halves<const uint8_t> seen = {p.high + first * 4, p.low + first * 4, p.stride};
        for (int d = 0; d < width; d += 16) {
            const auto four = [&](int i) {
                return values[(first + i) / kFours] + ((first + i) % kFours * width + d) * 4;
            };
            multiply<true>(seen, runs.last * kFours - first, four,
                           {o.high + d, o.low + d, o.stride});
        }
    }

private:
    // Sets 16 sums c of a * b over fours for each lane; b(i) points to four i of 16 columns.
    template <bool UNSIGNED, int M = kLanesAtOnce, class B>
    void multiply(Halves<const uint8_t> a, int fours, B b, Halves<int32_t> c) const {
        if constexpr (M > 1)
            if (lanes_ < M) return multiply<UNSIGNED, M - 1>(a, fours, b, c);
        I16 highs[M], lows[M];
        for (int m = 0; m < M; ++m) highs[m] = lows[m] = set1(0);
        for (int i = 0; i < fours; ++i) {
            const Q64 all = load_fours(b(i));
            for (int m = 0; m < M; ++m) {
                highs[m] = dot<UNSIGNED>(repeat_four(a.at(m).high + i * 4), all, highs[m]);
                lows[m] = dot<UNSIGNED>(repeat_four(a.at(m).low + i * 4), all, lows[m]);
            }
        }
        for (int m = 0; m < M; ++m) {
            store(c.at(m).high, highs[m]);
            store(c.at(m).low, lows[m]);
        }
    }

    template <bool UNSIGNED>
    static I16 dot(Q64 a, Q64 b, I16 c) {
        return UNSIGNED ? dot_fours(a, b, c) : dot_fours(b, a, c);
    }

    const int fours_, lanes_;
};

}  // namespace REEF_ISA
