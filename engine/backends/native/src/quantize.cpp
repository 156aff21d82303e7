// Rounds activations to int8, with a scale per row or per row and group (quantize.h).
#include "quantize.h"

namespace REEF_ISA {
namespace {

#if defined(__AVX512BF16__)

void store_int8(int8_t* p, F16 a) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#else

void store_int8(int8_t* p, F16 a) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#endif

struct Quantized {
    float scale;
    int32_t sum;
};

// Quantizes `count` values with one scale, and fills q up to `width`, a multiple of 16, with zeros.
Quantized quantize(const bf16* x, int count, int64_t width, int8_t* q) {
    const float most = largest_of(x, count);
    if (!(most >= kTooSmall)) {  // zeros, or NaN
        std::memset(q, 0, static_cast<size_t>(width));
        return {most * 0.f, 0};
    }
    const F16 inverse = set1(127.f / most);
    int32_t total = 0;
    for (int k = 0; k < width;) {
        F16 part = zero();  // whole numbers below 2^24: exact
        for (const int end = k + 4096; k < end && k < width; k += 16) {
            const F16 value = round(load_row(x, k, count) * inverse);
            store_int8(q + k, value);
            part = part + value;
        }
        total += static_cast<int32_t>(sum(part));
    }
    return {most / 127.f, total};
}

// Returns the rows of one chunk: about 16384 values, a few microseconds of work.
int rows_per_chunk(const ReefLinearArgs& args) {
    return 1 + static_cast<int>(16384 / (args.linear->in_features + 1));
}

template <class Body>
void for_rows_of_chunk(const ReefLinearArgs& args, int chunk, Body body) {
    const int count = rows_per_chunk(args);
    for (int row = chunk * count; row < args.rows && row < (chunk + 1) * count; ++row) body(row);
}

int chunks_of(const ReefLinearArgs& args) {
    const int count = rows_per_chunk(args);
    return (args.rows + count - 1) / count;
}

void quantize_groups_of(const ReefLinearArgs& args, const QuantizedGroups& out, int row) {
    const ReefLinear& linear = *args.linear;
    const int size = linear.group_size;
    const bf16* x = args.x + row * args.x_stride;
    bf16 ordered[reef::kLargestInt8Group];
    for (int64_t group = 0; group < out.groups; ++group) {
        const bf16* from = x + group * size;
        if (linear.input_order != nullptr) {
            for (int k = 0; k < size; ++k) ordered[k] = x[linear.input_order[group * size + k]];
            from = ordered;
        }
        const Quantized done = quantize(from, size, size, out.q + row * out.stride + group * size);
        out.scales[group * args.rows + row] = done.scale;
        out.sums[group * args.rows + row] = done.sum;
    }
}

void quantize_rows_of_chunk(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const QuantizedRows out = quantized_rows(args);
    for_rows_of_chunk(args, chunk, [&](int row) { quantize_row(args, out, row); });
}

void quantize_groups_of_chunk(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const QuantizedGroups out = quantized_groups(args);
    for_rows_of_chunk(args, chunk, [&](int row) { quantize_groups_of(args, out, row); });
}

}  // namespace

QuantizedRows quantized_rows(const ReefLinearArgs& args) {
    const reef::RowsLayout layout(args.linear->in_features, args.rows);
    auto* base = static_cast<int8_t*>(args.scratch);
    return {base, layout.stride, reinterpret_cast<float*>(base + layout.scales),
            reinterpret_cast<int32_t*>(base + layout.totals)};
}

void quantize_row(const ReefLinearArgs& args, const QuantizedRows& out, int row) {
    const bf16* x = args.x + row * args.x_stride;
    const int count = args.linear->in_features;
    const Quantized done = quantize(x, count, reef::round_up(count, 64), out.q + row * out.stride);
    out.scales[row] = done.scale;
    out.totals[row] = done.sum;
}

reef::Task quantize_rows(const ReefLinearArgs* args) {
    return {quantize_rows_of_chunk, args, chunks_of(*args)};
}

QuantizedGroups quantized_groups(const ReefLinearArgs& args) {
    const reef::GroupsLayout layout(*args.linear, args.rows);
    auto* base = static_cast<int8_t*>(args.scratch);
    return {base, layout.stride, layout.groups, reinterpret_cast<float*>(base + layout.scales),
            reinterpret_cast<int32_t*>(base + layout.sums)};
}

reef::Task quantize_groups(const ReefLinearArgs* args) {
    return {quantize_groups_of_chunk, args, chunks_of(*args)};
}

}  // namespace REEF_ISA
