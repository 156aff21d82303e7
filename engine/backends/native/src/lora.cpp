// Applies LoRA to a mixed batch: shrinks h = A x, then expands y = scale y + shift + h B, for each
// adapter's rows.
//
//     shrink   h[i][r] = sum over k of a[r][k] x[row i][k]       both factors contiguous along k:
//              tiles of 4 rows x 4 ranks, one accumulator vector each, added up across lanes at
//              the end and rounded to bf16
//     expand   y[row i][c] = scale[c] y[row i][c] + shift[c]
//                            + sum over pairs p of h[i][2p, 2p+1] . b[p][c][0, 1]
//              tiles of 8 rows x 32 columns, a lane per column; the sum begins at zero, and y is
//              rounded once
//
// A decode is limited by memory: each adapter is read once, from beginning to end. A prefill is
// limited by arithmetic. An element's sum has the same order in every tile, so that its bits depend
// on its row alone.
//
// A chunk is an equal share of the cost of all adapters of the batch at the site. It may begin and
// end in the middle of an adapter, so that chunks are equal even if ranks are very different.
#include <algorithm>

#include "linear_layout.h"
#include "simd.h"
#include "table.h"

namespace REEF_ISA {
namespace {

constexpr int kBlockRows = 32;  // rows of a segment in one piece of work
constexpr int kLanes = 16;
constexpr int kAhead = 2048;        // bytes to prefetch ahead
constexpr int kAffineAhead = 128;   // columns whose scale and shift to prefetch ahead
constexpr int kTogether = 1 << 14;  // bytes of B that all rows multiply before the next ones
#if defined(__AVX512BF16__)
constexpr int kShrinkRows = 4, kTileRanks = 4, kExpandRows = 8;
#else  // half as many registers, and half as wide
constexpr int kShrinkRows = 2, kTileRanks = 2, kExpandRows = 2;
#endif

// Prefetches the line of p, which may lie behind the end of an array.
inline void fetch_soon(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// ==== Shares of the work ====

// Describes rows [row0, row1) of the batch's list, which share an adapter, at one site.
struct Work {
    const ReefLoraSite* site;
    int row0, row1;
};

template <class Body>
inline void for_each_work(const ReefLoraArgs& args, Body body) {
    for (int i = 0; i < args.batch->num_segments; ++i) {
        const ReefLoraSegment& segment = args.batch->segments[i];
        const ReefLoraSite& site = segment.sites[args.site];
        if (!site.num_slices) continue;
        for (int row = segment.start; row < segment.end; row += kBlockRows)
            body(Work{&site, row, std::min(segment.end, row + kBlockRows)});
    }
}

// Returns the cost of reading or multiplying a byte, whichever is longer, in 1/100 ns.
int64_t cost_of_byte(const Work& work) { return std::max(4, work.row1 - work.row0); }

// Returns the number of chunks. Long chunks are read fastest, but there must be enough of them that
// no thread is idle while another has microseconds of work left.
int chunks_of(int64_t cost, int64_t threads) {
    const int64_t nanoseconds = cost / 100;
    const int64_t equal = nanoseconds / 24000 / threads * threads;
    return static_cast<int>(
        std::clamp<int64_t>(equal, std::min(threads, 1 + nanoseconds / 2000), 256));
}

// ==== Shrink ====

// Sums the lanes as a tree: lanes 8 apart, then 4, 2 and 1.
#if defined(__AVX512BF16__)
float sum_lanes(F16 a) {
    const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}

template <int kEven, int kOdd>
F16 fold_quarters(F16 a, F16 b) {
    return {
        _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, kEven), _mm512_shuffle_f32x4(a.v, b.v, kOdd))};
}

template <int kEven, int kOdd>
F16 fold_lanes(F16 a, F16 b) {
    return {_mm512_add_ps(_mm512_shuffle_ps(a.v, b.v, kEven), _mm512_shuffle_ps(a.v, b.v, kOdd))};
}

// Sums 4 x 4 accumulators [row][rank] at once, by the same tree, each into lane 4 row + rank.
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

// Adds the products at columns [k, k + 32), or fewer at the end, to the sums; `load` reads them.
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
void shrink_tile(const bf16* const* x, const bf16* a, const bf16* next, int in_features, bf16* h,
                 int64_t h_stride) {
    const int64_t stride = in_features;
    F16 sums[kRows][kRanks];
    for (auto& row : sums)
        for (F16& entry : row) entry = zero();
    int k = 0;
    for (; k + 32 <= in_features; k += 32) {
        for (int rank = 0; rank < kRanks; ++rank) fetch_soon(next + rank * stride + k);
        multiply_step(sums, x, a, in_features, k, [](const bf16* p) { return load_pairs(p); });
    }
    if (k < in_features) {
        const int rest = in_features - k;
        multiply_step(sums, x, a, in_features, k,
                      [rest](const bf16* p) { return load_pairs(p, rest); });
    }
    store_sums(sums, h, h_stride);
}

// Describes ranks [begin, end) of a piece of work.
struct Ranks {
    Work work;
    int begin, end;
};

// Computes h of kRanks ranks for all rows of the work, and prefetches `next`, which is read after
// these ranks.
template <int kRanks>
void shrink_rows(const ReefLoraArgs& args, const Work& work, int rank, const bf16* next) {
    const int in = args.in_features;
    const bf16* a = work.site->a + static_cast<int64_t>(rank) * in;
    for (int i = work.row0; i < work.row1;) {
        const bf16* x[kShrinkRows];
        const int rows = std::min(kShrinkRows, work.row1 - i);
        for (int j = 0; j < rows; ++j) x[j] = args.x + args.batch->rows[i + j] * args.x_stride;
        bf16* h = args.h + i * args.h_stride + rank;
        if (rows == kShrinkRows) {
            shrink_tile<kShrinkRows, kRanks>(x, a, next, in, h, args.h_stride);
            i += kShrinkRows;
        } else if (rows >= 2) {
            shrink_tile<2, kRanks>(x, a, next, in, h, args.h_stride);
            i += 2;
        } else {
            shrink_tile<1, kRanks>(x, a, next, in, h, args.h_stride);
            i += 1;
        }
    }
}

void shrink_ranks(const ReefLoraArgs& args, const Ranks& ranks, const bf16* next) {
    int rank = ranks.begin;
    for (; rank + kTileRanks <= ranks.end; rank += kTileRanks) {
        const int64_t after = static_cast<int64_t>(rank + kTileRanks) * args.in_features;
        const bf16* following = rank + kTileRanks < ranks.end ? ranks.work.site->a + after : next;
        shrink_rows<kTileRanks>(args, ranks.work, rank, following);
    }
    for (; rank < ranks.end; ++rank) shrink_rows<1>(args, ranks.work, rank, next);
}

// Returns the cost of a tile of ranks.
int64_t cost_of_ranks(const ReefLoraArgs& args, const Work& work) {
    return cost_of_byte(work) * std::max(1, args.in_features) * kTileRanks * 2;
}

int64_t shrink_cost(const ReefLoraArgs& args) {
    int64_t cost = 0;
    for_each_work(args, [&](const Work& work) {
        cost += ceil_div(work.site->lora_rank, kTileRanks) * cost_of_ranks(args, work);
    });
    return cost;
}

// Calls body(ranks) for the tiles that begin within [begin, end) of the total cost.
template <class Body>
void for_ranks_between(const ReefLoraArgs& args, int64_t begin, int64_t end, Body body) {
    for_each_work(args, [&](const Work& work) {
        const int64_t cost = cost_of_ranks(args, work);
        const int64_t tiles = ceil_div(work.site->lora_rank, kTileRanks);
        const int64_t first = std::clamp<int64_t>((begin + cost - 1) / cost, 0, tiles);
        const int64_t last = std::clamp<int64_t>((end + cost - 1) / cost, 0, tiles);
        const int rank = static_cast<int>(first) * kTileRanks;
        if (first < last)
            body(Ranks{work, rank, std::min<int>(last * kTileRanks, work.site->lora_rank)});
        begin -= tiles * cost;
        end -= tiles * cost;
    });
}

void shrink_chunk(const void* pointer, int chunk) {
    const auto& args = *static_cast<const ReefLoraArgs*>(pointer);
    const int64_t cost = shrink_cost(args);
    const int chunks = chunks_of(cost, args.threads);
    Ranks ranks{};  // computed only once the ranks after them are known, to prefetch those
    for_ranks_between(args, cost * chunk / chunks, cost * (chunk + 1) / chunks,
                      [&](const Ranks& next) {
        const bf16* a = next.work.site->a + static_cast<int64_t>(next.begin) * args.in_features;
        if (ranks.work.site) shrink_ranks(args, ranks, a);
        ranks = next;
    });
    const bf16* a = ranks.work.site ? ranks.work.site->a : nullptr;
    const int64_t after = static_cast<int64_t>(ranks.end) * args.in_features;
    if (a) shrink_ranks(args, ranks, a + after);
}

// ==== Expand ====

// Writes y, rounded once. Subnormal results may become zero, as they do in the products.
inline void put(bf16* y, F16 value) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(value.v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), (__m256i)rounded);
#else
    store(y, value);
