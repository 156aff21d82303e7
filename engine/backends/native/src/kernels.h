// What every kernel reads and writes, and the table of kernels that one instruction set has.
//
// Plain C structs, mirrored field by field in structs.py and listed in layout.cpp. Activations
// are bfloat16 (as uint16_t), row-major, with a stride in elements between rows. Every kernel
// treats its rows alone: a row's result is the same bits whatever rows are computed beside it, in
// whatever order, on whatever number of threads, and whether it is one of a decode or of a prefill.
#pragma once
#include <cstdint>

#include "task.h"

extern "C" {

// ==== Linear: y [rows, out] = x [rows, in] W^T + bias ====

enum ReefFormat : int32_t {
    REEF_BF16 = 0,
    REEF_INT8 = 1,      // weights int8 with one scale per output; activations int8 per row
    REEF_NF4 = 2,       // 4-bit normal floats, one scale per group; activations bf16
    REEF_NF4_INT8 = 3,  // the same weights; activations int8 per row
    REEF_INT4 = 4,      // 4-bit integers, scale and zero point per group; activations bf16
};

struct ReefLinear {
    int32_t format;
    int32_t in_features, out_features;
    int32_t group_size;  // inputs that share a scale; 4-bit formats
    const void* packed;  // see linear_*.cpp; 64-byte aligned
    const void* scales;
    const void* zeros;  // REEF_INT4
    const float* bias;  // [out_features] or null
    const int32_t*
        input_order;  // [in_features] or null: packed column k multiplies x[input_order[k]]
};

struct ReefLinearArgs {
    const ReefLinear* linear;
    const uint16_t* x;
    int64_t x_stride;
    void* y;  // bf16, or float where y_is_float
    int64_t y_stride;
    int32_t rows;
    int32_t y_is_float;
    void* scratch;  // linear_scratch_bytes(linear, rows); 64-byte aligned
};

// ==== LoRA: y[row] += B_s (A_s x[row]) for the adapter s of each row ====

struct ReefLoraSlice {   // one module of a fused site; scaling is folded into b
    int32_t r0, r1;      // its rows of a
    int32_t out0, out1;  // its columns of y
    const uint16_t* b;   // [panel of 32 columns][pair of ranks][32][2], padded with zeros
};

struct ReefLoraSite {   // one adapter at one linear layer
    const uint16_t* a;  // [lora_rank, in]; null: the adapter leaves this layer alone
    const ReefLoraSlice* slices;
    int32_t lora_rank;  // rows of a, all slices together
    int32_t num_slices;
};

struct ReefLoraSegment {        // the rows of a batch that share an adapter
    const ReefLoraSite* sites;  // indexed by site number
    int32_t start, end;         // in ReefLoraBatch::rows
};

struct ReefLoraBatch {
    const ReefLoraSegment* segments;
    const int32_t* rows;  // rows of x, grouped by adapter; rows of the base model are absent
    int32_t num_segments;
    int32_t max_lora_rank;  // largest lora_rank at any site of any segment
};

struct ReefLoraArgs {
    const ReefLoraBatch* batch;
    int32_t site;
    int32_t in_features;
    const uint16_t* x;
    int64_t x_stride;
    uint16_t* y;
    int64_t y_stride;
    uint16_t* h;  // [rows listed in batch, h_stride]: A x in bf16; h_stride even
    int64_t h_stride;
    int32_t threads;  // of the pool; whoever runs the kernels sets it
};

// ==== Attention over paged KV ====

// A block of one layer: K then V, each REEF_KV_BF16 or REEF_KV_INT8. The layout inside is that of
// kv_layout.h and nobody else's business; a block is moved and copied as bytes.
enum ReefKvFormat : int32_t { REEF_KV_BF16 = 0, REEF_KV_INT8 = 1 };

struct ReefKvLayer {
    uint8_t* base;        // block 0 of this layer
    int64_t block_bytes;  // from one block of this layer to the next
    int32_t format;
    int32_t block_size;  // positions in a block, a multiple of 16
    int32_t kv_heads, head_dim;
};

struct ReefRequests {  // B requests, their rows one after another; the last query of request i is
    int32_t num_requests;  // at position context_lens[i] - 1
    int32_t table_stride;
    const int32_t* row_starts;    // [B + 1]
    const int32_t* context_lens;  // [B], this step's tokens included
    const int32_t* block_tables;  // [B, table_stride]
};

struct ReefStoreArgs {  // turns q and k of each row in place, then writes k and v to their slots
    ReefKvLayer kv;
    uint16_t* qkv;  // [rows, (heads + 2 kv_heads) head_dim]
    int64_t qkv_stride;
    const float* cos;  // [positions, rotary_dim]
    const float* sin;
    const int32_t* positions;     // [rows]
    const int32_t* slot_mapping;  // [rows]: block * block_size + offset
    int32_t rows, heads, rotary_dim;
};

struct ReefAttentionArgs {  // out [rows, heads, head_dim]
    ReefKvLayer kv;
    ReefRequests requests;
    const uint16_t* q;
    int64_t q_stride;
    uint16_t* out;
    int64_t out_stride;
    int32_t heads;
    int32_t window;  // keys a query may see, itself included; 0: all
    float scale;
    float soft_cap;  // 0: none
};

// ==== Elementwise ====

enum ReefActivation : int32_t { REEF_SILU = 0, REEF_GELU = 1, REEF_GELU_TANH = 2 };

struct ReefEmbedArgs {      // x[row] = table[token_ids[row]] * scale
    const uint16_t* table;  // [vocab, width]
    const int32_t* token_ids;
    uint16_t* x;
    int64_t x_stride;
    float scale;
    int32_t rows, width;
};

struct ReefNormArgs {  // x += delta * delta_scale where there is a delta; y = x / rms(x) * weight
    uint16_t* x;       // rounded to bf16 after the addition, and the norm reads it rounded
    int64_t x_stride;
    const uint16_t* delta;  // null: none
    int64_t delta_stride;
    uint16_t* y;  // null: only the addition
    int64_t y_stride;
    const float* weight;  // [width]
    float delta_scale, eps;
    int32_t rows, width;
    int32_t groups;  // each row is this many neighbouring vectors of `width`, one norm each
};

struct ReefGateArgs {  // y [rows, width] = activation(x[:, :width]) * x[:, width:]
    const uint16_t* x;
    int64_t x_stride;
    uint16_t* y;
    int64_t y_stride;
    int32_t rows, width, activation;
};

struct ReefGatherArgs {  // y[i] = x[rows_of_x[i]]
    const uint16_t* x;
    int64_t x_stride;
    const int32_t* rows_of_x;
    uint16_t* y;
    int64_t y_stride;
    int32_t rows, width;
};

struct ReefGreedyArgs {   // of each row of logits: the first of the largest, and that largest
    const float* logits;  // NaN if any is NaN
    int64_t logits_stride;
    int32_t* token_ids;
    float* highest;
    int32_t rows, vocab;
};

struct ReefDraw {  // how one token is drawn; see draw.cpp
    int32_t row;   // of logits; neither NaN nor plus infinity there, and one finite logit
    int32_t best;  // one of the row's largest
    uint64_t seed, position;  // what the noise is a function of, with the token id
    float temperature;
    int32_t top_k;  // 0: all
    float top_p;    // 1: all
    float min_p;    // 0: all
};

struct ReefDrawArgs {  // token_ids[i] is drawn as draws[i] says
    const float* logits;
    int64_t logits_stride;
    const ReefDraw* draws;
    int32_t* token_ids;
    float* scratch;          // [num_draws, scratch_stride]
    int64_t scratch_stride;  // at least 2 k + 256 for the largest top_k < vocab; 0 where is none
    int32_t num_draws, vocab;
};

}  // extern "C"

namespace reef {

// One instruction set's kernels. `prepare` tasks, where there are any, must have run before the
// others; shrink reads only x and may run beside the linear of the same x.
struct Kernels {
    Task (*linear_prepare)(const ReefLinearArgs*, int threads);  // may have no chunks
    Task (*linear)(const ReefLinearArgs*, int threads);
    Task (*lora_shrink)(const ReefLoraArgs*, int threads);
    Task (*lora_expand)(const ReefLoraArgs*, int threads);
    Task (*store)(const ReefStoreArgs*, int threads);
    Task (*attention)(const ReefAttentionArgs*, int threads);
    Task (*embed)(const ReefEmbedArgs*, int threads);
    Task (*norm)(const ReefNormArgs*, int threads);
    Task (*gate)(const ReefGateArgs*, int threads);
    Task (*gather)(const ReefGatherArgs*, int threads);
    Task (*greedy)(const ReefGreedyArgs*, int threads);
    Task (*draw)(const ReefDrawArgs*, int threads);
};

}  // namespace reef
