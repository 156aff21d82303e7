// Runs the operations of a program (program.h) on a step, one after another.
#include "program.h"

#include <chrono>

#include "context.h"

namespace {

class Run {
public:
    Run(ReefContext& context, const ReefStep& step) : context_(context), step_(step) {}

    void operator()(ReefOp op) {
        const int32_t rows = op.on_outputs ? step_.num_outputs : step_.rows;
        if (rows == 0) return;  // a chunk that does not reach the end of its prompt has no outputs
        switch (op.kind) {
            case REEF_OP_EMBED:
                op.args.embed.rows = rows;
                op.args.embed.token_ids = step_.token_ids;
                return context_.run(context_.kernels.embed, &op.args.embed);
            case REEF_OP_NORM:
                op.args.norm.rows = rows;
                op.args.norm.replaced = op.on_outputs ? step_.output_norms : step_.norms;
                return context_.run(context_.kernels.norm, &op.args.norm);
            case REEF_OP_LINEAR: op.args.linear.rows = rows; return linear(op);
            case REEF_OP_STORE:
                op.args.store.rows = rows;
                op.args.store.positions = step_.positions;
                op.args.store.slot_mapping = step_.slot_mapping;
                return context_.run(context_.kernels.store, &op.args.store);
            case REEF_OP_ATTENTION:
                op.args.attention.requests = step_.requests;
                return context_.attend(op.args.attention);
            case REEF_OP_GATE:
                op.args.gate.rows = rows;
                return context_.run(context_.kernels.gate, &op.args.gate);
            case REEF_OP_GATHER:
                op.args.gather.rows = rows;
                op.args.gather.rows_of_x = step_.output_rows;
                return context_.run(context_.kernels.gather, &op.args.gather);
        }
    }

private:
    // Runs the base layer and the adapters' shrink concurrently, since both only read x. Expand
    // adds to what the layer has written, and therefore waits for both.
    void linear(ReefOp& op) {
        const reef::Kernels& kernels = context_.kernels;
        const int threads = context_.pool.threads();
        context_.run(kernels.linear_prepare, &op.args.linear);
        const ReefLoraBatch* batch = op.on_outputs ? step_.output_lora : step_.lora;
        if (batch == nullptr || op.lora_site < 0) {
            context_.run(kernels.linear, &op.args.linear);
            return plain(op);
        }
        op.lora.batch = batch;
        op.lora.site = op.lora_site;
        op.lora.h = step_.lora_h;
        op.lora.h_stride = step_.lora_h_stride;
        op.lora.threads = threads;
        reef::Task expand = kernels.lora_expand(&op.lora, threads);
        expand.waits = true;
        const reef::Task tasks[] = {expand, kernels.linear(&op.args.linear, threads),
                                    kernels.lora_shrink(&op.lora, threads)};
        context_.pool.run(tasks, 3);
    }

    // Adds the adapter of a reference, after the layer.
    void plain(const ReefOp& op) {
        const ReefPlainLora& lora = step_.plain;
        const int32_t rows = op.args.linear.rows - lora.first;
        if (lora.sites == nullptr || op.lora_site < 0 || rows <= 0) return;
        const ReefPlainSite* site = lora.sites + op.lora_site;
        if (site->out_features == 0) return;
        const ReefPlainArgs args = {
            site,
            op.lora.x + lora.first * op.lora.x_stride,
            op.lora.x_stride,
            static_cast<uint16_t*>(op.lora.y) + lora.first * op.lora.y_stride,
            op.lora.y_stride,
            lora.h,
            rows,
            op.lora.in_features};
        context_.run(context_.kernels.plain_shrink, &args);
        context_.run(context_.kernels.plain_expand, &args);
    }

    ReefContext& context_;
    const ReefStep& step_;
};

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

}  // namespace

extern "C" void reef_run(ReefContext* context, const ReefOp* ops, int32_t num_ops,
                         const ReefStep* step) {
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
