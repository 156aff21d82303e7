// attention: softmax(q k) v over paged KV, for decodes and prefill chunks alike.
//
// A chunk is a range of rows with some heads of one kv head; it goes through its requests, and for
// each takes the keys tile by tile for all of its lanes (attention_tile.h), so that a tile is read
// from memory, and decoded where it is int8, once per chunk. Chunks of later rows come later and
// are taken first: that is where long prefills are, and within them the longest contexts.
#include <algorithm>

#include "attention_tile.h"
#include "table.h"

namespace REEF_ISA {
namespace {

constexpr int kMaxLanes = 64;  // of a chunk

// ==== int8 codes to bf16 ====

// n whole numbers, a multiple of 32 with room behind; exact.
void widen_codes(const int8_t* codes, int n, bf16* x) {
#if defined(__AVX512BF16__)
    for (int i = 0; i < n; i += 32) {
        const auto* at = reinterpret_cast<const __m128i*>(codes + i);
        const F16 low = {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at)))};
        const F16 high = {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at + 1)))};
        store_pairs(x + i, round_pairs(low, high));
    }
#else
    for (int i = 0; i < n; i += 8) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
        const __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)));
        const __m256i high = _mm256_srli_epi32(bits, 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x88);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(x + i), _mm256_castsi256_si128(packed));
    }
#endif
}

struct WideTile {  // a tile's codes in bf16
    alignas(64) bf16 keys[kTile * kMaxHeadDim];
    alignas(64) bf16 values[kTile * kMaxHeadDim];
};

// ==== Tiles ====

struct Keys {  // of one request's kv head
    const ReefKvLayer& kv;
    const int32_t* block_table;
    int head;
};

// The runs first <= r < last of the tile that begins at `start`.
void find_tile(const Keys& of, int start, int first, int last, Tile* tile) {
    for (int r = first; r < last; ++r) {
        const int position = start + r * kRun, offset = position % of.kv.block_size;
        const KvHead at = kv_head(of.kv, of.block_table[position / of.kv.block_size], of.head);
        const int bytes = element_bytes(of.kv);
        tile->keys[r] = reinterpret_cast<const bf16*>(at.keys + bytes * key_offset(of.kv.head_dim, offset, 0));
        tile->values[r] = reinterpret_cast<const bf16*>(at.values + bytes * value_offset(of.kv.head_dim, offset, 0));
        if (!at.key_scales) continue;
        tile->key_scales[r] = at.key_scales + offset;
        tile->value_scales[r] = at.value_scales + offset;
    }
}

void widen_tile(Tile* tile, int first, int last, int head_dim, WideTile* wide) {
    const int key_run = kRun * head_dim, value_run = kRun * padded_dim(head_dim);
    for (int r = first; r < last; ++r) {
        bf16 *keys = wide->keys + r * key_run, *values = wide->values + r * value_run;
        widen_codes(reinterpret_cast<const int8_t*>(tile->keys[r]), key_run, keys);
        widen_codes(reinterpret_cast<const int8_t*>(tile->values[r]), value_run, values);
        tile->keys[r] = keys;
        tile->values[r] = values;
    }
}

// ==== Lanes ====

struct Lanes {  // lane row * heads + head
    alignas(64) bf16 q[kMaxLanes * kQueryStride];
    alignas(64) float out[kMaxLanes * kOutStride];
    alignas(64) float sums[kMaxLanes * 16];
    float highest[kMaxLanes];
    int positions[kMaxLanes];
};

struct Work {  // rows of one request and heads that share a kv head
    int request, first_row, rows;
    int kv_head, first_head, heads;
    int position;  // of the first row
    int lanes() const { return rows * heads; }
};

