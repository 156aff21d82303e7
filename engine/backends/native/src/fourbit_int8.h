// Multiplies 4-bit codes by int8 activations, exactly within a group.
//
//   total += (scale of the weight's group * scale of x's group) * sum of products
//
// A lane (fourbit.h) holds the code of input j in the low half of byte j, and that of input 4 + j
// in the high half: one mask selects half a step, with its bytes in the order of x. Codes become
// unsigned bytes, since the processor multiplies unsigned by signed bytes; what was added to make
// them unsigned is subtracted as that many times the sum of x (QuantizedGroups).
//
// nf4: int8 does not hold the 16 values exactly either. The factor of the smallest error is
// 124.114, which leaves 0.47 % of a Gaussian weight's norm. int4: the bytes are the codes
// themselves, and the packed zero points are minus the zero points. Where a weight has none, the
// codes count from 8.
#pragma once
#include "fourbit.h"
#include "quantize.h"

namespace REEF_ISA {
namespace fourbit {

struct Int8Format {
    static constexpr int kWords = 2;

    struct Rows {
        const uint8_t* x;
        int64_t stride, rows;
        const float* scales;  // [group][row]
        const int32_t* sums;  // [group][row]

        float scale(int row, int group) const { return scales[group * rows + row]; }
        int32_t sum(int row, int group) const { return sums[group * rows + row]; }
    };
    static Rows rows(const ReefLinearArgs& args) {
        const QuantizedGroups x = quantized_groups(args);
        return {reinterpret_cast<const uint8_t*>(x.q), x.stride, args.rows, x.scales, x.sums};
    }
    static F16 result(const Rows&, int, F16 total) { return total; }

    static int32_t four(const uint8_t* x) {
        int32_t word;
        std::memcpy(&word, x, 4);
        return word;
    }

#if defined(__AVX512BF16__)
    // Not an __m512i, whose lanes are of another type: GCC 12 would copy each sum through memory.
    using Sum = int32_t __attribute__((vector_size(64)));
    struct Word { __m512i v; };

    static Sum all(int32_t value) { return (Sum)_mm512_set1_epi32(value); }
    static Word load(const uint8_t* p) { return {_mm512_load_si512(p)}; }
    static void store(uint8_t* p, Word a) { _mm512_store_si512(p, a.v); }
    static Word repeat(const uint8_t* x) { return {_mm512_set1_epi32(four(x))}; }
    static F16 to_float(Sum sum) { return {_mm512_cvtepi32_ps((__m512i)sum)}; }
    static Sum dot(Word weights, Word x, Sum sum) {
        return (Sum)_mm512_dpbusd_epi32((__m512i)sum, weights.v, x.v);
    }
    template <int kWord>
    static Word codes_of(Codes codes) {
        const __m512i shifted = kWord == 0 ? codes.v : _mm512_srli_epi16(codes.v, 4);
        return {_mm512_and_si512(shifted, _mm512_set1_epi8(15))};
    }
    static Word table(const int8_t* values) {
        return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(values)))};
    }
    static Word look_up(Word table, Word codes) { return {_mm512_shuffle_epi8(table.v, codes.v)}; }
#else
    struct Sum { __m256i lo, hi; };
    struct Word { __m256i lo, hi; };

    static Sum all(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
    static Word load(const uint8_t* p) {
        const auto* q = reinterpret_cast<const __m256i*>(p);
        return {_mm256_load_si256(q), _mm256_load_si256(q + 1)};
    }
    static void store(uint8_t* p, Word a) {
        auto* q = reinterpret_cast<__m256i*>(p);
        _mm256_store_si256(q, a.lo);
        _mm256_store_si256(q + 1, a.hi);
    }
    static Word repeat(const uint8_t* x) {
        const __m256i repeated = _mm256_set1_epi32(four(x));
        return {repeated, repeated};
    }
    static F16 to_float(Sum sum) {
        return {_mm256_cvtepi32_ps(sum.lo), _mm256_cvtepi32_ps(sum.hi)};
    }
    // Needs weights of at most 129, so that the sum of two products fits into 16 bits.
    static __m256i dot(__m256i weights, __m256i x, __m256i sum) {
        const __m256i pairs = _mm256_maddubs_epi16(weights, x);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static Sum dot(Word weights, Word x, Sum sum) {
        return {dot(weights.lo, x.lo, sum.lo), dot(weights.hi, x.hi, sum.hi)};
    }
    template <int kWord>
    static __m256i codes_of(__m256i codes) {
        const __m256i shifted = kWord == 0 ? codes : _mm256_srli_epi16(codes, 4);
        return _mm256_and_si256(shifted, _mm256_set1_epi8(15));
    }
    template <int kWord>
    static Word codes_of(Codes codes) {
        return {codes_of<kWord>(codes.lo), codes_of<kWord>(codes.hi)};
    }
    static Word table(const int8_t* values) {
        const __m256i all =
            _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(values)));
        return {all, all};
    }
    static Word look_up(Word table, Word codes) {
        return {_mm256_shuffle_epi8(table.lo, codes.lo), _mm256_shuffle_epi8(table.hi, codes.hi)};
    }
