// Defines vectors of 64 bytes, and their products: sums of fours in int32.
#pragma once
#include "simd.h"

namespace REEF_ISA {

#if defined(__AVX512BF16__)

struct Q64 { __m512i v; };  // 64 bytes: sixteen neighbouring fours

inline Q64 load_fours(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Q64 repeat_four(const uint8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return {_mm512_set1_epi32(four)};
}
// Adds a[4i] * b[4i] + ... + a[4i+3] * b[4i+3] to c[i]; a is unsigned, b is signed.
inline I16 dot_fours(Q64 a, Q64 b, I16 c) { return {_mm512_dpbusd_epi32(c.v, a.v, b.v)}; }
inline I16 minus(I16 a, int32_t b) { return {_mm512_sub_epi32(a.v, _mm512_set1_epi32(b))}; }

// Stores the integers nearest to 16 floats, which fit.
inline void store_int32(int32_t* p, F16 a) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(a.v)); }

#else

struct Q64 { __m256i lo, hi; };

inline Q64 load_fours(const uint8_t* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline Q64 repeat_four(const uint8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
}
// Multiplies even and odd bytes apart, as 16-bit integers, since the product of bytes saturates.
inline __m256i dot_fours(__m256i a, __m256i b, __m256i c) {
    const __m256i a_even = _mm256_and_si256(a, _mm256_set1_epi16(255));
    const __m256i a_odd = _mm256_srli_epi16(a, 8);
    const __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8);
    const __m256i b_odd = _mm256_srai_epi16(b, 8);
    const __m256i products =
        _mm256_add_epi32(_mm256_madd_epi16(a_even, b_even), _mm256_madd_epi16(a_odd, b_odd));
    return _mm256_add_epi32(c, products);
}
inline I16 dot_fours(Q64 a, Q64 b, I16 c) {
    return {dot_fours(a.lo, b.lo, c.lo), dot_fours(a.hi, b.hi, c.hi)};
}
inline I16 minus(I16 a, int32_t b) {
    const __m256i same = _mm256_set1_epi32(b);
    return {_mm256_sub_epi32(a.lo, same), _mm256_sub_epi32(a.hi, same)};
}

inline void store_int32(int32_t* p, F16 a) {
    auto* q = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(q, _mm256_cvtps_epi32(a.lo));
    _mm256_storeu_si256(q + 1, _mm256_cvtps_epi32(a.hi));
}

#endif

}  // namespace REEF_ISA