void begin(const ReefAttentionArgs& a, const Work& work, Lanes* lanes) {
    const int head_dim = a.kv.head_dim;
    for (int row = 0; row < work.rows; ++row) {
        const uint16_t* q = a.q + (work.first_row + row) * a.q_stride + int64_t{work.first_head} * head_dim;
        for (int head = 0; head < work.heads; ++head) {
            const int lane = row * work.heads + head;
            std::memcpy(lanes->q + lane * kQueryStride, q + head * head_dim, head_dim * sizeof(bf16));
            std::fill_n(lanes->out + lane * kOutStride, padded_dim(head_dim), 0.f);
            lanes->highest[lane] = -1e30f;  // finite, so that a first tile's 2^(m_before - m) is 0
            lanes->positions[lane] = work.position + row;
        }
    }
    std::fill_n(lanes->sums, work.lanes() * 16, 0.f);
}

void finish(const ReefAttentionArgs& a, const Work& work, const Lanes& lanes) {
    const int head_dim = a.kv.head_dim;
    for (int lane = 0; lane < work.lanes(); ++lane) {
        const int row = work.first_row + lane / work.heads, head = work.first_head + lane % work.heads;
        uint16_t* to = a.out + row * a.out_stride + int64_t{head} * head_dim;
        const F16 inverse = set1(1.f / sum(load(lanes.sums + lane * 16)));
        for (int d = 0; d < head_dim; d += 16)
            store(to + d, load(lanes.out + lane * kOutStride + d) * inverse, std::min(16, head_dim - d));
    }
}

int first_key(const ReefAttentionArgs& a, int position) {
    return a.window > 0 ? std::max(0, position - a.window + 1) : 0;
}

Visible seen_of_tile(const ReefAttentionArgs& a, int position, int start) {
    return {std::max(0, first_key(a, position) - start), std::min(kTile, position + 1 - start)};
}

// ==== Attending ====

template <int M>
void attend_lanes(const ReefAttentionArgs& a, const Tile& tile, int start, const ScoreRule& rule, int lane,
                  Lanes* lanes) {
    Visible seen[M];
    for (int m = 0; m < M; ++m) seen[m] = seen_of_tile(a, lanes->positions[lane + m], start);
    attend_tile<M>(lanes->q + lane * kQueryStride, tile, seen, rule, a.kv.head_dim, lanes->highest + lane,
                   lanes->sums + lane * 16, lanes->out + lane * kOutStride);
}

using AttendLanes = decltype(&attend_lanes<1>);
constexpr AttendLanes kAttendLanes[] = {
    attend_lanes<1>, attend_lanes<2>, attend_lanes<3>, attend_lanes<4>,
#if defined(__AVX512BF16__)
    attend_lanes<5>, attend_lanes<6>, attend_lanes<7>, attend_lanes<8>,
#endif
};

ScoreRule score_rule(const ReefAttentionArgs& a) {
    constexpr float kLog2E = 1.44269504089f;
    const bool scaled = a.kv.format == REEF_KV_INT8;
    if (a.soft_cap == 0.f) return {a.scale * kLog2E, 0.f, scaled};
    return {2.f * kLog2E * a.scale / a.soft_cap, a.soft_cap * kLog2E, scaled};
}

void attend(const ReefAttentionArgs& a, const Work& work) {
    Lanes lanes;
    WideTile wide;
    begin(a, work, &lanes);
    const ScoreRule rule = score_rule(a);
    const Keys keys = {a.kv, a.requests.block_tables + int64_t{work.request} * a.requests.table_stride, work.kv_head};
    const int first = first_key(a, work.position), end = work.position + work.rows;
    const int blocks = (work.lanes() + kLanes - 1) / kLanes;
    for (int start = first / kTile * kTile; start < end; start += kTile) {
        const int first_run = std::max(0, first - start) / kRun;
        const int last_run = (std::min(kTile, end - start) + kRun - 1) / kRun;
        Tile tile;
        find_tile(keys, start, first_run, last_run, &tile);
        if (rule.scaled) widen_tile(&tile, first_run, last_run, a.kv.head_dim, &wide);
        for (int block = 0, lane = 0; block < blocks; ++block) {  // of nearly equal size
            const int count = (work.lanes() - lane) / (blocks - block);
            kAttendLanes[count - 1](a, tile, start, rule, lane, &lanes);
            lane += count;
        }
    }
    finish(a, work, lanes);
}

