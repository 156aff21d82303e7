// Multiplies 4-bit codes by bf16 activations: decodes lanes (fourbit.h) by a table of 16 values.
//
// The lane of an output is two 16-bit words; word h holds in its nibble p the code of input
// 2 p + h. Shifting a lane's words right by 4 p thus leaves in their low bits the codes of two
// neighbouring inputs, which are looked up at once. Products and sums are float32.
#pragma once
#include "fourbit.h"

namespace REEF_ISA {
namespace fourbit {

struct Bf16Format {
    static constexpr int kWords = 4;
    using Sum = F16;

#if defined(__AVX512BF16__)
    struct Values { __m512i v; };  // the 16 values twice, since indices count modulo 32

    static Values values_at(const bf16* values) {
        return {
            _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(values)))};
    }
    template <int kWord>
    static B32 decode(Codes codes, const Values& values) {  // bits above the code do not matter
        const __m512i index = kWord == 0 ? codes.v : _mm512_srli_epi16(codes.v, 4 * kWord);
        return {(__m512bh)_mm512_permutexvar_epi16(index, values.v)};
    }
    static void store(uint8_t* p, B32 a) { _mm512_store_si512(p, (__m512i)a.v); }
#else
    // Holds the low bytes of the 16 values, twice, and the high bytes, twice.
    struct Values { __m256i low, high; };

    static Values values_at(const bf16* values) {
        const __m256i all = _mm256_load_si256(reinterpret_cast<const __m256i*>(values));
        return {bytes(_mm256_and_si256(all, _mm256_set1_epi16(0xff))),
                bytes(_mm256_srli_epi16(all, 8))};
    }
    template <int kWord>
    static B32 decode(Codes codes, const Values& values) {
        return {look_up<kWord>(codes.lo, values), look_up<kWord>(codes.hi, values)};
    }
    static void store(uint8_t* p, B32 a) {
        auto* q = reinterpret_cast<__m256i*>(p);
        _mm256_store_si256(q, a.lo);
        _mm256_store_si256(q + 1, a.hi);
    }

private:
    // Packs 16 words below 256 into bytes, the same in both halves.
    static __m256i bytes(__m256i words) {
        const __m256i packed = _mm256_packus_epi16(words, words);
        return _mm256_permute4x64_epi64(packed, 0x88);
    }
    template <int kWord>
    static __m256i look_up(__m256i codes, const Values& values) {
        const __m256i shifted = _mm256_srli_epi16(codes, 4 * kWord);
        const __m256i index = _mm256_and_si256(shifted, _mm256_set1_epi16(15));
        const __m256i low = _mm256_shuffle_epi8(values.low, index);
        const __m256i high = _mm256_shuffle_epi8(values.high, index);
        return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi16(0xff)),
                               _mm256_slli_epi16(high, 8));
    }

public:
#endif

    static B32 load(const uint8_t* p) { return load_pairs(reinterpret_cast<const bf16*>(p)); }
    static B32 repeat(const uint8_t* x) { return repeat_pair(reinterpret_cast<const bf16*>(x)); }
    static F16 dot(B32 a, B32 b, F16 c) { return REEF_ISA::dot(a, b, c); }
    static F16 weights(const Panel& panel, int group, int half) { return panel.scale(group, half); }
    template <class Rows>
    static F16 add(F16 scale, const Rows&, int, int, F16 sum, F16 total) {
        return fma(sum, scale, total);
    }
};

}  // namespace fourbit
}  // namespace REEF_ISA
