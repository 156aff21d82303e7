// int8 weights times int8 activations, exactly, in int32; one scale per output and one per row.
//
// Activations are quantized first, row by row (QuantizedRows). The packed weights are unsigned,
// weight + 128, because the processor multiplies unsigned by signed bytes:
//     sum_k w q = sum_k (w + 128) q - 128 sum_k q.
#include "linear.h"
#include "simd.h"
#include "table.h"

namespace REEF_ISA {
namespace {

constexpr int kGroup = 64;          // neighbours whose sum is kept
constexpr float kTooSmall = 1e-35f;  // 127 / max |x| would overflow: such a row counts as zeros

#if defined(__AVX512BF16__)

void store_int8(int8_t* p, F16 a) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#else

void store_int8(int8_t* p, F16 a) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered),
                                          _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#endif

// Sixteen values from `k` on, zeros behind the end of the row.
F16 load_row(const bf16* x, int k, int in_features) {
    const int left = in_features - k;
    return left >= 16 ? load(x + k) : left > 0 ? load(x + k, left) : zero();
}

// max |x|, or NaN where an x is infinite or NaN: 0 * x says which.
float largest_of_row(const bf16* x, int in_features) {
    F16 most = zero(), poison = zero();
    for (int k = 0; k < in_features; k += 16) {
        const F16 value = load_row(x, k, in_features);
        most = max(most, abs(value));
        poison = fma(value, zero(), poison);
    }
    return largest(most) + sum(poison);
}

// q and its sum, of 64 neighbours.
int32_t quantize_group(const bf16* x, int k, int in_features, float inverse, int8_t* q) {
    F16 total = zero();  // whole numbers below 2^24: exact
    for (int i = 0; i < kGroup; i += 16) {
        const F16 value = round(load_row(x, k + i, in_features) * set1(inverse));
        store_int8(q + i, value);
        total = total + value;
    }
    return static_cast<int32_t>(sum(total));
}

void quantize_row(const ReefLinearArgs& args, const QuantizedRows& out, int row) {
    const int in_features = args.linear->in_features;
    const bf16* x = args.x + row * args.x_stride;
    int8_t* q = out.q + row * out.stride;
    int32_t* sums = out.sums + row * (out.stride / kGroup);
    const float most = largest_of_row(x, in_features);
    if (!(most >= kTooSmall)) {  // zeros, or NaN
        out.scales[row] = most * 0.f;
        std::memset(q, 0, static_cast<size_t>(out.stride));
        std::memset(sums, 0, static_cast<size_t>(out.stride / kGroup) * sizeof(int32_t));
        return;
    }
    out.scales[row] = most / 127.f;
    for (int64_t k = 0; k < out.stride; k += kGroup)
        sums[k / kGroup] = quantize_group(x, static_cast<int>(k), in_features, 127.f / most, q + k);
}

// Rows of one chunk: some ten thousand values, a few microseconds.
int rows_per_chunk(const ReefLinearArgs& args) {
    return 1 + static_cast<int>(16384 / (args.linear->in_features + 1));
}

void quantize_chunk(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const QuantizedRows out = quantized_rows(&args);
    const int count = rows_per_chunk(args);
    for (int row = chunk * count; row < args.rows && row < (chunk + 1) * count; ++row)
        quantize_row(args, out, row);
}

}  // namespace

QuantizedRows quantized_rows(const ReefLinearArgs* args) {
    const reef::QuantizedLayout layout(args->linear->in_features, args->rows);
    auto* base = static_cast<int8_t*>(args->scratch);
    return {base, layout.stride, reinterpret_cast<float*>(base + layout.scales),
            reinterpret_cast<int32_t*>(base + layout.sums)};
}

reef::Task quantize_rows(const ReefLinearArgs* args, int) {
    const int count = rows_per_chunk(*args);
    return {quantize_chunk, args, (args->rows + count - 1) / count};
}

reef::Task linear_int8(const ReefLinearArgs* args, int) { return {nullptr, args, 0}; }

}  // namespace REEF_ISA
