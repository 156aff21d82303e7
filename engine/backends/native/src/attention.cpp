// Computes attention, softmax(q k) v, over paged KV, for decodes and prefill chunks alike: the
// plan, and products with vector instructions.
#include "attention_bf16.h"
#include "attention_chunks.h"
#include "attention_int8.h"
#include "table.h"

namespace REEF_ISA {
namespace {

constexpr int64_t kMaxRecords = 1 << 20;  // floats: 4 MiB

// Returns whether the whole call takes a few microseconds only, too little to share.
bool is_small(const reef::AttentionCall& a) {
    int64_t products = 0;
    for (int i = 0; i < a.requests.num_requests; ++i) {
        const int64_t rows = a.requests.row_starts[i + 1] - a.requests.row_starts[i];
        products += rows * (a.requests.context_lens[i] + kTile) * a.heads * a.kv.head_dim;
    }
    return products < 100'000;
}

int longest_context(const reef::AttentionCall& a) {
    const int32_t* lengths = a.requests.context_lens;
    return *std::max_element(lengths, lengths + a.requests.num_requests);
}

int64_t record_floats(const reef::AttentionCall& a, int spans) {
    return int64_t{total_rows(a)} * a.heads * spans * (kRecordHead + padded_dim(a.kv.head_dim));
}

bool is_fine_enough(const Cut& cut, int threads) {
    const bool even = cut.rows == 1 && cut.chunks % threads == 0;
    return even || cut.chunks >= 4 * threads;
}

void merge_row(const void* args, int row) {
    const auto& a = *static_cast<const reef::AttentionCall*>(args);
    const int width = padded_dim(a.kv.head_dim), head_dim = a.kv.head_dim;
    alignas(64) float total[kRecord];
    for (int head = 0; head < a.heads; ++head) {
        const int64_t first = (int64_t{row} * a.heads + head) * a.spans;
        clear_record(total);
        for (int span = 0; span < a.spans; ++span)
            merge_record(a.records + (first + span) * (kRecordHead + width), width, total);
        finish_record(total, head_dim, a.out + row * a.out_stride + int64_t{head} * head_dim);
    }
}

}  // namespace

// Halves the lanes of a chunk until there are enough chunks for every thread. Chunks that would
// read the same keys are cut by spans of keys instead, where there are several.
int64_t attention_plan(reef::AttentionCall* args, int threads) {
    if (threads == 1 || is_small(*args)) return 0;
    const int group = args->heads / args->kv.kv_heads;
    const int spans = (longest_context(*args) + kSpan - 1) / kSpan;
    const bool may_split = spans > 1 && record_floats(*args, spans) <= kMaxRecords;
    const bool is_decode = total_rows(*args) == args->requests.num_requests;
    for (int lanes = kMaxLanes;; lanes /= 2) {
        args->lanes = lanes;
        if (lanes == 1 || is_fine_enough(cut(*args, lanes, 1), threads)) return 0;
        const bool reads_again = !is_decode || lanes / 2 < group;
        if (may_split && reads_again) break;
    }
    args->spans = spans;
    return record_floats(*args, spans);
}

reef::Task attention(const reef::AttentionCall* args, int) {
    return args->kv.format == REEF_KV_INT8
               ? attention_task<PipelinedAttention<Int8Attention<VectorProducts>>>(args)
               : attention_task<Bf16Attention>(args);
}

reef::Task attention_merge(const reef::AttentionCall* args, int) {
    return {merge_row, args, total_rows(*args)};
}

}  // namespace REEF_ISA
