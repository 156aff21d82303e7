// Cuts attention into chunks, for any kind of product.
//
// A chunk is a range of rows with some query heads of one kv head, and all spans of keys or one of
// them. For each request in the range it takes the keys tile by tile for all of its lanes, so that
// a tile is read from memory once per chunk. The pool starts with the last chunk: later rows belong
// to long prefills and have the longest contexts, so the longest work starts first.
//
// A Kind computes: Kind(args, work) takes the queries, and add(tile, next, runs, start, lanes) adds
// the tile at position `start`, of which some lane sees `runs`, to the lanes that see it.
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
    finish_record(total, a.kv.head_dim,
                  a.out + row * a.out_stride + int64_t{head} * a.kv.head_dim);
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
        const int width = padded_dim(a_.kv.head_dim);
        alignas(64) float totals[kMaxLanes * kRecord], record[kRecord];
        for (int lane = 0; lane < work_.lanes(); ++lane) clear_record(totals + lane * kRecord);
        for (int span = first_key() / kSpan; span * kSpan < end_; ++span) {
            add_span(span);
            for (int lane = 0; lane < work_.lanes(); ++lane) {
                write_record(lanes_, lane, width, record);
                merge_record(record, width, totals + lane * kRecord);
            }
        }
        for (int lane = 0; lane < work_.lanes(); ++lane)
            finish(a_, work_, lane, totals + lane * kRecord);
    }

    void compute_one(int span) {
        const int width = padded_dim(a_.kv.head_dim);
        const bool seen = first_key() < (span + 1) * kSpan && span * kSpan < end_;
        if (seen) add_span(span);
        for (int lane = 0; lane < work_.lanes(); ++lane) {
            float* record = record_of(a_, work_, lane, span);
            if (seen) write_record(lanes_, lane, width, record);
            else clear_record(record);
        }
    }

private:
    int first_key() const { return work_.first_key(0); }

    void find(int start, Tile* tile) const {
        find_runs(keys_, start, Runs(work_.visible_to_any(start)), tile);
    }

    void add_span(int span) {
        lanes_.clear(work_.lanes(), padded_dim(a_.kv.head_dim));
        const int end = std::min(end_, (span + 1) * kSpan);
        int start = std::max(first_key() / kTile * kTile, span * kSpan);
        Tile tile = {};
        for (find(start, &tile); start < end; start += kTile) {
            Tile next = tile;
            if (start + kTile < end_) find(start + kTile, &next);
            kind_.add(tile, next, Runs(work_.visible_to_any(start)), start, &lanes_);
            tile = next;
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
        Attention<Kind> attention(a, {request, row, rows, kv_head, kv_head * group + head, heads,
                                      position, a.window});
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
