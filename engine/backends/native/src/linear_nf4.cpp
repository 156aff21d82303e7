// Computes linear layers of 4-bit normal floats, with bf16 or int8 activations.
//
// Neither bf16 nor int8 holds the 16 values exactly. Each table holds them times the factor of the
// smallest rounding error, and the packed scales are divided by that factor (pack4.py). Errors:
// bf16, factor 1.4367: 0.08 % of a Gaussian weight's norm, 0.18 % of any value (0.14 % and 0.32 %
// without a factor). int8, factor 124.114: 0.47 %.
#include "fourbit_bf16.h"
#include "table.h"

namespace REEF_ISA {
namespace {

using fourbit::Codes;
using fourbit::Panel;

struct Nf4 : fourbit::Bf16Format {
    struct Rows {
        const uint8_t* x;
        int64_t stride;
    };
    static Rows rows(const ReefLinearArgs& args) {
        return {reinterpret_cast<const uint8_t*>(args.x), args.x_stride * 2};
    }
    static Values values() {
        alignas(32) static constexpr bf16 kValues[16] = {
            0xbfb8, 0xbf80, 0xbf41, 0xbf11, 0xbed1, 0xbe88, 0xbe06, 0x0000,
            0x3dea, 0x3e6d, 0x3eb5, 0x3ef9, 0x3f22, 0x3f4f, 0x3f85, 0x3fb8,
        };
        return values_at(kValues);
    }
    static F16 start(const Panel&, const Rows&, int, int, int) { return zero(); }
    static F16 result(const Rows&, int, F16 total) { return total; }
};

// ==== int8 activations ====

// Decodes lanes that hold the code of input j in the low half of byte j, and that of input 4 + j in
// the high half: one mask selects half a step, with its bytes in the order of x.
struct Nf4Int8 {
    static constexpr int kWords = 2;

    struct Rows {
        const uint8_t* x;
        int64_t stride;
        const int32_t* sums;  // of 64 inputs each
        const float* scales;
        int group_size;  // 64, or 32 where the checkpoint's groups are no multiple of 64
    };
    static Rows rows(const ReefLinearArgs& args) {
        const QuantizedRows quantized = quantized_rows(&args);
        return {reinterpret_cast<const uint8_t*>(quantized.q), quantized.stride, quantized.sums,
                quantized.scales, args.linear->group_size};
    }
    static F16 result(const Rows& rows, int row, F16 total) {
        return total * set1(rows.scales[row]);
    }

#if defined(__AVX512BF16__)
    // The processor multiplies unsigned by signed bytes, so 128 is added to the values, and
    // each sum starts at minus 128 times the sum of x. Sum is not an __m512i, whose lanes are of
    // another type: GCC 12 would copy each sum through memory.
    using Sum = int32_t __attribute__((vector_size(64)));
    struct Word { __m512i v; };
    using Values = Word;

    static Values values() {
        const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(kValues));
        return {_mm512_xor_si512(_mm512_broadcast_i32x4(table), _mm512_set1_epi8(-128))};
    }
    template <int kWord>
    static Word decode(Codes codes, const Values& values) {
        const __m512i shifted = kWord == 0 ? codes.v : _mm512_srli_epi16(codes.v, 4);
        return {_mm512_shuffle_epi8(values.v, _mm512_and_si512(shifted, _mm512_set1_epi8(15)))};
    }
    static Sum start(const Panel&, const Rows& rows, int row, int group, int) {
        const __m512i sum = _mm512_set1_epi32(sum_of(rows, row, group));
        return (Sum)_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7));
    }
    static Word load(const uint8_t* p) { return {_mm512_load_si512(p)}; }
    static void store(uint8_t* p, Word a) { _mm512_store_si512(p, a.v); }
    static Word repeat(const uint8_t* x) { return {_mm512_set1_epi32(four(x))}; }
    static Sum dot(Word weights, Word x, Sum sum) {
        return (Sum)_mm512_dpbusd_epi32((__m512i)sum, weights.v, x.v);
    }
    static F16 to_float(Sum sum) { return {_mm512_cvtepi32_ps((__m512i)sum)}; }
#else
    struct Sum { __m256i lo, hi; };
    struct Word { __m256i lo, hi; };
    struct Values { __m256i v; };

    static Values values() {
        return {
            _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kValues)))};
    }
    template <int kWord>
    static Word decode(Codes codes, const Values& values) {
        return {look_up<kWord>(codes.lo, values), look_up<kWord>(codes.hi, values)};
    }
    static Sum start(const Panel&, const Rows&, int, int, int) {
        return {_mm256_setzero_si256(), _mm256_setzero_si256()};
    }
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
    static Sum dot(Word weights, Word x, Sum sum) {
        return {add_products(weights.lo, x.lo, sum.lo), add_products(weights.hi, x.hi, sum.hi)};
    }
    static F16 to_float(Sum sum) {
        return {_mm256_cvtepi32_ps(sum.lo), _mm256_cvtepi32_ps(sum.hi)};
    }
#endif

private:
    alignas(16) static constexpr int8_t kValues[16] = {
        -124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124,
    };

    static int32_t four(const uint8_t* x) {
        int32_t word;
        std::memcpy(&word, x, 4);
        return word;
    }

#if defined(__AVX512BF16__)
    static int32_t sum_of(const Rows& rows, int row, int group) {
        if (rows.group_size == 64) return rows.sums[row * (rows.stride >> 6) + group];
        const auto* q = reinterpret_cast<const int8_t*>(rows.x + row * rows.stride + 32 * group);
        int32_t sum = 0;
        for (int i = 0; i < 32; ++i) sum += q[i];
        return sum;
    }
#else
    template <int kWord>
    static __m256i look_up(__m256i codes, const Values& values) {
        const __m256i shifted = kWord == 0 ? codes : _mm256_srli_epi16(codes, 4);
        return _mm256_shuffle_epi8(values.v, _mm256_and_si256(shifted, _mm256_set1_epi8(15)));
    }
    // Multiplies |x| by the weight with the sign of x. Neither exceeds 127, so that the sum of two
    // products fits into 16 bits.
    static __m256i add_products(__m256i weights, __m256i x, __m256i sum) {
        const __m256i pairs =
            _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(weights, x));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
#endif
};

}  // namespace

reef::Task linear_nf4(const ReefLinearArgs* args, int threads) {
    return fourbit::task<Nf4>(args, threads);
}

reef::Task linear_nf4_int8(const ReefLinearArgs* args, int threads) {
    return fourbit::task<Nf4Int8>(args, threads);
}

}  // namespace REEF_ISA