#endif
}

inline void put(float* y, F16 value) { store(y, value); }

// Holds the scale and shift of 16 columns.
struct Affine {
    F16 scale, shift;

    // Reads those of the slice's columns from `column` on, of which `left` are in the slice.
    static Affine read(const ReefLoraSlice& slice, int column, int left) {
        if (left <= 0) return {zero(), zero()};
        const auto some = [&](const float* p) {
            return left >= kLanes ? load(p + column) : load(p + column, left);
        };
        return {slice.scale ? some(slice.scale) : set1(1.f),
                slice.shift ? some(slice.shift) : zero()};
    }

    // Prefetches a panel that is read later.
    static void fetch_soon(const ReefLoraSlice& slice, int column) {
        for (const float* values : {slice.scale, slice.shift}) {
            if (!values) continue;
            REEF_ISA::fetch_soon(values + column);
            REEF_ISA::fetch_soon(values + column + kLanes);
        }
    }

    F16 operator()(F16 y) const { return fma(y, scale, shift); }
};

// Stands for the scale and shift of a slice that has neither.
struct Unchanged {
    static Unchanged read(const ReefLoraSlice&, int, int) { return {}; }
    static void fetch_soon(const ReefLoraSlice&, int) {}
    F16 operator()(F16 y) const { return y; }
};

