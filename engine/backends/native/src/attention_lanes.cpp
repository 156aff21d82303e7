// Computes what attention does lane by lane: softmax, weighted sums, records of spans. The kernels
// with and without AMX share this code, so that multiplications and additions are fused alike.
#include "attention_lanes.h"

#include "simd_int8.h"

namespace REEF_ISA {
namespace {

constexpr float kLowest = -1e30f;  // finite: the first tile's factor is 0, not NaN

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

inline B32 bf16_ones() {
    static const bf16 ones[2] = {0x3f80, 0x3f80};
    return repeat_pair(ones);
}

// Stores bits 8 to 15 and bits 0 to 7 of the integers nearest to 64 floats from 0 to 65535. One
// store for all, since a tile cannot be loaded from several smaller ones before they have ended.
inline void store_halves(const F16* a, uint8_t* high, uint8_t* low) {
#if defined(__AVX512BF16__)
    const auto pack = [](F16 first, F16 second) {
        return _mm512_packus_epi32(_mm512_cvtps_epi32(first.v), _mm512_cvtps_epi32(second.v));
    };
    const __m512i first = pack(a[0], a[1]), second = pack(a[2], a[3]);
    const __m512i lower = _mm512_set1_epi16(255);
    const __m512i order =  // packs take fours of each operand in turn
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i lows =
        _mm512_packus_epi16(_mm512_and_si512(first, lower), _mm512_and_si512(second, lower));
    const __m512i highs =
        _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
    _mm512_storeu_si512(low, _mm512_permutexvar_epi32(order, lows));
    _mm512_storeu_si512(high, _mm512_permutexvar_epi32(order, highs));
#else
    for (int r = 0; r < kRuns; ++r) {
        const __m256i whole = _mm256_permute4x64_epi64(
            _mm256_packus_epi32(_mm256_cvtps_epi32(a[r].lo), _mm256_cvtps_epi32(a[r].hi)), 0xd8);
        const __m256i lower = _mm256_and_si256(whole, _mm256_set1_epi16(255));
        const __m256i bytes =
            _mm256_permute4x64_epi64(_mm256_packus_epi16(lower, _mm256_srli_epi16(whole, 8)), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(low + r * 16), _mm256_castsi256_si128(bytes));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high + r * 16),
                         _mm256_extracti128_si256(bytes, 1));
    }
#endif
}

// Returns 256 high + low.
inline I16 join(const int32_t* high, const int32_t* low) {
#if defined(__AVX512BF16__)
    return {_mm512_add_epi32(_mm512_slli_epi32(load(high).v, 8), load(low).v)};
#else
    const I16 a = load(high), b = load(low);
    return {_mm256_add_epi32(_mm256_slli_epi32(a.lo, 8), b.lo),
            _mm256_add_epi32(_mm256_slli_epi32(a.hi, 8), b.hi)};
#endif
}

// Returns the largest of 16 floats, sixteen times.
inline F16 spread_largest(F16 a) {
#if defined(__AVX512BF16__)
    __m512 m = _mm512_max_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x4e));
    m = _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0xb1));
    m = _mm512_max_ps(m, _mm512_permute_ps(m, 0x4e));
    return {_mm512_max_ps(m, _mm512_permute_ps(m, 0xb1))};
#else
    return set1(largest(a));
#endif
}

inline float first(F16 a) {
#if defined(__AVX512BF16__)
    return _mm512_cvtss_f32(a.v);
#else
    return _mm256_cvtss_f32(a.lo);
#endif
}

// Caps and masks the t of a tile, and returns the highest, but at least kLowest.
inline F16 highest_of(F16* t, Visible seen, const ScoreRule& rule) {
    const uint64_t bits = seen.bits();
    for (int r = 0; r < kRuns; ++r) {
        if (rule.cap != 0.f) {
            const F16 tanh = set1(1.f) - set1(2.f) / (exp2(t[r]) + set1(1.f));
            t[r] = tanh * set1(rule.cap);
        }
        t[r] = keep(t[r], static_cast<uint16_t>(bits >> r * kRun), set1(-INFINITY));
    }
    return max(set1(kLowest), spread_largest(max(max(t[0], t[1]), max(t[2], t[3]))));
}

}  // namespace

void Lanes::clear(int lanes, int width) {
    for (int lane = 0; lane < lanes; ++lane) {
        std::fill_n(out + lane * kOutStride, width, 0.f);
        highest[lane] = kLowest;
    }
    std::fill_n(sums, lanes * 16, 0.f);
}

// ==== Softmax ====

float softmax(const float* s, Visible seen, const ScoreRule& rule, LaneState lane, bf16* p) {
    F16 t[kRuns];
    for (int r = 0; r < kRuns; ++r) t[r] = load(s + r * kRun) * set1(rule.scale);
    const F16 before = set1(*lane.highest);
    const F16 highest = max(before, highest_of(t, seen, rule));
    const F16 factor = exp2(before - highest);  // without a branch, which would often be mistaken
    F16 sums = load(lane.sums) * factor;
    for (int r = 0; r < kRuns; ++r) t[r] = exp2(t[r] - highest);
    for (int r = 0; r < kRuns; r += 2) {
        const B32 pairs = round_pairs(t[r], t[r + 1]);
        sums = dot(pairs, bf16_ones(), sums);
        store_pairs(p + r * kRun, pairs);
    }
    store(lane.sums, sums);
    *lane.highest = first(highest);
    return first(factor);
}

