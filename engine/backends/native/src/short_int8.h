// Defines int8 weights that are stored in four bits:
//
//     weight[out, k] = (code[out, k] - 8) * multiplier[out, group of k] * scale[out]
//
// Groups are 32 inputs. A multiplier is a whole number of at most 15, positive or negative, so that
// a code times a multiplier is an int8 weight of at most 120. All sums are exact: results have the
// bits that linear_int8.h has for these int8 weights.
//
// Layout. A panel's codes are [group][step of 8 inputs][32 outputs][4 bytes]; byte j has the code
// of input j in its low half, and that of input 4 + j in its high half. Multipliers are int8
// [panel][group][32].
#pragma once
#include "fourbit_cut.h"
#include "linear_int8.h"
#include "simd_int8.h"

namespace REEF_ISA {
namespace short_int8 {

constexpr int kGroup = reef::kShortGroup;
constexpr int kSteps = kGroup / 8;
constexpr int kStepBytes = kPanel * 4;  // of codes; of unpacked weights these are four inputs
constexpr int kGroupBytes = kSteps * kStepBytes;
constexpr int kAhead = 2048;  // bytes that codes are prefetched ahead

struct Panel {
    const uint8_t* codes;
    const int8_t* multipliers;
    int groups;

    Panel(const ReefLinear& linear, int panel) : groups(linear.in_features / kGroup) {
        const int64_t first = int64_t{panel} * groups;
        codes = static_cast<const uint8_t*>(linear.packed) + first * kGroupBytes;
        multipliers = linear.multipliers + first * kPanel;
    }
    const uint8_t* codes_of(int group) const { return codes + int64_t{group} * kGroupBytes; }
    const int8_t* multipliers_of(int group) const { return multipliers + group * kPanel; }
};

inline void prefetch_group(const uint8_t* codes) {
    for (int i = 0; i < kGroupBytes; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + i), _MM_HINT_T0);
}

#if defined(__AVX512BF16__)

// Unpacks sixteen outputs of a group. Bytes are multiplied two at a time, as 16-bit integers: no
// product exceeds its byte. A negative multiplier takes the codes from 15:
//     (code - 8) * -m  =  (15 - code) * m - 7 * m
struct Unpack {
    __m512i size, flip, offset;  // in each byte, but size in each pair

    explicit Unpack(const int8_t* multipliers) {
        const auto* p = reinterpret_cast<const __m128i*>(multipliers);
        const __m512i signed_size = _mm512_cvtepi8_epi32(_mm_loadu_si128(p));
        const __m512i m = _mm512_abs_epi32(signed_size);
        const __m512i is_negative = _mm512_srai_epi32(signed_size, 31);
        const __m512i middle =  // 8 m, or 7 m
            _mm512_sub_epi32(_mm512_slli_epi32(m, 3), _mm512_and_si512(m, is_negative));
        const __m512i first_bytes = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
        size = _mm512_or_si512(m, _mm512_slli_epi32(m, 16));
        flip = _mm512_and_si512(is_negative, _mm512_set1_epi8(15));
        offset = _mm512_shuffle_epi8(_mm512_sub_epi32(_mm512_set1_epi32(128), middle), first_bytes);
    }

    // Returns weights + 128, of the codes in the low halves of bytes.
    __m512i weights(__m512i codes) const {
        constexpr int kAndThenXor = 0x6a;
        const __m512i flipped =
            _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(15), flip, kAndThenXor);
        return _mm512_add_epi8(_mm512_mullo_epi16(flipped, size), offset);
    }
};

// Unpacks a group of a panel to int8 weights plus 128, as linear_int8.h has them.
inline void unpack_group(const uint8_t* codes, const int8_t* multipliers, uint8_t* out) {
    prefetch_group(codes);
    for (int half = 0; half < 2; ++half) {
        const Unpack unpack(multipliers + 16 * half);
        for (int step = 0; step < kSteps; ++step) {
            const __m512i both = _mm512_load_si512(codes + step * kStepBytes + 64 * half);
            uint8_t* word = out + 2 * step * kStepBytes + 64 * half;
            _mm512_store_si512(word, unpack.weights(both));
            _mm512_store_si512(word + kStepBytes, unpack.weights(_mm512_srli_epi16(both, 4)));
        }
    }
}

#endif

}  // namespace short_int8
}  // namespace REEF_ISA
