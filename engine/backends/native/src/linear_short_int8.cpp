// Multiplies int8 weights that are stored in four bits (short_int8.h) with vector instructions.
//
// A few rows are multiplied by the codes themselves, and the sum of each group by its multiplier.
// What codes count from, 8, is subtracted before: the sum of a group starts with -8 times the sum
// of its x. Many rows multiply int8 weights, which are unpacked once for all of them.
#include "linear_tiles.h"
#include "short_int8.h"
#include "table.h"

namespace REEF_ISA {
namespace short_int8 {
namespace {

#if defined(__AVX512BF16__)

constexpr int kFewRows = 8;

// Sums of codes times x are 32-bit integers.
int32_t start_of(int32_t sum) { return -8 * sum; }
Q64 low_halves(Q64 codes) { return {_mm512_and_si512(codes.v, _mm512_set1_epi8(15))}; }
Q64 high_halves(Q64 codes) { return low_halves({_mm512_srli_epi16(codes.v, 4)}); }
I16 add_products(Q64 codes, Q64 x, I16 sum) { return dot_fours(codes, x, sum); }

// Multiplies by the lower 16 bits of each sum, which hold it.
I16 times(I16 sums, I16 multipliers) { return {_mm512_madd_epi16(sums.v, multipliers.v)}; }
I16 load_multipliers(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_and_si512(_mm512_cvtepi8_epi32(bytes), _mm512_set1_epi32(0xffff))};
}

#else

constexpr int kFewRows = 4;  // times 2 vectors of sums: 8 of 16 registers

// Sums are 16-bit integers, of even and of odd pairs of inputs, in which a group's sums fit:
// 16 * 127 * 15 at most. Each takes half of the start.
int32_t start_of(int32_t sum) {
    const uint32_t half = static_cast<uint32_t>(-4 * sum) & 0xffff;
    return static_cast<int32_t>(half | half << 16);
}
Q64 low_halves(Q64 codes) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(codes.lo, mask), _mm256_and_si256(codes.hi, mask)};
}
Q64 high_halves(Q64 codes) {
    return low_halves({_mm256_srli_epi16(codes.lo, 4), _mm256_srli_epi16(codes.hi, 4)});
}
I16 add_products(Q64 codes, Q64 x, I16 sum) {
    return {_mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(codes.lo, x.lo)),
            _mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(codes.hi, x.hi))};
}
I16 times(I16 sums, I16 multipliers) {
    return {_mm256_madd_epi16(sums.lo, multipliers.lo), _mm256_madd_epi16(sums.hi, multipliers.hi)};
}
I16 load_multipliers(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(bytes, bytes)),
            _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(bytes, bytes))};
}

#endif

// Locates what the layer multiplies in ReefLinearArgs::scratch.
struct Rows : QuantizedRows {
    int32_t* starts;  // [row][group]
    int64_t groups;

    explicit Rows(const ReefLinearArgs& args) : QuantizedRows(quantized_rows(args)) {
        const reef::ShortLayout layout(args.linear->in_features, args.rows);
        starts = reinterpret_cast<int32_t*>(static_cast<uint8_t*>(args.scratch) + layout.starts);
        groups = layout.groups;
    }
};

// ==== A few rows ====

// Adds a group of half a panel to the totals of rows [row, row + kRows).
template <int kHalf, int kRows>
__attribute__((always_inline)) inline void add_group(const Panel& panel, const Rows& x, int row,
                                                     int group, I16 (&totals)[kRows][2]) {
    const uint8_t* codes = panel.codes_of(group) + 64 * kHalf;
    const auto* q = reinterpret_cast<const uint8_t*>(x.q) + row * x.stride + group * kGroup;
    const int32_t* starts = x.starts + row * x.groups + group;
    I16 sums[kRows];
    unroll<kRows>([&](auto r) { sums[r] = set1(starts[r * x.groups]); });
    unroll<kSteps>([&](auto step) {
        const Q64 both = load_fours(codes + step * kStepBytes);
        const Q64 low = low_halves(both), high = high_halves(both);
        unroll<kRows>([&](auto r) {
            const uint8_t* word = q + r * x.stride + 8 * step;
            sums[r] = add_products(low, repeat_four(word), sums[r]);
            sums[r] = add_products(high, repeat_four(word + 4), sums[r]);
        });
    });
    const I16 own = load_multipliers(panel.multipliers_of(group) + 16 * kHalf);
    unroll<kRows>([&](auto r) { totals[r][kHalf] = totals[r][kHalf] + times(sums[r], own); });
}

// Multiplies a panel by rows [row, row + kRows).
template <int kRows>
void multiply_few(const ReefLinearArgs& args, int row, int panel_number) {
    const Rows x(args);
    const Panel panel(*args.linear, panel_number);
    I16 totals[kRows][2] = {};
    for (int group = 0; group < panel.groups; ++group) {
        // for fewer rows the hardware prefetches enough
        if (kRows > 2) prefetch_group(panel.codes_of(group));
        add_group<0>(panel, x, row, group, totals);
        add_group<1>(panel, x, row, group, totals);
    }
    unroll<2>([&](auto half) {
        const int output = panel_number * kPanel + 16 * half;
        if (output >= args.linear->out_features) return;
        const Int8Outputs outputs(args, output);
        unroll<kRows>([&](auto r) {
            put(args, row + r, output, outputs.of_exact(x, row + r, totals[r][half]));
        });
    });
}

using MultiplyFew = void (*)(const ReefLinearArgs&, int row, int panel);