template <class Out, class Change>
inline void add_to(Out* y, const Change& change, F16 sums) {
    put(y, change(load(y)) + sums);
}

// Computes lanes [begin, end) of y alone, and leaves its other lanes as they are.
template <class Out, class Change>
inline void add_to(Out* y, const Change& change, F16 sums, int begin, int end) {
    if (begin >= end) return;
    const size_t bytes = sizeof(Out) * static_cast<size_t>(end - begin);
    Out some[kLanes] = {};
    std::memcpy(some + begin, y + begin, bytes);
    add_to(some, change, sums);
    std::memcpy(y + begin, some + begin, bytes);
}

// Describes columns [begin, end) of a slice.
struct Columns {
    Work work;
    const ReefLoraSlice* slice;
    int begin, end;

    int ranks() const { return slice->r1 - slice->r0; }
    int width() const { return slice->out1 - slice->out0; }
    // B is [panel][pair][32][2].
    int64_t panel_size() const { return int64_t{64} * ((ranks() + 1) / 2); }
    const bf16* at(int panel) const { return slice->b + panel * panel_size(); }
    // The bytes that a panel of columns reads besides y.
    int64_t panel_bytes() const {
        const int affine = (slice->scale != nullptr) + (slice->shift != nullptr);
        return 2 * panel_size() + int64_t{4} * reef::kPanel * affine;
    }
    int first_panel() const { return begin / reef::kPanel; }
    int last_panel() const { return ceil_div(end, reef::kPanel); }
};