// ==== Chunks ====

struct Cut {  // of the work into chunks: each is some rows and some heads of one kv head
    int rows, heads;
    int row_chunks, head_chunks;
    int chunks;
};

int total_rows(const ReefAttentionArgs& a) { return a.requests.row_starts[a.requests.num_requests]; }

Cut cut(const ReefAttentionArgs& a, int lanes) {
    const int group = a.heads / a.kv.kv_heads;
    const int rows = std::max(1, lanes / group), heads = std::min(group, lanes);
    const int row_chunks = (total_rows(a) + rows - 1) / rows, head_chunks = (group + heads - 1) / heads;
    return {rows, heads, row_chunks, head_chunks, row_chunks * a.kv.kv_heads * head_chunks};
}

void attend_chunk(const ReefAttentionArgs& a, const Cut& cut, int chunk) {
    const int group = a.heads / a.kv.kv_heads;
    const int first_row = chunk / (a.kv.kv_heads * cut.head_chunks) * cut.rows;
    const int end_row = std::min(total_rows(a), first_row + cut.rows);
    const int kv_head = chunk / cut.head_chunks % a.kv.kv_heads;
    const int first_head = chunk % cut.head_chunks * cut.heads;
    const int heads = std::min(cut.heads, group - first_head);
    const int32_t* starts = a.requests.row_starts;
    const auto* after = std::upper_bound(starts, starts + a.requests.num_requests, first_row);
    int request = static_cast<int>(after - starts) - 1;
    for (int row = first_row; row < end_row; ++request) {
        const int end = std::min(end_row, starts[request + 1]);
        const int position = a.requests.context_lens[request] - (starts[request + 1] - row);
        if (end > row)
            attend(a, {request, row, end - row, kv_head, kv_head * group + first_head, heads, position});
        row = end;
    }
}

// A chunk's number says what it is only together with the cut, and the cut depends on the number
// of threads, which a chunk is not told: so there is one function per cut.
template <int LANES>
void attend_cut(const void* args, int chunk) {
    const auto& a = *static_cast<const ReefAttentionArgs*>(args);
    attend_chunk(a, cut(a, LANES), chunk);
}

template <int LANES>
void attend_all(const void* args, int) {
    const auto& a = *static_cast<const ReefAttentionArgs*>(args);
    const Cut whole = cut(a, LANES);
    for (int chunk = 0; chunk < whole.chunks; ++chunk) attend_chunk(a, whole, chunk);
}

bool is_small(const ReefAttentionArgs& a) {  // below a few microseconds
    int64_t products = 0;
    for (int i = 0; i < a.requests.num_requests; ++i) {
        const int rows = a.requests.row_starts[i + 1] - a.requests.row_starts[i];
        products += int64_t{rows} * (a.requests.context_lens[i] + kTile) * a.heads * a.kv.head_dim;
    }
    return products < 100'000;
}

bool is_fine_enough(const Cut& cut, int threads) {
    const bool even = cut.rows == 1 && cut.chunks % threads == 0;
    return even || cut.chunks >= 4 * threads;
}

// Fewer lanes in a chunk, hence more chunks, until every thread has enough of them.
template <int LANES>
reef::Task cut_finely(const ReefAttentionArgs* args, int threads) {
    const Cut whole = cut(*args, LANES);
    if constexpr (LANES > 1)
        if (!is_fine_enough(whole, threads)) return cut_finely<LANES / 2>(args, threads);
    return {attend_cut<LANES>, args, whole.chunks};
}

}  // namespace

reef::Task attention(const ReefAttentionArgs* args, int threads) {
    if (threads == 1 || is_small(*args)) return {attend_all<kMaxLanes>, args, 1};
    return cut_finely<kMaxLanes>(args, threads);
}

}  // namespace REEF_ISA
