// Computes attention, softmax(q k) v, over paged KV, for decodes and prefill chunks alike.
//
// A chunk is a range of rows with some query heads of one kv head. For each request in the range it
// takes the keys tile by tile for all of its lanes (attention_tile.h), so that a tile is read from
// memory, and decoded where it is int8, once per chunk. The pool starts with the last chunk: later
// rows belong to long prefills and have the longest contexts, so the longest work starts first.
#include "attention_keys.h"
#include "table.h"

namespace REEF_ISA {
namespace {

constexpr int kMaxLanes = 64;  // lanes of a chunk

// ==== Lanes ====

// Holds the queries and the running results of lanes: lane = row * heads + head.
struct Lanes {
    alignas(64) bf16 q[kMaxLanes * kQueryStride];
    alignas(64) float out[kMaxLanes * kOutStride];
    alignas(64) float sums[kMaxLanes * 16];
    float highest[kMaxLanes];
};

// Describes rows of one request, and query heads that share a kv head.
struct Work {
    int request, first_row, rows;
    int kv_head, first_head, heads;
    int position;  // of the first row's token
    int lanes() const { return rows * heads; }
};

void begin(const ReefAttentionArgs& a, const Work& work, Lanes* lanes) {
    const int64_t head_dim = a.kv.head_dim;
    for (int lane = 0; lane < work.lanes(); ++lane) {
        const int row = work.first_row + lane / work.heads;
        const int head = work.first_head + lane % work.heads;
        const uint16_t* q = a.q + row * a.q_stride + head * head_dim;
        std::memcpy(lanes->q + lane * kQueryStride, q, head_dim * sizeof(bf16));
        std::fill_n(lanes->out + lane * kOutStride, padded_dim(a.kv.head_dim), 0.f);
        lanes->highest[lane] = -1e30f;  // finite: the first tile's factor is 0, not NaN
    }
    std::fill_n(lanes->sums, work.lanes() * 16, 0.f);
}

void finish(const ReefAttentionArgs& a, const Work& work, const Lanes& lanes) {
    const int head_dim = a.kv.head_dim;
    for (int lane = 0; lane < work.lanes(); ++lane) {
        const int row = work.first_row + lane / work.heads;
        const int head = work.first_head + lane % work.heads;
        uint16_t* to = a.out + row * a.out_stride + int64_t{head} * head_dim;
        const float* out = lanes.out + lane * kOutStride;
        const F16 inverse = set1(1.f / sum(load(lanes.sums + lane * 16)));
        for (int d = 0; d < head_dim; d += 16)
            store(to + d, load(out + d) * inverse, std::min(16, head_dim - d));
    }
}

// ==== Attending ====

int first_key(const ReefAttentionArgs& a, int position) {
    return a.window > 0 ? std::max(0, position - a.window + 1) : 0;
}

ScoreRule score_rule(const ReefAttentionArgs& a) {
    constexpr float kLog2E = 1.44269504089f;
    const bool scaled = a.kv.format == REEF_KV_INT8;
    if (a.soft_cap == 0.f) return {a.scale * kLog2E, 0.f, scaled};
    return {2.f * kLog2E * a.scale / a.soft_cap, a.soft_cap * kLog2E, scaled};
}

// Adds the tile that begins at position `start` to lanes [lane, lane + M) of the work.
template <int M, bool FETCH>
void attend_lanes(const ReefAttentionArgs& a, const Work& work, const Tile& tile, const Tile& next,
                  int start, int lane, Lanes* lanes) {
    Visible seen[M];
    for (int m = 0; m < M; ++m) {
        const int position = work.position + (lane + m) / work.heads;
        const int from = first_key(a, position) - start, to = position + 1 - start;
        seen[m] = {std::max(0, from), std::min(kTile, to)};
    }
    attend_tile<M, FETCH>(lanes->q + lane * kQueryStride, tile, next, seen, score_rule(a),
                          a.kv.head_dim, lanes->highest + lane, lanes->sums + lane * 16,
                          lanes->out + lane * kOutStride);
}

template <bool FETCH>
constexpr decltype(&attend_lanes<1, FETCH>) kAttendLanes[] = {
    attend_lanes<1, FETCH>, attend_lanes<2, FETCH>, attend_lanes<3, FETCH>, attend_lanes<4, FETCH>,
#if defined(__AVX512BF16__)
    attend_lanes<5, FETCH>, attend_lanes<6, FETCH>, attend_lanes<7, FETCH>, attend_lanes<8, FETCH>,
#endif
};

// Describes the runs first <= run < last of a tile.
struct Span { int first, last; };

// Returns the runs of the tile at position `start` that at least one lane sees.
Span seen_runs(const ReefAttentionArgs& a, const Work& work, int start) {
    const int from = first_key(a, work.position) - start;
    const int to = std::min(kTile, work.position + work.rows - start);
    return {std::max(0, from) / kRun, (to + kRun - 1) / kRun};
}

// Adds a tile to all lanes, and prefetches the next tile meanwhile. An int8 tile, or one that many
// lanes read, is copied first; any other tile is read in place.
void attend_all_lanes(const ReefAttentionArgs& a, const Work& work, Tile tile, const Tile& next,
                      int start, LocalTile* local, Lanes* lanes) {
    const bool scaled = a.kv.format == REEF_KV_INT8;
    const int blocks = (work.lanes() + kLanes - 1) / kLanes;
    if (blocks == 1 && !scaled)
        return kAttendLanes<true>[work.lanes() - 1](a, work, tile, next, start, 0, lanes);
    const auto copy = scaled ? copy_runs<int8_t> : copy_runs<bf16>;
    const Span runs = seen_runs(a, work, start);
    copy(next, runs.first, runs.last, a.kv.head_dim, local, &tile);
    for (int block = 0, lane = 0; block < blocks; ++block) {  // of nearly equal size
        const int count = (work.lanes() - lane) / (blocks - block);
        kAttendLanes<false>[count - 1](a, work, tile, next, start, lane, lanes);
        lane += count;
    }
}

void attend(const ReefAttentionArgs& a, const Work& work) {
    Lanes lanes;
    LocalTile local;
    const int64_t table = int64_t{work.request} * a.requests.table_stride;
    const Keys keys = {a.kv, a.requests.block_tables + table, work.kv_head};
    const auto find = [&](int start, Tile* tile) {
        const Span runs = seen_runs(a, work, start);
        find_runs(keys, start, runs.first, runs.last, tile);
    };
    begin(a, work, &lanes);
    const int end = work.position + work.rows;
    int start = first_key(a, work.position) / kTile * kTile;
    Tile tile = {};
    for (find(start, &tile); start < end; start += kTile) {
        Tile next = tile;
        if (start + kTile < end) find(start + kTile, &next);
        attend_all_lanes(a, work, tile, next, start, &local, &lanes);
        tile = next;
    }
    finish(a, work, lanes);
}

// ==== Chunks ====

// Describes the cut of a call into chunks, each of some rows and some heads of one kv head.
struct Cut {
    int rows, heads;  // of a chunk
    int head_chunks;  // chunks of one kv head and one range of rows
    int chunks;
};

int total_rows(const ReefAttentionArgs& a) {
    return a.requests.row_starts[a.requests.num_requests];
}

Cut cut(const ReefAttentionArgs& a, int lanes) {
    const int group = a.heads / a.kv.kv_heads;
    const int rows = std::max(1, lanes / group), heads = std::min(group, lanes);
    const int row_chunks = (total_rows(a) + rows - 1) / rows;
    const int head_chunks = (group + heads - 1) / heads;
    return {rows, heads, head_chunks, row_chunks * a.kv.kv_heads * head_chunks};
}

void attend_chunk(const ReefAttentionArgs& a, const Cut& cut, int chunk) {
    const int group = a.heads / a.kv.kv_heads;
    const int row_chunk = chunk / (a.kv.kv_heads * cut.head_chunks);
    const int kv_head = chunk / cut.head_chunks % a.kv.kv_heads;
    const int head = chunk % cut.head_chunks * cut.heads;
    const int heads = std::min(cut.heads, group - head);
    const int end_row = std::min(total_rows(a), (row_chunk + 1) * cut.rows);
    const int32_t* starts = a.requests.row_starts;
    int row = row_chunk * cut.rows;
    const int32_t* after = std::upper_bound(starts, starts + a.requests.num_requests, row);
    for (int request = static_cast<int>(after - starts) - 1; row < end_row; ++request) {
        const int rows = std::min(end_row, starts[request + 1]) - row;
        if (rows == 0) continue;
        const int position = a.requests.context_lens[request] - (starts[request + 1] - row);
        attend(a, {request, row, rows, kv_head, kv_head * group + head, heads, position});
        row += rows;
    }
}

// Computes one chunk of the cut into at most LANES lanes. The cut depends on the number of threads,
// which a task does not tell its chunks: therefore it is a template argument.
template <int LANES>
void attend_cut(const void* args, int chunk) {
    const auto& a = *static_cast<const ReefAttentionArgs*>(args);
    attend_chunk(a, cut(a, LANES), chunk);
}

void attend_everything(const void* args, int) {
    const auto& a = *static_cast<const ReefAttentionArgs*>(args);
    const Cut whole = cut(a, kMaxLanes);
    for (int chunk = 0; chunk < whole.chunks; ++chunk) attend_chunk(a, whole, chunk);
}

// Returns whether the whole call takes a few microseconds only, too little to share.
bool is_small(const ReefAttentionArgs& a) {
    int64_t products = 0;
    for (int i = 0; i < a.requests.num_requests; ++i) {
        const int64_t rows = a.requests.row_starts[i + 1] - a.requests.row_starts[i];
        products += rows * (a.requests.context_lens[i] + kTile) * a.heads * a.kv.head_dim;
    }
    return products < 100'000;
}

bool is_fine_enough(const Cut& cut, int threads) {
    const bool even = cut.rows == 1 && cut.chunks % threads == 0;
    return even || cut.chunks >= 4 * threads;
}

// Halves the lanes of a chunk until there are enough chunks for every thread.
template <int LANES>
reef::Task cut_finely(const ReefAttentionArgs* args, int threads) {
    const Cut whole = cut(*args, LANES);
    if constexpr (LANES > 1)
        if (!is_fine_enough(whole, threads)) return cut_finely<LANES / 2>(args, threads);
    return {attend_cut<LANES>, args, whole.chunks};
}

}  // namespace

reef::Task attention(const ReefAttentionArgs* args, int threads) {
    if (threads == 1 || is_small(*args)) return {attend_everything, args, 1};
    return cut_finely<kMaxLanes>(args, threads);
}

}  // namespace REEF_ISA