void scale_values(const Tile& tile, Visible seen, ValueScales* scales) {
    constexpr float kTooSmall = 1e-33f;  // smaller values count as zeros
    F16 kept[kRuns], most = zero();
    for (int r = 0; r < kRuns; ++r) {
        const uint16_t bits = seen.bits(r);
        kept[r] = bits ? keep(load(tile.value_scales[r]), bits, zero()) : zero();
        most = max(most, kept[r]);
    }
    scales->largest = largest(most);
    const bool is_small = scales->largest < kTooSmall;
    const F16 inverse = set1(is_small ? 0.f : kMostWeight / scales->largest);
    for (int r = 0; r < kRuns; ++r) store(scales->shares + r * kRun, kept[r] * inverse);
    scales->seen = seen;
}

void softmax(const IntegerScores& s, const Tile& tile, const ValueScales& values,
             const ScoreRule& rule, LaneState lane, IntegerWeights* weights) {
    F16 t[kRuns] = {zero(), zero(), zero(), zero()};
    const F16 scale = set1(s.scale * rule.scale);
    for (int r = 0; r < kRuns; ++r) {
        if (values.seen.bits(r) == 0) continue;
        const I16 whole = join(s.high + r * kRun, s.low + r * kRun) + set1(-s.offset);
        t[r] = to_float(whole) * (load(tile.key_scales[r]) * scale);
    }
    const F16 before = set1(*lane.highest), here = highest_of(t, values.seen, rule);
    const F16 highest = max(before, here);
    const F16 factor = exp2(before - highest), added = exp2(here - highest);
    F16 sum = zero(), shares = zero();
    for (int r = 0; r < kRuns; ++r) {
        t[r] = exp2(t[r] - here);
        sum = sum + t[r];
        t[r] = t[r] * load(values.shares + r * kRun);
        shares = shares + t[r];
    }
    sum = fma(shares, zero(), sum);  // a value that is NaN makes the lane NaN
    store(lane.sums, fma(load(lane.sums), factor, sum * added));
    store_halves(t, weights->high, weights->low);
    *lane.highest = first(highest);
    weights->factor = first(factor);
    weights->scale = first(added) * (values.largest / kMostWeight);
}

// ==== Sums ====

void add_products(const float* products, float factor, int width, float* out) {
    for (int d = 0; d < width; d += 16)
        store(out + d, fma(load(out + d), set1(factor), load(products + d)));
}

void add_products(const int32_t* high, const int32_t* low, const IntegerWeights& weights, int width,
                  float* out) {
    const F16 factor = set1(weights.factor), scale = set1(weights.scale);
    for (int d = 0; d < width; d += 16) {
        const F16 sum = to_float(join(high + d, low + d)) * scale;
        store(out + d, fma(load(out + d), factor, sum));
    }
}

int32_t round_query(const bf16* q, int head_dim, int depth, int8_t* high, int8_t* low,
                    float* scale) {
    constexpr float kMost = 32639.f;  // 127 * 256 + 127: more would not fit into two signed bytes
    F16 most = zero(), finite = zero();
    const auto part = [&](int d) {
        const int n = head_dim - d;
        return n >= 16 ? load(q + d) : n > 0 ? load(q + d, n) : zero();
    };
    for (int d = 0; d < head_dim; d += 16) {
        most = max(most, abs(part(d)));
        finite = fma(part(d), zero(), finite);
    }
    const float highest = largest(most);
    const F16 inverse = set1(highest > 1e-33f ? kMost / highest : 0.f);
    *scale = highest / kMost + sum(finite);
    F16 total = zero();
    for (int d = 0; d < depth; d += kTile) {
        F16 whole[kRuns];
        for (int r = 0; r < kRuns; ++r) {
            whole[r] = round(part(d + r * 16) * inverse);
            total = total + whole[r];  // whole numbers up to 256 * 32639: exact, in any order
            whole[r] = whole[r] + set1(32768.f + 128.f);  // both bytes count from 128
        }
        uint8_t highs[kTile], lows[kTile];
        store_halves(whole, highs, lows);
        for (int i = 0; i < std::min(kTile, depth - d); ++i) {
            high[d + i] = static_cast<int8_t>(highs[i] ^ 0x80);
            low[d + i] = static_cast<int8_t>(lows[i] ^ 0x80);
        }
    }
    const float all = sum(total);
    return std::isnan(all) ? 0 : static_cast<int32_t>(all);  // NaN is in the scale already
}

// ==== Records ====

namespace {
bool is_empty(const float* record) { return record[0] == kLowest && record[1] == 0.f; }
}  // namespace

void clear_record(float* record) {
    record[0] = kLowest;
    record[1] = 0.f;
}

void write_record(const Lanes& lanes, int lane, int width, float* record) {
    record[0] = lanes.highest[lane];
    record[1] = sum(load(lanes.sums + lane * 16));
    std::copy_n(lanes.out + lane * kOutStride, width, record + kRecordHead);
}

void merge_record(const float* record, int width, float* total) {
    if (is_empty(record)) return;
    if (is_empty(total)) {
        std::copy_n(record, kRecordHead + width, total);
        return;
    }
    const float highest = std::max(total[0], record[0]);
    const float before = exp2(total[0] - highest), added = exp2(record[0] - highest);
    total[0] = highest;
    total[1] = std::fma(total[1], before, record[1] * added);
    for (int d = kRecordHead; d < kRecordHead + width; d += 16)
        store(total + d, fma(load(total + d), set1(before), load(record + d) * set1(added)));
}

void finish_record(const float* total, int head_dim, uint16_t* out) {
    const F16 inverse = set1(1.f / total[1]);
    const float* sums = total + kRecordHead;
    for (int d = 0; d < head_dim; d += 16)
        store(out + d, load(sums + d) * inverse, std::min(16, head_dim - d));
}

}  // namespace REEF_ISA
