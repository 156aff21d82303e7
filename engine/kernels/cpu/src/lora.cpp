// LoRA of a mixed batch: shrink h = A x, then expand y += h B, for the rows of each adapter.
//
//     shrink   h[i][r] = sum over k of a[r][k] x[row i][k]       both factors contiguous along k:
//              tiles of 4 rows x 4 ranks, one accumulator vector each, added up across lanes at
//              the end and rounded to bf16
//     expand   y[row i][c] += sum over pairs p of h[i][2p, 2p+1] . b[p][c][0, 1]
//              tiles of 4 rows x 64 columns, a lane per column; the sum begins at zero, and y is
//              rounded once
//
// A decode is bound by the bytes of its adapters, each of which is read once; a prefill by
// arithmetic. Whatever the tile, an element's sum has the same order, so that its bits depend on
// its row alone.
//
// A chunk is a piece of one segment's work: some of its rows and some of the ranks or columns.
#include <algorithm>

#include "simd.h"
#include "table.h"

namespace REEF_ISA {
namespace {

constexpr int kBlockRows = 32;    // of a segment, to a chunk
constexpr int kManyRows = 16;     // from here on a chunk is measured in arithmetic, not in bytes
constexpr int kShrinkBytes = 1 << 15;  // of A, to a chunk
constexpr int kExpandBytes = 1 << 16;  // of B; twice as many where segments alone make many chunks
constexpr int kManySegments = 5;
constexpr int kLanes = 16;
constexpr int kAhead = 256;  // of a pair's columns, to be fetched early
#if defined(__AVX512BF16__)
constexpr int kTileRows = 4, kTileRanks = 4, kTileVectors = 4;
#else  // half as many registers, and half as wide
constexpr int kTileRows = 2, kTileRanks = 2, kTileVectors = 2;
#endif
constexpr int kTileColumns = kTileVectors * kLanes;

// What is read a tile later. Past the end of an array it is somebody else's and does no harm.
inline void fetch(const bf16* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline void fetch_soon(const bf16* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
}

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// ==== Chunks ====

// One adapter's work at one site: blocks of its rows times runs of its ranks or columns.
struct Work {
    const ReefLoraSegment* segment;
    const ReefLoraSite* site;
    int begin, end;  // ranks, or columns
    int length;      // of a run

    int runs() const { return ceil_div(end - begin, length); }
    int blocks() const { return ceil_div(segment->end - segment->start, kBlockRows); }
    int chunks() const { return runs() * blocks(); }
};

using Divide = Work (*)(const ReefLoraArgs&, const ReefLoraSegment&, const ReefLoraSite&);

// `wanted` runs of equal length, a multiple of `unit`.
int run_length(int size, int wanted, int unit) {
    return std::max(1, ceil_div(ceil_div(size, std::max(1, wanted)), unit)) * unit;
}

Work divide_ranks(const ReefLoraArgs& args, const ReefLoraSegment& segment,
                  const ReefLoraSite& site) {
    const int64_t rank_bytes = std::max<int64_t>(1, args.in_features) * sizeof(bf16);
    const bool is_long = segment.end - segment.start >= kManyRows;
    const int wanted = is_long ? ceil_div(site.lora_rank, 32)
                               : static_cast<int>(site.lora_rank * rank_bytes / kShrinkBytes);
    return {&segment, &site, 0, site.lora_rank, run_length(site.lora_rank, wanted, kTileRanks)};
}

Work divide_columns(const ReefLoraArgs& args, const ReefLoraSegment& segment,
                    const ReefLoraSite& site) {
    int begin = site.slices[0].out0, end = site.slices[0].out1;
    int64_t bytes = 0;
    for (int s = 0; s < site.num_slices; ++s) {
        const ReefLoraSlice& slice = site.slices[s];
        begin = std::min(begin, slice.out0);
        end = std::max(end, slice.out1);
        bytes += static_cast<int64_t>(slice.out1 - slice.out0) * (slice.r1 - slice.r0) * 2;
    }
    const int64_t piece = kExpandBytes * (args.batch->num_segments < kManySegments ? 1 : 2);
    return {&segment, &site, begin, end,
            run_length(end - begin, static_cast<int>(bytes / piece), kTileColumns)};
}

template <Divide divide, class Body>
inline void for_each_work(const ReefLoraArgs& args, Body body) {
    for (int i = 0; i < args.batch->num_segments; ++i) {
        const ReefLoraSegment& segment = args.batch->segments[i];
        const ReefLoraSite& site = segment.sites[args.site];
        if (site.a && site.num_slices && body(divide(args, segment, site))) return;
    }
}

template <Divide divide>
int count_chunks(const ReefLoraArgs& args) {
    int chunks = 0;
    for_each_work<divide>(args, [&](const Work& work) {
        chunks += work.chunks();
        return false;
    });
    return chunks;
}

// What a chunk does: rows [row0, row1) of the batch's list and ranks or columns [begin, end).
struct Piece {
    const ReefLoraSite* site;
    int row0, row1;
    int begin, end;
};

template <Divide divide>
Piece find_piece(const ReefLoraArgs& args, int chunk) {
    Piece piece{};
    for_each_work<divide>(args, [&](const Work& work) {
        if (chunk >= work.chunks()) {
            chunk -= work.chunks();
            return false;
        }
        const int row0 = work.segment->start + chunk / work.runs() * kBlockRows;
        const int begin = work.begin + chunk % work.runs() * work.length;
        piece = {work.site, row0, std::min(work.segment->end, row0 + kBlockRows), begin,
                 std::min(work.end, begin + work.length)};
        return true;
    });
    return piece;
}

// ==== Shrink ====

// Added up as a tree: lanes 8 apart, then 4, 2 and 1.
#if defined(__AVX512BF16__)
float sum_lanes(F16 a) {
    const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}

template <int kEven, int kOdd>
F16 fold_quarters(F16 a, F16 b) {
    return {_mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, kEven),
                          _mm512_shuffle_f32x4(a.v, b.v, kOdd))};
}

template <int kEven, int kOdd>
F16 fold_lanes(F16 a, F16 b) {
    return {_mm512_add_ps(_mm512_shuffle_ps(a.v, b.v, kEven), _mm512_shuffle_ps(a.v, b.v, kOdd))};
}

// Of 4 x 4 accumulators [row][rank] at once, by the same tree; the sum is in lane 4 row + rank.
F16 sum_lanes(const F16 (&sums)[4][4]) {
    F16 ranks[4];
    for (int i = 0; i < 4; ++i) {
        const F16 low = fold_quarters<0x44, 0xee>(sums[0][i], sums[1][i]);
        const F16 high = fold_quarters<0x44, 0xee>(sums[2][i], sums[3][i]);
        ranks[i] = fold_quarters<0x88, 0xdd>(low, high);
    }
    const F16 low = fold_lanes<0x44, 0xee>(ranks[0], ranks[1]);
    const F16 high = fold_lanes<0x44, 0xee>(ranks[2], ranks[3]);
    return fold_lanes<0x88, 0xdd>(low, high);
}

void store_sums(const F16 (&sums)[4][4], bf16* h, int64_t h_stride) {
    bf16 rounded[16];
    store(rounded, sum_lanes(sums));
    for (int row = 0; row < 4; ++row) std::memcpy(h + row * h_stride, rounded + 4 * row, 8);
}
#else
float sum_lanes(F16 a) { return sum(a); }
#endif

template <int kRows, int kRanks>
void store_sums(const F16 (&sums)[kRows][kRanks], bf16* h, int64_t h_stride) {
    for (int row = 0; row < kRows; ++row)
        for (int rank = 0; rank < kRanks; ++rank)
            h[row * h_stride + rank] = to_bf16(sum_lanes(sums[row][rank]));
}

// `x` and `a` at the same k; n = 32 but at the end of k.
template <int kRows, int kRanks, class Load>
inline void multiply_step(F16 (&sums)[kRows][kRanks], const bf16* const* x, const bf16* a,
                          int64_t a_stride, int k, Load load) {
    B32 columns[kRows];
    for (int row = 0; row < kRows; ++row) columns[row] = load(x[row] + k);
    for (int rank = 0; rank < kRanks; ++rank) {
        const B32 factor = load(a + rank * a_stride + k);
        for (int row = 0; row < kRows; ++row)
            sums[row][rank] = dot(columns[row], factor, sums[row][rank]);
    }
}

template <int kRows, int kRanks>
void shrink_tile(const bf16* const* x, const bf16* a, int in_features, bf16* h, int64_t h_stride) {
    F16 sums[kRows][kRanks];
    for (auto& row : sums)
        for (F16& entry : row) entry = zero();
    int k = 0;
    for (; k + 32 <= in_features; k += 32) {
        for (int rank = 0; rank < kRanks; ++rank)
            fetch_soon(a + (kRanks + rank) * static_cast<int64_t>(in_features) + k);
        multiply_step(sums, x, a, in_features, k, [](const bf16* p) { return load_pairs(p); });
    }
    if (k < in_features) {
        const int rest = in_features - k;
        multiply_step(sums, x, a, in_features, k,
                      [rest](const bf16* p) { return load_pairs(p, rest); });
    }
    store_sums(sums, h, h_stride);
}

template <int kRanks>
void shrink_rows(const ReefLoraArgs& args, const Piece& piece, int rank) {
    const int in = args.in_features;
    const bf16* a = piece.site->a + static_cast<int64_t>(rank) * in;
    for (int i = piece.row0; i < piece.row1;) {
        const bf16* x[kTileRows];
        const int rows = std::min(kTileRows, piece.row1 - i);
        for (int j = 0; j < rows; ++j) x[j] = args.x + args.batch->rows[i + j] * args.x_stride;
        bf16* h = args.h + i * args.h_stride + rank;
        if (rows == kTileRows) {
            shrink_tile<kTileRows, kRanks>(x, a, in, h, args.h_stride);
            i += kTileRows;
        } else if (rows >= 2) {
            shrink_tile<2, kRanks>(x, a, in, h, args.h_stride);
            i += 2;
        } else {
            shrink_tile<1, kRanks>(x, a, in, h, args.h_stride);
            i += 1;
        }
    }
}

void shrink_chunk(const void* pointer, int chunk) {
    const auto& args = *static_cast<const ReefLoraArgs*>(pointer);
    const Piece piece = find_piece<divide_ranks>(args, chunk);
    int rank = piece.begin;
    for (; rank + kTileRanks <= piece.end; rank += kTileRanks)
        shrink_rows<kTileRanks>(args, piece, rank);
    for (; rank < piece.end; ++rank) shrink_rows<1>(args, piece, rank);
}

// ==== Expand ====

// y += sums, rounded once. Subnormal results may become zero, as they do in the products.
#if defined(__AVX512BF16__)
inline void add_to(bf16* y, F16 sums) {
    const __m256bh rounded = _mm512_cvtneps_pbh((load(y) + sums).v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), (__m256i)rounded);
}
inline void add_to(bf16* y, F16 sums, int n) {
    const __m256bh rounded = _mm512_cvtneps_pbh((load(y, n) + sums).v);
    _mm256_mask_storeu_epi16(y, first(n), (__m256i)rounded);
}
#else
inline void add_to(bf16* y, F16 sums) { store(y, load(y) + sums); }
inline void add_to(bf16* y, F16 sums, int n) { store(y, load(y, n) + sums, n); }
#endif