// Describes a panel and what to prefetch: `ahead`, which is kAhead bytes later. What lies at `turn`
// or behind it, where the columns end, is read `jump` elements further on instead.
struct Panel {
    const bf16* b;
    const bf16* ahead;
    const bf16* turn;
    int64_t jump;
    int ranks;
};

template <int kRows>
inline void add_pairs(F16 (&sums)[kRows][2], const bf16* const* h, const Panel& panel) {
    const auto add = [&](const B32(&factors)[kRows], int pair) {
        const B32 low = load_pairs(panel.b + 64 * pair),
                  high = load_pairs(panel.b + 64 * pair + 32);
        const bf16* ahead = panel.ahead + 64 * pair;
        ahead += ahead < panel.turn ? 0 : panel.jump;
        fetch_soon(ahead);
        fetch_soon(ahead + 32);
        for (int row = 0; row < kRows; ++row) {
            sums[row][0] = dot(factors[row], low, sums[row][0]);
            sums[row][1] = dot(factors[row], high, sums[row][1]);
        }
    };
    B32 factors[kRows];
    const int pairs = panel.ranks / 2;
    for (int pair = 0; pair < pairs; ++pair) {
        for (int row = 0; row < kRows; ++row) factors[row] = repeat_pair(h[row] + 2 * pair);
        add(factors, pair);
    }
    if (panel.ranks % 2 == 0) return;
    for (int row = 0; row < kRows; ++row) {  // what follows the last rank of h may be NaN
        const bf16 last[2] = {h[row][2 * pairs], 0};
        factors[row] = repeat_pair(last);
    }
    add(factors, pairs);
}

// Computes panels [first, last) of `columns`, for kRows rows of the batch's list from i on.
template <class Out, class Change, int kRows>
void expand_tile(const ReefLoraArgs& args, const Columns& columns, int first, int last, int i,
                 const bf16* next) {
    const ReefLoraSlice& slice = *columns.slice;
    Out* y[kRows];
    const bf16* h[kRows];
    for (int j = 0; j < kRows; ++j) {
        y[j] = static_cast<Out*>(args.y) + args.batch->rows[i + j] * args.y_stride + slice.out0;
        h[j] = args.h + (i + j) * args.h_stride + slice.r0;
    }
    for (int p = first; p < last; ++p) {
        const int column = p * reef::kPanel;
        F16 sums[kRows][2];
        for (auto& row : sums) row[0] = row[1] = zero();
        if (columns.ranks()) {
            const bf16 *b = columns.at(p), *turn = columns.at(columns.last_panel());
            const int64_t jump = next ? next - turn : 0;
            add_pairs(sums, h, Panel{b, b + kAhead / 2, turn, jump, columns.ranks()});
        }
        Change::fetch_soon(slice, std::min(column + kAffineAhead, columns.width() - 1));
        const int begin = std::max(columns.begin - column, 0);
        const int end = std::min(columns.end - column, int{reef::kPanel});
        const Change low = Change::read(slice, column, columns.width() - column);
        const Change high = Change::read(slice, column + kLanes, columns.width() - column - kLanes);
        for (int row = 0; row < kRows; ++row) {
            Out* out = y[row] + column;
            if (end - begin == reef::kPanel) {
                add_to(out, low, sums[row][0]);
                add_to(out + kLanes, high, sums[row][1]);
            } else {
                add_to(out, low, sums[row][0], begin, std::min(end, kLanes));
                add_to(out + kLanes, high, sums[row][1], std::max(begin - kLanes, 0), end - kLanes);
            }
        }
    }
}

template <class Out, class Change, int kRows = kExpandRows>
void expand_panels(const ReefLoraArgs& args, const Columns& columns, int first, int last, int i,
                   const bf16* next) {
    const int end = columns.work.row1;
    for (; i + kRows <= end; i += kRows)
        expand_tile<Out, Change, kRows>(args, columns, first, last, i, next);
    if constexpr (kRows > 1)
        expand_panels<Out, Change, kRows / 2>(args, columns, first, last, i, next);
}

