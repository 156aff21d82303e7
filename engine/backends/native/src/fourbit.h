// Computes linear layers of 4-bit codes; a format gives the values of codes and the type of x.
//
//   y[row, out] = bias[out] + sum over groups g of scales[out, g] * dot(g)
//   dot(g)      = sum over k in g of value(code[out, k]) * x[row, k]   (+ start(g), see the format)
//
// The sums of groups are added in turn (Format::add), whoever has computed them.
//
// Layout. A panel is 32 outputs, a step 8 neighbouring inputs. The codes of one step of a panel are
// 128 bytes, a lane of four bytes for each output; the format defines the order of the eight codes
// in a lane. The steps of two neighbouring groups alternate, so that both groups can be summed at
// once while memory is read in order: [panel][pair of groups][step][group of the pair]. The last
// group is alone where their number is odd. Scales are float [panel][group][32], and so are zero
// points where there are any.
//
// A format's dot product takes words. A word has four bytes for each of 16 outputs: two bf16 or
// four int8 of neighbouring inputs. A step decodes to kWords words, and x is read word by word.
//
// For a few rows the codes are decoded in registers. For many rows a slice of a panel is decoded
// once into a buffer that stays in the first-level cache, and is multiplied from there: the same
// operations in the same order.
#pragma once
#include <utility>

#include "fourbit_cut.h"
#include "linear_output.h"
#include "simd.h"

namespace REEF_ISA {
namespace fourbit {

constexpr int kStep = 8;
constexpr int kStepBytes = kPanel * kStep / 2;
constexpr int kWordBytes = kPanel * 4;  // a word of all outputs of a panel
constexpr int kLargestGroup = 256;      // a slice holds whole groups
constexpr int kBlockRows = 96;          // rows that share a decoded slice
constexpr int kAhead = 2048;            // bytes that a panel is prefetched ahead
#if defined(__AVX512BF16__)
constexpr int kFewRows = 8;     // at most so many rows decode in registers
constexpr int kPairedRows = 2;  // at most so many rows take two groups at once
constexpr int kTileRows = 12;   // rows of decoded weights whose sums fill the registers
#else
constexpr int kFewRows = 2;
constexpr int kPairedRows = 0;
constexpr int kTileRows = 2;
#endif

// Holds the codes of one step of 16 outputs.
#if defined(__AVX512BF16__)
struct Codes { __m512i v; };
inline Codes load_codes(const uint8_t* p) { return {_mm512_load_si512(p)}; }
#else
struct Codes { __m256i lo, hi; };
inline Codes load_codes(const uint8_t* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_load_si256(q), _mm256_load_si256(q + 1)};
}
#endif

// Calls f(row, half) for each sum of kRows rows. Both arguments are constants: otherwise compilers
// do not keep an array of sums in registers.
template <int kRows, class F, int... kIndex>
__attribute__((always_inline)) inline void for_sums(F f, std::integer_sequence<int, kIndex...>) {
    (f(std::integral_constant<int, kIndex / 2>{}, std::integral_constant<int, kIndex % 2>{}), ...);
}
template <int kRows, class F>
__attribute__((always_inline)) inline void for_sums(F f) {
    for_sums<kRows>(f, std::make_integer_sequence<int, 2 * kRows>{});
}

struct Panel {
    const uint8_t* codes;
    const float* scales;  // [group][32]
    const float* zeros;   // [group][32] or null
    int group_size, groups;