// Columns of y, from `y[row]` on, of kRows rows: kVectors whole vectors or `n` < 16 columns.
struct Columns {
    const bf16* b;   // their first pair
    int64_t stride;  // from a pair to the next
    int ranks;
    int n;
};

template <int kRows, int kVectors, class LoadB>
inline void add_pairs(F16 (&sums)[kRows][kVectors], const bf16* const* h, const Columns& columns,
                      LoadB load_b) {
    const auto add = [&](const B32 (&factors)[kRows], const bf16* b) {
        for (int v = 0; v < kVectors; ++v) {
            const B32 pairs = load_b(b + 32 * v);
            fetch(b + 32 * v + kAhead);
            for (int row = 0; row < kRows; ++row)
                sums[row][v] = dot(factors[row], pairs, sums[row][v]);
        }
    };
    B32 factors[kRows];
    const bf16* b = columns.b;
    int rank = 0;
    for (; rank + 2 <= columns.ranks; rank += 2, b += columns.stride) {
        for (int row = 0; row < kRows; ++row) factors[row] = repeat_pair(h[row] + rank);
        add(factors, b);
    }
    if (rank == columns.ranks) return;
    for (int row = 0; row < kRows; ++row) {  // what follows the last rank of h may be NaN
        const bf16 last[2] = {h[row][rank], 0};
        factors[row] = repeat_pair(last);
    }
    add(factors, b);
}