#endif

    // Holds what belongs to sixteen outputs of a group.
    struct Weights { F16 scale; };
    static Weights weights(const Panel& panel, int group, int half) {
        return {panel.scale(group, half)};
    }
    static F16 scale_of(const Rows& rows, int row, int group, const Weights& weights) {
        return weights.scale * set1(rows.scale(row, group));
    }
    static F16 add(const Weights& weights, const Rows& rows, int row, int group, Sum sum,
                   F16 total) {
        return fma(to_float(sum), scale_of(rows, row, group, weights), total);
    }
};

// Decodes to signed bytes by a table, for instructions that multiply signed by signed ones.
template <const int8_t (&kValues)[16]>
struct SignedFormat : Int8Format {
    using Values = Word;

    static Values values() { return table(kValues); }
    template <int kWord>
    static Word decode(Codes codes, const Values& values) {
        return look_up(values, codes_of<kWord>(codes));
    }
};

alignas(16) inline constexpr int8_t kNf4Values[16] = {
    -124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124,
};
alignas(16) inline constexpr int8_t kInt4Values[16] = {
    -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7,
};

struct Nf4Int8 : Int8Format {
    using Values = Word;
    using Signed = SignedFormat<kNf4Values>;

    template <int kWord>
    static Word decode(Codes codes, const Values& values) {
        return look_up(values, codes_of<kWord>(codes));
    }

#if defined(__AVX512BF16__)
    static Values values() {  // plus 128
        return {_mm512_xor_si512(table(kNf4Values).v, _mm512_set1_epi8(-128))};
    }
    static Sum start(const Panel&, const Rows& rows, int row, int group, int) {
        return all(-128 * rows.sum(row, group));
    }
#else
    static Values values() { return table(kNf4Values); }
    static Sum start(const Panel&, const Rows&, int, int, int) { return all(0); }
    // Multiplies |x| by the weight with the sign of x, as signed bytes plus 128 would be too large.
    static Sum dot(Word weights, Word x, Sum sum) {
        return {dot_signed(weights.lo, x.lo, sum.lo), dot_signed(weights.hi, x.hi, sum.hi)};
    }

private:
    static __m256i dot_signed(__m256i weights, __m256i x, __m256i sum) {
        return Int8Format::dot(_mm256_abs_epi8(x), _mm256_sign_epi8(weights, x), sum);
    }
#endif
};

struct Int4Int8 : Int8Format {  // without zero points
    struct Values {};
    using Signed = SignedFormat<kInt4Values>;

    static Values values() { return {}; }
    template <int kWord>
    static Word decode(Codes codes, const Values&) {
        return codes_of<kWord>(codes);
    }
    static Sum start(const Panel&, const Rows& rows, int row, int group, int) {
        return all(-8 * rows.sum(row, group));
    }
};

struct Int4ZerosInt8 : Int4Int8 {
    using Signed = Int4ZerosInt8;  // the codes are signed bytes, too

    struct Weights : Int8Format::Weights { F16 zero_point; };
    static Weights weights(const Panel& panel, int group, int half) {
        return {Int8Format::weights(panel, group, half), panel.zero_point(group, half)};
    }
    static Sum start(const Panel&, const Rows&, int, int, int) { return all(0); }
    static F16 add(const Weights& weights, const Rows& rows, int row, int group, Sum sum,
                   F16 total) {
        const F16 sum_of_x = set1(static_cast<float>(rows.sum(row, group)));
        const F16 exact = fma(weights.zero_point, sum_of_x, to_float(sum));
        return fma(exact, scale_of(rows, row, group, weights), total);
    }
};

}  // namespace fourbit
}  // namespace REEF_ISA
