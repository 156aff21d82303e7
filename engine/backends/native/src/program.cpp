// A program: the operations of one forward pass, recorded once, run with one call per step.
//
// Everything that does not change between steps (weights, buffers, strides) is in the recorded
// operations; a step brings its rows, its requests and its adapters. No Python runs in between.
#include <chrono>

#include "context.h"

extern "C" {

enum ReefOpKind : int32_t {
    REEF_OP_EMBED, REEF_OP_NORM, REEF_OP_LINEAR, REEF_OP_STORE, REEF_OP_ATTENTION, REEF_OP_GATE,
    REEF_OP_GATHER,
};

struct ReefOp {
    int32_t kind;
    int32_t lora_site;   // of a linear layer; -1: adapters never touch it
    int32_t on_outputs;  // runs on the step's output rows alone, else on all
    ReefLoraArgs lora;   // of a linear layer with a site
    union {
        ReefEmbedArgs embed;
        ReefNormArgs norm;
        ReefLinearArgs linear;
        ReefStoreArgs store;
        ReefAttentionArgs attention;
        ReefGateArgs gate;
        ReefGatherArgs gather;
    };
};

struct ReefStep {
    int32_t rows;
    int32_t num_outputs;             // rows that the last operations go on with
    const int32_t* token_ids;        // [rows]
    const int32_t* positions;        // [rows]
    const int32_t* slot_mapping;     // [rows]
    const int32_t* output_rows;      // [num_outputs]
    ReefRequests requests;
    const ReefLoraBatch* lora;         // null: no adapter in the batch
    const ReefLoraBatch* output_lora;  // the same for the output rows, numbered from 0
    uint16_t* lora_h;                  // [rows, lora_h_stride]: what the adapters' first halves give
    int64_t lora_h_stride;
    int64_t* nanoseconds;              // null, or [num_ops] to which each operation's time is added
};

}  // extern "C"

namespace {

class Run {
public:
    Run(ReefContext& context, const ReefStep& step) : context_(context), step_(step) {}

    void operator()(ReefOp op) {
        const int32_t rows = op.on_outputs ? step_.num_outputs : step_.rows;
        if (rows == 0) return;  // a chunk of a prompt whose end is yet to come
        switch (op.kind) {
            case REEF_OP_EMBED:
                op.embed.rows = rows;
                op.embed.token_ids = step_.token_ids;
                return context_.run(context_.kernels.embed, &op.embed);
            case REEF_OP_NORM:
                op.norm.rows = rows;
                return context_.run(context_.kernels.norm, &op.norm);
            case REEF_OP_LINEAR:
                op.linear.rows = rows;
                return linear(op);
            case REEF_OP_STORE:
                op.store.rows = rows;
                op.store.positions = step_.positions;
                op.store.slot_mapping = step_.slot_mapping;
                return context_.run(context_.kernels.store, &op.store);
            case REEF_OP_ATTENTION:
                op.attention.requests = step_.requests;
                return context_.run(context_.kernels.attention, &op.attention);
            case REEF_OP_GATE:
                op.gate.rows = rows;
                return context_.run(context_.kernels.gate, &op.gate);
            case REEF_OP_GATHER:
                op.gather.rows = rows;
                op.gather.rows_of_x = step_.output_rows;
                return context_.run(context_.kernels.gather, &op.gather);
        }
    }

private:
    // The adapters' shrink reads what the base layer reads and comes first; expand adds to what
    // the layer has written.
    void linear(ReefOp& op) {
        const reef::Kernels& kernels = context_.kernels;
        const int threads = context_.pool.threads();
        context_.run(kernels.linear_prepare, &op.linear);
        const ReefLoraBatch* batch = op.on_outputs ? step_.output_lora : step_.lora;
        if (batch == nullptr || op.lora_site < 0) return context_.run(kernels.linear, &op.linear);
        op.lora.batch = batch;
        op.lora.site = op.lora_site;
        op.lora.h = step_.lora_h;
        op.lora.h_stride = step_.lora_h_stride;
        op.lora.threads = threads;
        reef::Task expand = kernels.lora_expand(&op.lora, threads);
        expand.waits = true;
        const reef::Task tasks[] = {
            expand, kernels.linear(&op.linear, threads), kernels.lora_shrink(&op.lora, threads)};
        context_.pool.run(tasks, 3);
    }

    ReefContext& context_;
    const ReefStep& step_;
};

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

extern "C" void reef_run(
    ReefContext* context, const ReefOp* ops, int32_t num_ops, const ReefStep* step) {
    Run run(*context, *step);
    if (step->nanoseconds == nullptr) {
        for (int32_t i = 0; i < num_ops; ++i) run(ops[i]);
        return;
    }
    for (int32_t i = 0; i < num_ops; ++i) {
        const int64_t start = now_ns();
        run(ops[i]);
        step->nanoseconds[i] += now_ns() - start;
    }
}