template <int kRows, int kVectors>
void expand_tile(bf16* const* y, const bf16* const* h, const Columns& columns) {
    F16 sums[kRows][kVectors];
    for (auto& row : sums)
        for (F16& entry : row) entry = zero();
    add_pairs(sums, h, columns, [](const bf16* p) { return load_pairs(p); });
    for (int row = 0; row < kRows; ++row)
        for (int v = 0; v < kVectors; ++v)
            add_to(y[row] + kLanes * v, sums[row][v]);
}

template <int kRows>
void expand_part_of_vector(bf16* const* y, const bf16* const* h, const Columns& columns) {
    F16 sums[kRows][1];
    for (auto& row : sums) row[0] = zero();
    const int n = columns.n;
    add_pairs(sums, h, columns, [n](const bf16* p) { return load_pairs(p, 2 * n); });
    for (int row = 0; row < kRows; ++row) add_to(y[row], sums[row][0], n);
}

template <int kRows>
void expand_columns(bf16* const* y, const bf16* const* h, const Columns& columns) {
    if (columns.n == kTileColumns) expand_tile<kRows, kTileVectors>(y, h, columns);
    else if (columns.n == kLanes) expand_tile<kRows, 1>(y, h, columns);
    else expand_part_of_vector<kRows>(y, h, columns);
}

