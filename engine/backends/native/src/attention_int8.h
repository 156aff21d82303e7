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

// Holds the high and the low bytes of a group of lanes, or products with them: all high ones come
// first, so that both are one matrix.
template <class T>
struct Halves {
    T* rows;
    int64_t stride;
    int lanes;  // in use, of a group
    T* high(int lane) const { return rows + lane * stride; }
    T* low(int lane) const { return rows + (lanes + lane) * stride; }
};

template <class Products>
class Int8Attention {
public:
    static constexpr int kLanesAtOnce = Products::kLanesAtOnce;

    Int8Attention(const reef::AttentionCall& a, const Work& work, int lanes)
        : work_(work),
          rule_(score_rule(a)),
          width_(padded_dim(a.kv.head_dim)),
          lanes_(lanes),
          products_(a.kv.head_dim, lanes) {
        for (int lane = 0; lane < work.lanes(); ++lane) {
            const uint16_t* q = query_of(a, work, lane);
            const Halves<int8_t> group = queries(lane / lanes * lanes);
            const int i = lane % lanes;
            // a key's code counts from 128
            offset_[lane] = 128 * round_query(q, a.kv.head_dim, width_, group.high(i), group.low(i),
                                              scale_ + lane);
        }
    }

    void keys(const Step& step) {
        for (int r = runs(step).first; r < runs(step).last; ++r)
            products_.keys(queries(step.first), step.tile.keys[r], r, scores(step));
    }

    void weights(const Step& step, ValuesAhead* ahead, Lanes* lanes) {
        const Halves<int32_t> s = scores(step);
        const Halves<uint8_t> p = {p_, kTile, lanes_};
        ValueScales values;
        for (int i = 0; i < step.count; ++i) {
            const int lane = step.first + i;
            const Visible seen = work_.visible(lane, step.start);
            if (i == 0 || !(seen == values.seen)) scale_values(step.tile, seen, &values);
            weights_[i] = {p.high(i), p.low(i), 0.f, 1.f};
            softmax({s.high(i), s.low(i), offset_[lane], scale_[lane]}, step.tile, values, rule_,
                    {lanes->highest + lane, lanes->sums + lane * 16}, weights_ + i);
            ahead->fetch_share();
        }
    }

    void values(const Step& step, Lanes* lanes) {
        const Halves<int32_t> o = {o_, kOutStride, lanes_};
        products_.values({p_, kTile, lanes_}, step.tile.values, runs(step), width_, o);
        for (int i = 0; i < step.count; ++i)
            add_products(o.high(i), o.low(i), weights_[i], width_,
                         lanes->out + (step.first + i) * kOutStride);
    }

private:
    static constexpr int kRows = 2 * kLanesAtOnce;

    Runs runs(const Step& step) const { return Runs(work_.visible_to_any(step.start)); }
    Halves<int8_t> queries(int first_lane) {
        return {q_ + 2 * first_lane * kByteStride, kByteStride, lanes_};
    }
    Halves<int32_t> scores(const Step& step) { return {s_[step.buffer], kScoreStride, lanes_}; }

    const Work& work_;
    const ScoreRule rule_;
    const int width_, lanes_;
    Products products_;
    float scale_[kMaxLanes];
    int32_t offset_[kMaxLanes];
    IntegerWeights weights_[kLanesAtOnce];
    alignas(64) int8_t q_[2 * kMaxLanes * kByteStride];
    alignas(64) int32_t s_[kStepBuffers][kRows * kScoreStride];
    alignas(64) uint8_t p_[kRows * kTile];
    alignas(64) int32_t o_[kRows * kOutStride];
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

    // Sets s = q k of a run, of which k is unsigned.
    void keys(Halves<int8_t> q, const uint8_t* keys, int run, Halves<int32_t> s) const {
        const auto* rows = reinterpret_cast<const uint8_t*>(q.rows);
        const auto four = [&](int i) { return keys + i * 64; };
        multiply<false>(rows, q.stride, fours_, four, s.rows + run * kRun, s.stride);
    }

    // Sets o = p v, of which p is unsigned.
    void values(Halves<const uint8_t> p, const uint8_t* const* values, Runs runs, int width,
                Halves<int32_t> o) const {
        constexpr int kFours = kRun / 4;
        const int first = runs.first * kFours;
        for (int d = 0; d < width; d += 16) {
            const auto four = [&](int i) {
                return values[(first + i) / kFours] + ((first + i) % kFours * width + d) * 4;
            };
            multiply<true>(p.rows + first * 4, p.stride, runs.last * kFours - first, four,
                           o.rows + d, o.stride);
        }
    }

private:
    // Sets 16 sums c of a * b over fours for each row; b(i) points to four i of 16 columns.
    template <bool UNSIGNED, int M = 2 * kLanesAtOnce, class B>
    void multiply(const uint8_t* a, int64_t stride, int fours, B b, int32_t* c,
                  int64_t c_stride) const {
        if constexpr (M > 2)
            if (2 * lanes_ < M) return multiply<UNSIGNED, M - 2>(a, stride, fours, b, c, c_stride);
        I16 sums[M];
        for (int m = 0; m < M; ++m) sums[m] = set1(0);
        for (int i = 0; i < fours; ++i) {
            const Q64 all = load_fours(b(i));
            for (int m = 0; m < M; ++m)
                sums[m] = dot<UNSIGNED>(repeat_four(a + m * stride + i * 4), all, sums[m]);
        }
        for (int m = 0; m < M; ++m) store(c + m * c_stride, sums[m]);
    }

    template <bool UNSIGNED>
    static I16 dot(Q64 a, Q64 b, I16 c) {
        return UNSIGNED ? dot_fours(a, b, c) : dot_fours(b, a, c);
    }

    const int fours_, lanes_;
};

}  // namespace REEF_ISA