template <int... I>
MultiplyFew multiply_few_of(int rows, std::integer_sequence<int, I...>) {
    static constexpr MultiplyFew functions[] = {multiply_few<I + 1>...};
    return functions[rows - 1];
}

struct FewRows {
    static constexpr int kBlock = 96;  // rows that a chunk multiplies by its panels

    static fourbit::Cut cut(const ReefLinearArgs& args) { return fourbit::Cut(args, kBlock, 30); }
    static void run(const ReefLinearArgs& args, int first, int count, int panel, int end) {
        const int tiles = fourbit::ceil_div(count, kFewRows);
        for (; panel < end; ++panel)
            for (int tile = 0; tile < tiles; ++tile) {
                const int from = count * tile / tiles, to = count * (tile + 1) / tiles;
                multiply_few_of(to - from, std::make_integer_sequence<int, kFewRows>{})(
                    args, first + from, panel);
            }
    }
};

// ==== Many rows ====

#if defined(__AVX512BF16__)

constexpr int kSliceGroups = 16;  // that are unpacked at a time: 16 KB
constexpr int kBlockRows = 96;    // that share them

// Adds `words` words of unpacked weights to sums [kRows][32].
template <int kRows>
void multiply_slice(const uint8_t* weights, int words, const uint8_t* x, int64_t stride,
                    int32_t* sums) {
    I16 own[kRows][2];
    unroll<2 * kRows>([&](auto i) { own[i / 2][i % 2] = load(sums + 16 * i); });
    for (int word = 0; word < words; ++word, weights += kStepBytes, x += 4) {
        const Q64 low = load_fours(weights), high = load_fours(weights + 64);
        unroll<kRows>([&](auto r) {
            const Q64 repeated = repeat_four(x + r * stride);
            own[r][0] = dot_fours(low, repeated, own[r][0]);
            own[r][1] = dot_fours(high, repeated, own[r][1]);
        });
    }
    unroll<2 * kRows>([&](auto i) { store(sums + 16 * i, own[i / 2][i % 2]); });
}

using MultiplySlice = void (*)(const uint8_t*, int, const uint8_t*, int64_t, int32_t*);

template <int... I>
MultiplySlice multiply_slice_of(int rows, std::integer_sequence<int, I...>) {
    static constexpr MultiplySlice functions[] = {multiply_slice<I + 1>...};
    return functions[rows - 1];
}

struct ManyRows {
    static fourbit::Cut cut(const ReefLinearArgs& args) {
        return fourbit::Cut(args, kBlockRows, 25);
    }
    static void run(const ReefLinearArgs& args, int first, int count, int panel, int end) {
        for (; panel < end; ++panel) multiply_panel(args, first, count, panel);
    }

private:
    static void multiply_panel(const ReefLinearArgs& args, int first, int count, int number) {
        alignas(64) uint8_t weights[kSliceGroups * kGroup * kPanel];
        alignas(64) int32_t sums[kBlockRows * kPanel] = {};
        const QuantizedRows x = quantized_rows(args);
        const Panel panel(*args.linear, number);
        const int tiles = fourbit::ceil_div(count, kTileRows);
        for (int group = 0; group < panel.groups; group += kSliceGroups) {
            const int end = std::min(group + kSliceGroups, panel.groups);
            for (int g = group; g < end; ++g)
                unpack_group(panel.codes_of(g), panel.multipliers_of(g),
                             weights + (g - group) * kGroup * kPanel);
            for (int tile = 0; tile < tiles; ++tile) {
                const int from = count * tile / tiles, to = count * (tile + 1) / tiles;
                const int8_t* q = x.q + (first + from) * x.stride + group * kGroup;
                multiply_slice_of(to - from, std::make_integer_sequence<int, kTileRows>{})(
                    weights, (end - group) * kGroup / 4, reinterpret_cast<const uint8_t*>(q),
                    x.stride, sums + from * kPanel);
            }
        }
        put_panel(args, x, first, count, number, sums);
    }
};

bool is_few(const ReefLinearArgs& args) { return args.rows <= kFewRows; }

#else

using ManyRows = FewRows;  // codes are multiplied in less time than int8 weights
bool is_few(const ReefLinearArgs&) { return true; }

#endif

// ==== Prepare ====

int32_t sum_of_group(const int8_t* q) {
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), all);
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(four) + _mm_extract_epi32(four, 1);
}

int rows_per_chunk(const ReefLinearArgs& args) { return 1 + 16384 / args.linear->in_features; }

void quantize_chunk(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const Rows out(args);
    const int begin = chunk * rows_per_chunk(args);
    for (int row = begin; row < std::min(begin + rows_per_chunk(args), args.rows); ++row) {
        quantize_row(args, out, row);
        for (int64_t group = 0; group < out.groups; ++group)
            out.starts[row * out.groups + group] =
                start_of(sum_of_group(out.q + row * out.stride + group * kGroup));
    }
}

}  // namespace
}  // namespace short_int8

reef::Task quantize_short(const ReefLinearArgs* args) {
    using namespace short_int8;
    if (!is_few(*args)) return quantize_rows(args);
    return {quantize_chunk, args, fourbit::ceil_div(args->rows, rows_per_chunk(*args))};
}

reef::Task linear_short_int8(const ReefLinearArgs* args, int threads) {
    using namespace short_int8;
    if (is_few(*args)) return fourbit::task_of<FewRows>(args, threads);
    return fourbit::task_of<ManyRows>(args, threads);
}

}  // namespace REEF_ISA