// Returns the function for this type of y and this slice.
auto expand_of(const ReefLoraArgs& args, const ReefLoraSlice& slice) {
    const bool is_changed = slice.scale || slice.shift;
    if (args.y_is_float)
        return is_changed ? expand_panels<float, Affine> : expand_panels<float, Unchanged>;
    return is_changed ? expand_panels<bf16, Affine> : expand_panels<bf16, Unchanged>;
}

// Computes all panels of `columns` for all rows of the work, and prefetches `next`, which is read
// after these columns, if it is not null.
void expand_columns(const ReefLoraArgs& args, const Columns& columns, const bf16* next) {
    const int64_t together = std::max<int64_t>(kTogether / columns.panel_bytes(), 1);
    const auto expand = expand_of(args, *columns.slice);
    const int end = columns.last_panel();
    for (int panel = columns.first_panel(); panel < end;) {
        const int last = static_cast<int>(std::min<int64_t>(panel + together, end));
        expand(args, columns, panel, last, columns.work.row0, next);
        panel = last;
    }
}

template <class Body>
void for_each_slice(const ReefLoraArgs& args, Body body) {
    for_each_work(args, [&](const Work& work) {
        for (int s = 0; s < work.site->num_slices; ++s) {
            const ReefLoraSlice& slice = work.site->slices[s];
            if (slice.r0 < slice.r1 || slice.scale || slice.shift)
                body(Columns{work, &slice, 0, slice.out1 - slice.out0});
        }
    });
}

int64_t cost_of_panel(const Columns& columns) {
    return cost_of_byte(columns.work) * columns.panel_bytes();
}

int64_t expand_cost(const ReefLoraArgs& args) {
    int64_t cost = 0;
    for_each_slice(args, [&](const Columns& columns) {
        cost += cost_of_panel(columns) * columns.last_panel();
    });
    return cost;
}

// Calls body(columns) for the panels that begin within [begin, end) of the total cost.
template <class Body>
void for_columns_between(const ReefLoraArgs& args, int64_t begin, int64_t end, Body body) {
    for_each_slice(args, [&](Columns columns) {
        const int64_t cost = cost_of_panel(columns), panels = columns.last_panel();
        const int64_t first = std::clamp<int64_t>((begin + cost - 1) / cost, 0, panels);
        const int64_t last = std::clamp<int64_t>((end + cost - 1) / cost, 0, panels);
        columns.begin = static_cast<int>(first) * reef::kPanel;
        columns.end = std::min(columns.end, static_cast<int>(last) * reef::kPanel);
        if (first < last) body(columns);
        begin -= panels * cost;
        end -= panels * cost;
    });
}

void expand_chunk(const void* pointer, int chunk) {
    const auto& args = *static_cast<const ReefLoraArgs*>(pointer);
    const int64_t cost = expand_cost(args);
    const int chunks = chunks_of(cost, args.threads);
    Columns columns{};  // computed only once the columns after them are known, to prefetch those
    for_columns_between(args, cost * chunk / chunks, cost * (chunk + 1) / chunks,
                        [&](const Columns& next) {
        const bf16* following = next.ranks() ? next.at(next.first_panel()) : nullptr;
        if (columns.slice) expand_columns(args, columns, following);
        columns = next;
    });
    if (columns.slice) expand_columns(args, columns, nullptr);
}

}  // namespace

reef::Task lora_shrink(const ReefLoraArgs* args, int) {
    const int64_t cost = shrink_cost(*args);
    return {shrink_chunk, args, cost ? chunks_of(cost, args->threads) : 0};
}

reef::Task lora_expand(const ReefLoraArgs* args, int) {
    const int64_t cost = expand_cost(*args);
    return {expand_chunk, args, cost ? chunks_of(cost, args->threads) : 0};
}

}  // namespace REEF_ISA
