// Cuts attention into chunks, for any kind of product.
//
// A chunk is a range of rows with some query heads of one kv head, and all spans of keys or one of
// them. For each request in the range it takes the keys tile by tile for all of its lanes, so that
// a tile is read from memory once per chunk. The pool starts with the last chunk: later rows belong
// to long prefills and have the longest contexts, so the longest work starts first.
//
// A Kind computes: Kind(args, work) takes the queries; begin(tile, start) starts with the tile at
// position `start`; add(tile, start, next, lanes) adds it to the lanes that see it, and may start
// with the next tile, if there is one.
#pragma once
#include "attention_keys.h"
#include "task.h"

namespace REEF_ISA {

// ==== A chunk's rows of one request ====

// Locates the record of a span, where the spans are computed apart.
inline float* record_of(const reef::AttentionCall& a, const Work& work, int lane, int span) {
    const int64_t row = work.first_row + lane / work.heads;
    const int64_t head = work.first_head + lane % work.heads;
    const int64_t stride = kRecordHead + padded_dim(a.kv.head_dim);
    return a.records + ((row * a.heads + head) * a.spans + span) * stride;
}

inline void finish(const reef::AttentionCall& a, const Work& work, int lane, const float* total) {
    const int row = work.first_row + lane / work.heads;
    const int head = work.first_head + lane % work.heads;
    finish_record(total, a.kv.head_dim, a.out + row * a.out_stride + int64_t{head} * a.kv.head_dim);
}

template <class Kind>
class Attention {
public:
    Attention(const reef::AttentionCall& a, const Work& work)
        : a_(a),
          work_(work),
          keys_{a.kv, a.requests.block_tables + int64_t{work.request} * a.requests.table_stride,
                work.kv_head},
          end_(work.position + work.rows),
          kind_(a, work_) {}

    void compute_all() {
        alignas(64) float totals[kMaxLanes * kRecord], record[kRecord];
        for (int lane = 0; lane < work_.lanes(); ++lane) clear_record(totals + lane * kRecord);
        add_tiles(first_key() / kTile * kTile, end_, [&] {
            for (int lane = 0; lane < work_.lanes(); ++lane) {
                write_record(lanes_, lane, width(), record);
                merge_record(record, width(), totals + lane * kRecord);
            }
        });
        for (int lane = 0; lane < work_.lanes(); ++lane)
            finish(a_, work_, lane, totals + lane * kRecord);
    }

    void compute_one(int span) {
        for (int lane = 0; lane < work_.lanes(); ++lane)
            clear_record(record_of(a_, work_, lane, span));
        const int start = std::max(first_key() / kTile * kTile, span * kSpan);
        add_tiles(start, std::min(end_, (span + 1) * kSpan), [&] {
            for (int lane = 0; lane < work_.lanes(); ++lane)
                write_record(lanes_, lane, width(), record_of(a_, work_, lane, span));
        });
    }

private:
    int first_key() const { return work_.first_key(0); }
    int width() const { return padded_dim(a_.kv.head_dim); }

    // Finds the tile at position `start`, or leaves it as it is where that is no tile.
    bool find(int start, int end, Tile* tile) const {
        if (start >= end) return false;
        find_runs(keys_, start, Runs(work_.visible_to_any(start)), tile);
        return true;
    }

    // Adds the tiles of positions [start, end), and calls close() after each span.
    template <class Close>
    void add_tiles(int start, int end, Close close) {
        Tile tile = {}, next = {}, later = {};
        if (!find(start, end, &tile)) return;
        find(start + kTile, end, &next);
        kind_.begin(tile, start);
        lanes_.clear(work_.lanes(), width());
        for (; start < end; start += kTile) {
            const int next_start = start + kTile, later_start = next_start + kTile;
            if (find(later_start, end, &later))
                fetch_starts(later, Runs(work_.visible_to_any(later_start)));
            kind_.add(tile, start, next_start < end ? &next : nullptr, &lanes_);
            if (next_start >= end || next_start % kSpan == 0) {
                close();
                lanes_.clear(work_.lanes(), width());
            }
            tile = next;
            next = later;
        }
    }

    const reef::AttentionCall& a_;
    const Work work_;
    const Keys keys_;
    const int end_;  // of the keys that the last row sees
    Kind kind_;
    Lanes lanes_;
};

// ==== Chunks ====

// Describes the cut of a call into chunks.
struct Cut {
    int rows, heads;  // of a chunk
    int head_chunks;  // chunks of one kv head and one range of rows
    int spans;        // 1 where a chunk takes all of them
    int chunks;
};

inline int total_rows(const reef::AttentionCall& a) {
    return a.requests.row_starts[a.requests.num_requests];
}

inline Cut cut(const reef::AttentionCall& a, int lanes, int spans) {
    const int group = a.heads / a.kv.kv_heads;
    const int rows = std::max(1, lanes / group), heads = std::min(group, lanes);
    const int row_chunks = (total_rows(a) + rows - 1) / rows;
    const int head_chunks = (group + heads - 1) / heads;
    return {rows, heads, head_chunks, spans, row_chunks * a.kv.kv_heads * head_chunks * spans};
}

template <class Kind>
void attend_chunk(const reef::AttentionCall& a, const Cut& cut, int chunk) {
    const int group = a.heads / a.kv.kv_heads;
    const int span = chunk % cut.spans;
    chunk /= cut.spans;
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
        Attention<Kind> attention(
            a, {request, row, rows, kv_head, kv_head * group + head, heads, position, a.window});
        if (a.records) attention.compute_one(span);
        else attention.compute_all();
        row += rows;
    }
}

template <class Kind>
void attend_planned(const void* args, int chunk) {
    const auto& a = *static_cast<const reef::AttentionCall*>(args);
    attend_chunk<Kind>(a, cut(a, a.lanes, a.spans), chunk);
}

template <class Kind>
void attend_everything(const void* args, int) {
    const auto& a = *static_cast<const reef::AttentionCall*>(args);
    const Cut whole = cut(a, kMaxLanes, 1);
    for (int chunk = 0; chunk < whole.chunks; ++chunk) attend_chunk<Kind>(a, whole, chunk);
}

// Returns the task of a call that attention_plan has planned.
template <class Kind>
reef::Task attention_task(const reef::AttentionCall* args) {
    if (args->lanes == 0) return {attend_everything<Kind>, args, 1};
    return {attend_planned<Kind>, args, cut(*args, args->lanes, args->spans).chunks};
}

}  // namespace REEF_ISA