    bool is_paired(int group) const { return (group | 1) < groups; }
    int step_bytes(int group) const { return is_paired(group) ? 2 * kStepBytes : kStepBytes; }
    const uint8_t* codes_of(int group) const {  // of the group's first step
        return codes + int64_t{group & ~1} * group_size * (kPanel / 2) + (group & 1) * kStepBytes;
    }
    F16 scale(int group, int half) const { return load(scales + group * kPanel + 16 * half); }
    F16 zero_point(int group, int half) const { return load(zeros + group * kPanel + 16 * half); }
};

inline Panel panel_of(const ReefLinear& linear, int panel) {
    const int groups = linear.in_features / linear.group_size;
    const int64_t first = int64_t{panel} * groups * kPanel;
    const auto* zeros = static_cast<const float*>(linear.zeros);
    return {static_cast<const uint8_t*>(linear.packed) +
                int64_t{panel} * linear.in_features * (kPanel / 2),
            static_cast<const float*>(linear.scales) + first,
            zeros == nullptr ? nullptr : zeros + first, linear.group_size, groups};
}

inline void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

// Writes sixteen outputs of a row, with their bias. A panel's second half may have no outputs.
inline void write(const ReefLinearArgs& args, int row, int output, F16 value) {
    if (output >= args.linear->out_features) return;
    if (args.linear->bias) value = value + bias_of(*args.linear, output);
    put(args, row, output, value);
}

// ==== A few rows ====

template <class Format, int kWord, int kRows>
inline void add_word(Codes c0, Codes c1, const typename Format::Values& values, const uint8_t* x,
                     int64_t stride, typename Format::Sum (&sums)[kRows][2]) {
    const auto w0 = Format::template decode<kWord>(c0, values);
    const auto w1 = Format::template decode<kWord>(c1, values);
    for_sums<kRows>([&](auto row, auto half) {
        const auto repeated = Format::repeat(x + row * stride + 4 * kWord);
        sums[row][half] = Format::dot(half == 0 ? w0 : w1, repeated, sums[row][half]);
    });
}

template <class Format, int kRows>
inline void add_step(const uint8_t* codes, const typename Format::Values& values, const uint8_t* x,
                     int64_t stride, typename Format::Sum (&sums)[kRows][2]) {
    if (kRows > kPairedRows) {  // for fewer rows the hardware prefetches enough
        prefetch(codes + kAhead);
        prefetch(codes + kAhead + kStepBytes / 2);
    }
    const Codes c0 = load_codes(codes), c1 = load_codes(codes + kStepBytes / 2);
    add_word<Format, 0>(c0, c1, values, x, stride, sums);
    add_word<Format, 1>(c0, c1, values, x, stride, sums);
    if constexpr (Format::kWords == 4) {
        add_word<Format, 2>(c0, c1, values, x, stride, sums);
        add_word<Format, 3>(c0, c1, values, x, stride, sums);
    }
}

// Adds kGroups neighbouring groups to the totals of rows [0, kRows). Two groups give enough
// independent sums to hide the latency of a dot product.
template <class Format, int kRows, int kGroups>
inline void add_groups(const Panel& panel, const typename Format::Values& values,
                       const typename Format::Rows& rows, int group, F16 (&totals)[kRows][2]) {
    typename Format::Sum sums[kGroups][kRows][2];
    for (int g = 0; g < kGroups; ++g)
        for_sums<kRows>([&](auto row, auto half) {
            sums[g][row][half] = Format::start(panel, rows, row, group + g, half);
        });
    const int steps = panel.group_size / kStep, step_bytes = panel.step_bytes(group);
    const int64_t group_words = int64_t{steps} * Format::kWords;
    const uint8_t* codes = panel.codes_of(group);
    const uint8_t* x = rows.x + group * group_words * 4;
    for (int step = 0; step < steps; ++step, codes += step_bytes, x += 4 * Format::kWords)
        for (int g = 0; g < kGroups; ++g)
            add_step<Format, kRows>(codes + g * kStepBytes, values, x + g * group_words * 4,
                                    rows.stride, sums[g]);
    for (int g = 0; g < kGroups; ++g)
        for_sums<kRows>([&](auto row, auto half) {
            totals[row][half] = Format::add(Format::weights(panel, group + g, half), rows, row,
                                            group + g, sums[g][row][half], totals[row][half]);
        });
}

// Multiplies one panel by all kRows rows of the call.
template <class Format, int kRows>
void few_rows(const ReefLinearArgs& args, const typename Format::Rows& rows, int panel_number) {
    const typename Format::Values values = Format::values();
    const Panel panel = panel_of(*args.linear, panel_number);
    F16 totals[kRows][2];
    for_sums<kRows>([&](auto row, auto half) { totals[row][half] = zero(); });
    int group = 0;
    if constexpr (kRows <= kPairedRows)
        for (; group + 2 <= panel.groups; group += 2)
            add_groups<Format, kRows, 2>(panel, values, rows, group, totals);
    for (; group < panel.groups; ++group)
        add_groups<Format, kRows, 1>(panel, values, rows, group, totals);
    for_sums<kRows>([&](auto row, auto half) {
        write(args, row, panel_number * kPanel + 16 * half,
              Format::result(rows, row, totals[row][half]));
    });
}

// ==== Many rows ====

template <class Format, int kWord>
inline void decode_word(const uint8_t* codes, const typename Format::Values& values,
                        uint8_t* decoded) {
    uint8_t* word = decoded + kWord * kWordBytes;
    Format::store(word, Format::template decode<kWord>(load_codes(codes), values));
    Format::store(word + kWordBytes / 2,
                  Format::template decode<kWord>(load_codes(codes + kStepBytes / 2), values));
}

// Decodes groups [group, end) to [group][step][word of the step][32 outputs].
template <class Format>
void decode_slice(const Panel& panel, int group, int end, uint8_t* decoded) {
    const typename Format::Values values = Format::values();
    for (; group < end; ++group) {
        const uint8_t* codes = panel.codes_of(group);
        for (int step = 0; step < panel.group_size / kStep; ++step) {
            decode_word<Format, 0>(codes, values, decoded);
            decode_word<Format, 1>(codes, values, decoded);
            if constexpr (Format::kWords == 4) {
                decode_word<Format, 2>(codes, values, decoded);
                decode_word<Format, 3>(codes, values, decoded);
            }
            codes += panel.step_bytes(group);
            decoded += Format::kWords * kWordBytes;
        }
    }
}

// Adds groups [group, end) of rows [first, first + kRows) to totals [kRows][32]. `decoded` begins
// with `group`.
template <class Format, int kRows>
void multiply_slice(const Panel& panel, const uint8_t* decoded, const typename Format::Rows& rows,
                    int first, int group, int end, float* totals) {
    const int words = panel.group_size / kStep * Format::kWords;
    const uint8_t* x = rows.x + first * rows.stride + int64_t{group} * words * 4;
    for (; group < end; ++group) {
        typename Format::Sum sums[kRows][2];
        for_sums<kRows>([&](auto row, auto half) {
            sums[row][half] = Format::start(panel, rows, first + row, group, half);
        });
        for (int word = 0; word < words; ++word, decoded += kWordBytes, x += 4) {
            const auto w0 = Format::load(decoded), w1 = Format::load(decoded + kWordBytes / 2);
            for_sums<kRows>([&](auto row, auto half) {
                const auto repeated = Format::repeat(x + row * rows.stride);
                sums[row][half] = Format::dot(half == 0 ? w0 : w1, repeated, sums[row][half]);
            });
        }
        for_sums<kRows>([&](auto row, auto half) {
            float* at = totals + row * kPanel + 16 * half;
            store(at, Format::add(Format::weights(panel, group, half), rows, first + row, group,
                                  sums[row][half], load(at)));
        });
    }
}

template <class Format>
using MultiplySlice = void (*)(const Panel&, const uint8_t*, const typename Format::Rows&, int, int,
                               int, float*);

template <class Format, int... kIndex>
MultiplySlice<Format> multiply_slice_of(int rows, std::integer_sequence<int, kIndex...>) {
    static constexpr MultiplySlice<Format> kernels[] = {multiply_slice<Format, kIndex + 1>...};
    return kernels[rows - 1];
}

// Multiplies one panel by rows [first, first + count), in tiles of nearly equal height.
template <class Format>
void many_rows(const ReefLinearArgs& args, const typename Format::Rows& rows, int first, int count,
               int panel_number) {
    alignas(64) uint8_t decoded[kLargestGroup / kStep * Format::kWords * kWordBytes];
    alignas(64) float totals[kBlockRows * kPanel];
    std::memset(totals, 0, static_cast<size_t>(count) * kPanel * sizeof(float));
    const Panel panel = panel_of(*args.linear, panel_number);
    const int tiles = (count + kTileRows - 1) / kTileRows;
    const int per_slice = kLargestGroup / panel.group_size;
    for (int group = 0; group < panel.groups; group += per_slice) {
        const int end = group + per_slice < panel.groups ? group + per_slice : panel.groups;
        decode_slice<Format>(panel, group, end, decoded);
        for (int tile = 0; tile < tiles; ++tile) {
            const int from = count * tile / tiles, to = count * (tile + 1) / tiles;
            multiply_slice_of<Format>(to - from, std::make_integer_sequence<int, kTileRows>{})(
                panel, decoded, rows, first + from, group, end, totals + from * kPanel);
        }
    }
    for (int row = 0; row < count; ++row)
        for (int half = 0; half < 2; ++half)
            write(args, first + row, panel_number * kPanel + 16 * half,
                  Format::result(rows, first + row, load(totals + row * kPanel + 16 * half)));
}

// ==== The task ====

template <class Format>
using FewRows = void (*)(const ReefLinearArgs&, const typename Format::Rows&, int);

template <class Format, int... kIndex>
FewRows<Format> few_rows_of(int rows, std::integer_sequence<int, kIndex...>) {
    static constexpr FewRows<Format> kernels[] = {few_rows<Format, kIndex + 1>...};
    return kernels[rows - 1];
}

// Multiplies with vector instructions.
template <class Format>
struct Vectors {
    static Cut cut(const ReefLinearArgs& args) { return Cut(args, kBlockRows, 30); }
    // Multiplies panels [panel, end) by rows [first, first + count).
    static void run(const ReefLinearArgs& args, int first, int count, int panel, int end) {
        const typename Format::Rows rows = Format::rows(args);
        if (args.rows > kFewRows) {
            for (; panel < end; ++panel) many_rows<Format>(args, rows, first, count, panel);
        } else {
            const auto kernel =
                few_rows_of<Format>(count, std::make_integer_sequence<int, kFewRows>{});
            for (; panel < end; ++panel) kernel(args, rows, panel);
        }
    }
};

template <class Format>
reef::Task task(const ReefLinearArgs* args, int threads) {
    return task_of<Vectors<Format>>(args, threads);
}

}  // namespace fourbit
}  // namespace REEF_ISA
