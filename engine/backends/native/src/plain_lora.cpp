// Adds one adapter to rows, from factors as its files have them: a few rows, seldom.
//
//     shrink   h[row][r] = sum over k of a[r][k] x[row][k], in float32
//     expand   y[row][c] = scale[c] y[row][c] + shift[c] + sum over r of h[row][r] b[r][c]
//
// What is served is compared with this, so it shares nothing with lora.cpp: neither the layout of
// factors nor the lists of rows.
#include <algorithm>

#include "table.h"
#include "vectors.h"

namespace REEF_ISA {
namespace {

constexpr int kRanks = 8;      // of a chunk of shrink
constexpr int kColumns = 256;  // of a chunk of expand
#if defined(__AVX512BF16__)
constexpr int kRows = 8;  // that read a factor together
#else
constexpr int kRows = 4;
#endif

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Takes kRows rows of an array from a first one on; where there are fewer, the last one stands for
// the rest.
template <class T>
struct Rows {
    T* at[kRows];

    Rows(T* first, int64_t stride, int rows) {
        for (int i = 0; i < kRows; ++i) at[i] = first + std::min(i, rows - 1) * stride;
    }
};

void shrink_rows(const bf16* a, const Rows<const bf16>& x, int in_features, const Rows<float>& h) {
    F16 sums[kRows];
    for (F16& each : sums) each = zero();
    for_vectors(0, in_features, [&](int k, int n) {
        const F16 factor = load_upto(a + k, n);
        for (int i = 0; i < kRows; ++i) sums[i] = fma(factor, load_upto(x.at[i] + k, n), sums[i]);
    });
    for (int i = 0; i < kRows; ++i) *h.at[i] = sum(sums[i]);
}

void shrink_chunk(const void* pointer, int chunk) {
    const auto& args = *static_cast<const ReefPlainArgs*>(pointer);
    const int64_t ranks = args.site->lora_rank, in = args.in_features;
    const int64_t end = std::min<int64_t>(ranks, (chunk + 1) * kRanks);
    for (int64_t rank = chunk * kRanks; rank < end; ++rank) {
        for (int row = 0; row < args.rows; row += kRows) {
            const int left = args.rows - row;
            shrink_rows(args.site->a + rank * in,
                        {args.x + row * args.x_stride, args.x_stride, left}, args.in_features,
                        {args.h + row * ranks + rank, ranks, left});
        }
    }
}

// Holds columns [begin, end) of a few rows of y in float32.
struct Sums {
    int begin, end;
    float values[kRows][kColumns];

    void start(const ReefPlainSite& site, const Rows<bf16>& y) {
        for_vectors(begin, end, [&](int c, int n) {
            const F16 scale = site.scale ? load_upto(site.scale + c, n) : set1(1.f);
            const F16 shift = site.shift ? load_upto(site.shift + c, n) : zero();
            for (int i = 0; i < kRows; ++i)
                store_upto(values[i] + c - begin, fma(load_upto(y.at[i] + c, n), scale, shift), n);
        });
    }

    void add(const ReefPlainSlice& slice, const Rows<const float>& h) {
        const int64_t width = slice.out1 - slice.out0;
        for_vectors(std::max(begin, slice.out0), std::min(end, slice.out1), [&](int c, int n) {
            F16 sums[kRows];
            for (int i = 0; i < kRows; ++i) sums[i] = load_upto(values[i] + c - begin, n);
            const bf16* b = slice.b + (c - slice.out0);
            for (int rank = slice.r0; rank < slice.r1; ++rank, b += width) {
                const F16 factor = load_upto(b, n);
                for (int i = 0; i < kRows; ++i) sums[i] = fma(set1(h.at[i][rank]), factor, sums[i]);
            }
            for (int i = 0; i < kRows; ++i) store_upto(values[i] + c - begin, sums[i], n);
        });
    }

    void finish(const Rows<bf16>& y) const {  // rows that are the same have the same sums
        for_vectors(begin, end, [&](int c, int n) {
            for (int i = 0; i < kRows; ++i)
                store_upto(y.at[i] + c, load_upto(values[i] + c - begin, n), n);
        });
    }
};

void expand_chunk(const void* pointer, int chunk) {
    const auto& args = *static_cast<const ReefPlainArgs*>(pointer);
    const ReefPlainSite& site = *args.site;
    Sums sums;
    sums.begin = chunk * kColumns;
    sums.end = std::min(site.out_features, sums.begin + kColumns);
    for (int row = 0; row < args.rows; row += kRows) {
        const int left = args.rows - row;
        const Rows<bf16> y(args.y + row * args.y_stride, args.y_stride, left);
        const int64_t ranks = site.lora_rank;
        const Rows<const float> h(args.h + row * ranks, ranks, left);
        sums.start(site, y);
        for (int i = 0; i < site.num_slices; ++i) sums.add(site.slices[i], h);
        sums.finish(y);
    }
}

}  // namespace

reef::Task plain_shrink(const ReefPlainArgs* args, int) {
    return {shrink_chunk, args, ceil_div(args->site->lora_rank, kRanks)};
}

reef::Task plain_expand(const ReefPlainArgs* args, int) {
    return {expand_chunk, args, ceil_div(args->site->out_features, kColumns)};
}

}  // namespace REEF_ISA
