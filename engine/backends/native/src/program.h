// Declares a program: the operations of a forward pass, recorded once, run by one call per step.
//
// Everything that does not change between steps (weights, buffers, strides) is in the recorded
// operations; a step brings its rows, its requests and its adapters. No Python runs in between.
#pragma once
#include <cstdint>

#include "kernels.h"

extern "C" {

enum ReefOpKind : int32_t {
    REEF_OP_EMBED,
    REEF_OP_NORM,
    REEF_OP_LINEAR,
    REEF_OP_STORE,
    REEF_OP_ATTENTION,
    REEF_OP_GATE,
    REEF_OP_GATHER,
};

union ReefOpArgs {
    ReefEmbedArgs embed;
    ReefNormArgs norm;
    ReefLinearArgs linear;
    ReefStoreArgs store;
    ReefAttentionArgs attention;
    ReefGateArgs gate;
    ReefGatherArgs gather;
};

struct ReefOp {
    int32_t kind;
    int32_t lora_site;   // of a linear layer; -1: no adapter changes it
    int32_t on_outputs;  // 1: runs on the step's output rows only; 0: on all rows
    ReefLoraArgs lora;   // of a linear layer with a site
    ReefOpArgs args;
};

struct ReefStep {
    int32_t rows;
    int32_t num_outputs;          // rows whose logits are computed
    const int32_t* token_ids;     // [rows]
    const int32_t* positions;     // [rows]
    const int32_t* slot_mapping;  // [rows]
    const int32_t* output_rows;   // [num_outputs]
    ReefRequests requests;
    const ReefLoraBatch* lora;         // null: no adapter in the batch
    const ReefLoraBatch* output_lora;  // the same for the output rows, numbered from 0
    uint16_t* lora_h;                  // [rows, lora_h_stride]: results of the adapters' shrink
    int64_t lora_h_stride;
    const ReefNormWeights* norms;         // [rows] of each row's adapter; null: no row's has any
    const ReefNormWeights* output_norms;  // [num_outputs], the same for the output rows
    ReefPlainLora plain;
    int64_t* nanoseconds;  // null, or [num_ops] to which each operation's time is added
};

}  // extern "C"
