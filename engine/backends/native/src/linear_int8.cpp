// Multiplies int8 weights by int8 activations, exactly, in int32; scales are per output and row.
//
// Activations are quantized first, row by row (QuantizedRows). The packed weights are unsigned,
// weight + 128, because the processor multiplies unsigned by signed bytes:
//     sum_k w q = sum_k (w + 128) q - 128 sum_k q.
#include "linear_tiles.h"
#include "table.h"

namespace REEF_ISA {
namespace {

constexpr int kGroup = 64;           // neighbouring inputs whose sum is kept
constexpr float kTooSmall = 1e-35f;  // rows of smaller x count as zeros, lest 127 / x overflow

#if defined(__AVX512BF16__)

struct I16 { __m512i v; };  // 16 int32
struct Q64 { __m512i v; };  // 64 bytes: sixteen neighbouring fours

Q64 load_fours(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
Q64 repeat_four(const uint8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return {_mm512_set1_epi32(four)};
}
// Adds a[4i] * b[4i] + ... + a[4i+3] * b[4i+3] to c[i]; a is unsigned, b is signed.
I16 dot_fours(Q64 a, Q64 b, I16 c) { return {_mm512_dpbusd_epi32(c.v, a.v, b.v)}; }
I16 minus(I16 a, int32_t b) { return {_mm512_sub_epi32(a.v, _mm512_set1_epi32(b))}; }
F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }

void store_int8(int8_t* p, F16 a) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#else

struct I16 { __m256i lo, hi; };
struct Q64 { __m256i lo, hi; };

Q64 load_fours(const uint8_t* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
Q64 repeat_four(const uint8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
}
// Multiplies even and odd bytes apart, as 16-bit integers, since the product of bytes saturates.
__m256i dot_fours(__m256i a, __m256i b, __m256i c) {
    const __m256i a_even = _mm256_and_si256(a, _mm256_set1_epi16(255));
    const __m256i a_odd = _mm256_srli_epi16(a, 8);
    const __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8);
    const __m256i b_odd = _mm256_srai_epi16(b, 8);
    const __m256i products =
        _mm256_add_epi32(_mm256_madd_epi16(a_even, b_even), _mm256_madd_epi16(a_odd, b_odd));
    return _mm256_add_epi32(c, products);
}
I16 dot_fours(Q64 a, Q64 b, I16 c) {
    return {dot_fours(a.lo, b.lo, c.lo), dot_fours(a.hi, b.hi, c.hi)};
}
I16 minus(I16 a, int32_t b) {
    const __m256i same = _mm256_set1_epi32(b);
    return {_mm256_sub_epi32(a.lo, same), _mm256_sub_epi32(a.hi, same)};
}
F16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

void store_int8(int8_t* p, F16 a) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#endif

// Loads sixteen values from `k` on, with zeros behind the end of the row.
F16 load_row(const bf16* x, int k, int in_features) {
    const int left = in_features - k;
    return left >= 16 ? load(x + k) : left > 0 ? load(x + k, left) : zero();
}

// Returns max |x|, or NaN where an x is infinite or NaN, since 0 * x is NaN then.
float largest_of_row(const bf16* x, int in_features) {
    F16 most = zero(), poison = zero();
    for (int k = 0; k < in_features; k += 16) {
        const F16 value = load_row(x, k, in_features);
        most = max(most, abs(value));
        poison = fma(value, zero(), poison);
    }
    return largest(most) + sum(poison);
}

// Quantizes 64 neighbouring inputs, and returns the sum of their q.
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
    out.totals[row] = 0;
    const float most = largest_of_row(x, in_features);
    if (!(most >= kTooSmall)) {  // zeros, or NaN
        out.scales[row] = most * 0.f;
        std::memset(q, 0, static_cast<size_t>(out.stride));
        std::memset(sums, 0, static_cast<size_t>(out.stride / kGroup) * sizeof(int32_t));
        return;
    }
    out.scales[row] = most / 127.f;
    for (int64_t k = 0; k < out.stride; k += kGroup) {
        sums[k / kGroup] = quantize_group(x, static_cast<int>(k), in_features, 127.f / most, q + k);
        out.totals[row] += sums[k / kGroup];
    }
}

// Returns the rows of one chunk: about 16384 values, a few microseconds of work.
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

struct Int8 {
    using Words = Q64;
    using Sum = I16;
    const ReefLinearArgs& args;
    const QuantizedRows x;

    explicit Int8(const ReefLinearArgs& all) : args(all), x(quantized_rows(&all)) {}

    static Words load(const uint8_t* p) { return load_fours(p); }
    static Words repeat(const uint8_t* p) { return repeat_four(p); }
    static Sum dot(Words weights, Words x, Sum sum) { return dot_fours(weights, x, sum); }
    static int words(int in_features) { return (in_features + 3) / 4; }

    static bool is_tiled(const ReefLinearArgs& args) { return args.rows > kDirectRows; }
    uint8_t* tiles() const {
        if (!is_tiled(args)) return nullptr;
        const reef::QuantizedLayout layout(args.linear->in_features, args.rows);
        return static_cast<uint8_t*>(args.scratch) + layout.end;
    }
    DirectX rows(int row) const {
        return {reinterpret_cast<const uint8_t*>(x.q + row * x.stride), x.stride};
    }
    F16 result(int row, int output, Sum sum) const {
        const ReefLinear& linear = *args.linear;
        const auto* scales = static_cast<const float*>(linear.scales);
        const I16 exact = minus(sum, 128 * x.totals[row]);
        const F16 value = to_float(exact) * some_of(scales, output, linear.out_features);
        return fma(value, set1(x.scales[row]), bias_of(linear, output));
    }
};

void quantize_tiles(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const Int8 format(args);
    const Tiling tiling(args, Int8::words(args.linear->in_features));
    for_tiles_of_chunk(tiling, chunk, [&](int tile) {
        const int row = tiling.first_row(tile, args.rows);
        const int end = tiling.first_row(tile + 1, args.rows);
        for (int r = row; r < end; ++r) quantize_row(args, format.x, r);
        const auto* q = reinterpret_cast<const uint8_t*>(format.x.q + row * format.x.stride);
        uint8_t* out = format.tiles() + int64_t{4} * row * tiling.words;
        tile_words(q, format.x.stride, end - row, tiling.words, out);
    });
}

}  // namespace

QuantizedRows quantized_rows(const ReefLinearArgs* args) {
    const reef::QuantizedLayout layout(args->linear->in_features, args->rows);
    auto* base = static_cast<int8_t*>(args->scratch);
    return {base, layout.stride, reinterpret_cast<float*>(base + layout.scales),
            reinterpret_cast<int32_t*>(base + layout.sums),
            reinterpret_cast<int32_t*>(base + layout.totals)};
}

reef::Task quantize_rows(const ReefLinearArgs* args, int) {
    const int count = rows_per_chunk(*args);
    return {quantize_chunk, args, (args->rows + count - 1) / count};
}

reef::Task quantize_and_tile_rows(const ReefLinearArgs* args, int threads) {
    if (!Int8::is_tiled(*args)) return quantize_rows(args, threads);
    const Tiling tiling(*args, Int8::words(args->linear->in_features));
    return {quantize_tiles, args, tile_chunks(tiling)};
}

reef::Task linear_int8(const ReefLinearArgs* args, int) { return multiply_task<Int8>(args); }

}  // namespace REEF_ISA
