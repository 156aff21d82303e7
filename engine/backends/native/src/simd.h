// Defines vectors of 16 floats, 16 integers and 32 bfloat16s, the same for every instruction set.
//
// Included by files that are compiled once per instruction set, each into its own namespace
// REEF_ISA (avx512: with bf16 and VNNI; avx2: with FMA). bfloat16 is held as uint16_t.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of undefined vectors in its own header
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace REEF_ISA {

using bf16 = uint16_t;

inline float to_float(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline bf16 to_bf16(float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40);
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512BF16__)

struct F16 { __m512 v; };    // 16 float
struct B32 { __m512bh v; };  // 32 bf16: sixteen neighbouring pairs

inline F16 zero() { return {_mm512_setzero_ps()}; }
inline F16 set1(float a) { return {_mm512_set1_ps(a)}; }
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
inline F16 round(F16 a) { return {_mm512_roundscale_ps(a.v, 8)}; }  // to nearest even
inline float sum(F16 a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(F16 a) { return _mm512_reduce_max_ps(a.v); }
inline F16 power_of_two(F16 n) {  // 2^n for whole n
    return {_mm512_scalef_ps(_mm512_set1_ps(1.f), n.v)};
}

inline F16 widen(__m256i a) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16))};
}
inline __m256i narrow_in_steps(F16 a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16));
}
inline __m256i narrow(F16 a) {  // _mm512_cvtneps_pbh alone would flush denormals to zero
    constexpr int kDenormal = 0x20;
    if (__builtin_expect(_mm512_fpclass_ps_mask(a.v, kDenormal) != 0, 0)) return narrow_in_steps(a);
    return (__m256i)_mm512_cvtneps_pbh(a.v);
}
inline F16 load(const bf16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(bf16* p, F16 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }

// Load or store the first n of 16 values, 0 < n <= 16; values that are not loaded are zero.
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline F16 load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, F16 a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline F16 load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
inline void store(bf16* p, F16 a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }

inline B32 load_pairs(const bf16* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
inline B32 load_pairs(const bf16* p, int n) {  // n of 32 values, 0 < n <= 32
    const __mmask32 mask = static_cast<__mmask32>(n == 32 ? ~0u : (1u << n) - 1);
    return {(__m512bh)_mm512_maskz_loadu_epi16(mask, p)};
}
inline B32 repeat_pair(const bf16* p) {  // the two values at p, sixteen times
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return {(__m512bh)_mm512_set1_epi32(pair)};
}
// Adds a[2i] * b[2i] + a[2i+1] * b[2i+1] to c[i], in float32.
inline F16 dot(B32 a, B32 b, F16 c) { return {_mm512_dpbf16_ps(c.v, a.v, b.v)}; }

struct I16 { __m512i v; };  // 16 int32 that wrap
inline I16 set1(int32_t a) { return {_mm512_set1_epi32(a)}; }
inline I16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(int32_t* p, I16 a) { _mm512_storeu_si512(p, a.v); }
inline I16 operator+(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I16 operator*(I16 a, I16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I16 operator^(I16 a, I16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int n>
inline I16 shift_right(I16 a) {  // zeros are shifted in
    return {_mm512_srli_epi32(a.v, n)};
}
inline F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I16 bits_of(F16 a) { return {_mm512_castps_si512(a.v)}; }

// Returns a mask whose bit i is a[i] >= b[i], which is false where either is NaN.
inline uint32_t at_least(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline F16 where_at_least(F16 a, F16 b, F16 value) {  // value where a >= b, elsewhere zero
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), value.v)};
}

#else  // AVX2 and FMA

struct F16 { __m256 lo, hi; };
struct B32 { __m256i lo, hi; };

inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline F16 operator+(F16 a, F16 b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F16 operator-(F16 a, F16 b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F16 operator*(F16 a, F16 b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F16 operator/(F16 a, F16 b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline F16 fma(F16 a, F16 b, F16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F16 abs(F16 a) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F16 round(F16 a) { return {_mm256_round_ps(a.lo, 8), _mm256_round_ps(a.hi, 8)}; }
inline float sum(F16 a) {
    const __m256 s = _mm256_add_ps(a.lo, a.hi);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float largest(F16 a) {
    const __m256 s = _mm256_max_ps(a.lo, a.hi);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
inline __m256 power_of_two(__m256 n) {  // -126 <= n <= 127
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline F16 power_of_two(F16 n) { return {power_of_two(n.lo), power_of_two(n.hi)}; }

inline __m256 widen(__m128i a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}
inline __m128i narrow(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x88));
}
inline F16 load(const bf16* p) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
}
inline void store(bf16* p, F16 a) {
    auto* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, narrow(a.lo));
    _mm_storeu_si128(q + 1, narrow(a.hi));
}

template <class T>
inline F16 load_some(const T* p, int n) {
    T whole[16] = {};
    std::memcpy(whole, p, static_cast<size_t>(n) * sizeof(T));
    return load(whole);
}
template <class T>
inline void store_some(T* p, F16 a, int n) {
    T whole[16];
    store(whole, a);
    std::memcpy(p, whole, static_cast<size_t>(n) * sizeof(T));
}
inline F16 load(const float* p, int n) { return load_some(p, n); }
inline void store(float* p, F16 a, int n) { store_some(p, a, n); }
inline F16 load(const bf16* p, int n) { return load_some(p, n); }
inline void store(bf16* p, F16 a, int n) { store_some(p, a, n); }

inline B32 load_pairs(const bf16* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline B32 load_pairs(const bf16* p, int n) {
    bf16 whole[32] = {};
    std::memcpy(whole, p, static_cast<size_t>(n) * sizeof(bf16));
    return load_pairs(whole);
}
inline B32 repeat_pair(const bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return {_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)};
}
inline __m256 dot(__m256i a, __m256i b, __m256 c) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const __m256 a0 = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16));
    const __m256 b0 = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
    const __m256 a1 = _mm256_castsi256_ps(_mm256_and_si256(a, upper));
    const __m256 b1 = _mm256_castsi256_ps(_mm256_and_si256(b, upper));
    return _mm256_fmadd_ps(a1, b1, _mm256_fmadd_ps(a0, b0, c));
}
inline F16 dot(B32 a, B32 b, F16 c) { return {dot(a.lo, b.lo, c.lo), dot(a.hi, b.hi, c.hi)}; }

struct I16 { __m256i lo, hi; };
inline I16 set1(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
inline I16 load(const int32_t* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store(int32_t* p, I16 a) {
    auto* q = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(q, a.lo);
    _mm256_storeu_si256(q + 1, a.hi);
}
inline I16 operator+(I16 a, I16 b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline I16 operator*(I16 a, I16 b) {
    return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
inline I16 operator^(I16 a, I16 b) {
    return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
template <int n>
inline I16 shift_right(I16 a) {
    return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)};
}
inline F16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline I16 bits_of(F16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }

inline uint32_t at_least(F16 a, F16 b) {
    const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ));
    const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ));
    return static_cast<uint32_t>(lo | hi << 8);
}
inline F16 where_at_least(F16 a, F16 b, F16 value) {
    return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), value.lo),
            _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ), value.hi)};
}

#endif

// Returns e^a to about 2 units in the last place, for a clamped to [-87, 88]; NaN stays NaN.
inline F16 exp(F16 a) {
    const F16 x = min(set1(88.f), max(set1(-87.f), a));  // both return a NaN second operand
    const F16 n = round(x * set1(1.44269504089f));
    F16 r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    F16 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    return fma(p, r * r, r + set1(1.f)) * power_of_two(n);
}

}  // namespace REEF_ISA