// The next tile's part of y: too short a run per row for the machine to see it coming.
inline void fetch_outputs(const ReefLoraArgs& args, int row, int end, int column) {
    for (int i = row; i < std::min(row + kTileRows, end); ++i) {
        const bf16* y = args.y + args.batch->rows[i] * args.y_stride + column;
        fetch(y);
        fetch(y + 32);
    }
}

// `column` of y is the first of `columns`, `rank` the first of the slice.
void expand_rows(const ReefLoraArgs& args, const Piece& piece, int column, int rank,
                 const Columns& columns) {
    for (int i = piece.row0; i < piece.row1;) {
        bf16* y[kTileRows];
        const bf16* h[kTileRows];
        const int rows = std::min(kTileRows, piece.row1 - i);
        for (int j = 0; j < rows; ++j) {
            y[j] = args.y + args.batch->rows[i + j] * args.y_stride + column;
            h[j] = args.h + (i + j) * args.h_stride + rank;
        }
        fetch_outputs(args, i + kTileRows, piece.row1, column);
        if (rows == kTileRows) {
            expand_columns<kTileRows>(y, h, columns);
            i += kTileRows;
        } else if (rows >= 2) {
            expand_columns<2>(y, h, columns);
            i += 2;
        } else {
            expand_columns<1>(y, h, columns);
            i += 1;
        }
    }
}

// The beginning of every pair's run of columns, all at once; from there on each tile looks ahead.
void fetch_first_columns(const ReefLoraSlice& slice, int column) {
    const int width = slice.out1 - slice.out0;
    const int pairs = (slice.r1 - slice.r0 + 1) / 2;
    for (int pair = 0; pair < pairs; ++pair) {
        const bf16* b = slice.b + 2 * (static_cast<int64_t>(pair) * width + column - slice.out0);
        for (int i = 0; i < kAhead; i += 32) fetch_soon(b + i);
    }
}

void expand_slice(const ReefLoraArgs& args, const Piece& piece, const ReefLoraSlice& slice) {
    const int begin = std::max(piece.begin, slice.out0), end = std::min(piece.end, slice.out1);
    const int64_t stride = 2 * static_cast<int64_t>(slice.out1 - slice.out0);
    if (begin < end) fetch_first_columns(slice, begin);
    for (int column = begin; column < end;) {
        const int left = end - column;
        const int n = left >= kTileColumns ? kTileColumns : std::min(left, kLanes);
        const bf16* b = slice.b + 2 * (column - slice.out0);
        expand_rows(args, piece, column, slice.r0, {b, stride, slice.r1 - slice.r0, n});
        column += n;
    }
}

void expand_chunk(const void* pointer, int chunk) {
    const auto& args = *static_cast<const ReefLoraArgs*>(pointer);
    const Piece piece = find_piece<divide_columns>(args, chunk);
    for (int s = 0; s < piece.site->num_slices; ++s)
        expand_slice(args, piece, piece.site->slices[s]);
}

}  // namespace

reef::Task lora_shrink(const ReefLoraArgs* args, int) {
    return {shrink_chunk, args, count_chunks<divide_ranks>(*args)};
}

reef::Task lora_expand(const ReefLoraArgs* args, int) {
    return {expand_chunk, args, count_chunks<divide_columns>(*args)};
}

}  // namespace REEF_ISA
