// Declares the arguments of every kernel, and the table of kernels of one instruction set.
//
// Plain C structs, mirrored field by field in structs.py and listed in layout.cpp. Activations
// are bfloat16 (as uint16_t), row-major, with a stride in elements between rows. Every kernel
// computes each row independently: the bits of its result depend neither on the other rows of the
// call, nor on their order, nor on the number of threads, nor on whether it belongs to a decode or
// to a prefill.
#pragma once
#include <cstdint>

#include "task.h"

extern "C" {

// ==== Linear: y [rows, out] = x [rows, in] W^T + bias ====

enum ReefFormat : int32_t {
    REEF_BF16 = 0,
    REEF_INT8 = 1,        // weights int8 with one scale per output; activations int8 per row
    REEF_NF4 = 2,         // 4-bit normal floats, one scale per group; activations bf16
    REEF_NF4_INT8 = 3,    // the same weights; activations int8 per row and group
    REEF_INT4 = 4,        // 4-bit integers, scale and zero point per group; activations bf16
    REEF_INT8_WIDE = 5,   // REEF_INT8, and activations int16 per row
    REEF_INT4_INT8 = 6,   // as REEF_INT4, also without zero points; activations as REEF_NF4_INT8
    REEF_SHORT_INT8 = 7,  // REEF_INT8 whose weights are 4-bit codes times small whole multipliers
};

struct ReefLinear {
    int32_t format;
    int32_t in_features, out_features;
    int32_t group_size;  // inputs that share a scale; 4-bit formats
    const void* packed;  // see linear_*.cpp; 64-byte aligned
    const void* scales;
    const void* zeros;          // REEF_INT4, REEF_INT4_INT8 or null: codes count from 8
    const int8_t* multipliers;  // REEF_SHORT_INT8
    const float* bias;          // [out_features] or null
    // [in_features] or null: packed column k multiplies x[input_order[k]]
    const int32_t* input_order;
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

// ==== LoRA: y = scale y + shift + B (A x) in each row, with those of its adapter ====

// Describes one module of a fused site, such as q of qkv. Its scaling is folded into b.
struct ReefLoraSlice {
    int32_t r0, r1;      // its rows of a; equal: it has no factors, and b is not read
    int32_t out0, out1;  // its columns of y
    const uint16_t* b;   // [panel of 32 columns][pair of ranks][32][2], padded with zeros
    const float* scale;  // [out1 - out0]; null: ones
    const float* shift;  // [out1 - out0]; null: zeros
};

// Describes one adapter at one linear layer.
struct ReefLoraSite {
    const uint16_t* a;  // [lora_rank, in]
    const ReefLoraSlice* slices;
    int32_t lora_rank;   // rows of a, all slices together
    int32_t num_slices;  // 0: the adapter does not change this layer
};

// Describes the rows of a batch that share an adapter.
struct ReefLoraSegment {
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
    void* y;  // bf16, or float where y_is_float
    int64_t y_stride;
    uint16_t* h;  // [rows listed in batch, h_stride]: A x in bf16; h_stride even
    int64_t h_stride;
    int32_t threads;  // of the pool; set by the functions that run the kernels
    int32_t y_is_float;
};

// ==== Plain LoRA: the same of one adapter, from factors as its files have them ====

// Describes a run of outputs that has factors; slices do not overlap.
struct ReefPlainSlice {
    const uint16_t* b;  // [r1 - r0, out1 - out0]
    int32_t r0, r1;     // its rows of a
    int32_t out0, out1;
};

struct ReefPlainSite {
    const uint16_t* a;   // [lora_rank, in]
    const float* scale;  // [out_features]; null: ones
    const float* shift;  // [out_features]; null: zeros
    const ReefPlainSlice* slices;
    int32_t num_slices;
    int32_t lora_rank;
    int32_t out_features;  // 0: the adapter does not change this layer
};

struct ReefPlainArgs {
    const ReefPlainSite* site;
    const uint16_t* x;  // [rows, in_features]
    int64_t x_stride;
    uint16_t* y;
    int64_t y_stride;
    float* h;  // [rows, lora_rank]: A x
    int32_t rows, in_features;
};

// Describes an adapter to a step.
struct ReefPlainLora {
    const ReefPlainSite* sites;  // by number; null: there is no such adapter
    float* h;                    // [rows, the largest lora_rank]
    int32_t first;               // it acts on the rows from this one on
};

// ==== Attention over paged KV ====

// Names the element types of K and V. kv_layout.h defines the layout inside a block; the rest of
// the code moves and copies blocks as bytes.
enum ReefKvFormat : int32_t { REEF_KV_BF16 = 0, REEF_KV_INT8 = 1 };

struct ReefKvLayer {
    uint8_t* base;        // block 0 of this layer
    int64_t block_bytes;  // from one block of this layer to the next
    int32_t format;
    int32_t block_size;  // positions in a block, a multiple of 16
    int32_t kv_heads, head_dim;
};

// Lists B requests, whose rows follow one another. The last query of request i is at position
// context_lens[i] - 1.
struct ReefRequests {
    int32_t num_requests;  // B
    int32_t table_stride;
    const int32_t* row_starts;    // [B + 1]
    const int32_t* context_lens;  // [B], this step's tokens included
    const int32_t* block_tables;  // [B, table_stride]
};

// Rotates q and k of each row in place, then writes k and v to their slots.
struct ReefStoreArgs {
    ReefKvLayer kv;
    uint16_t* qkv;  // [rows, (heads + 2 kv_heads) head_dim]
    int64_t qkv_stride;
    const float* cos;  // [positions, rotary_dim]
    const float* sin;
    const int32_t* positions;     // [rows]
    const int32_t* slot_mapping;  // [rows]: block * block_size + offset
    int32_t rows, heads, rotary_dim;
};

// Computes out [rows, heads, head_dim].
struct ReefAttentionArgs {
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

// Computes x[row] = table[token_ids[row]] * scale.
struct ReefEmbedArgs {
    const uint16_t* table;  // [vocab, width]
    const int32_t* token_ids;
    uint16_t* x;
    int64_t x_stride;
    float scale;
    int32_t rows, width;
};

// Lists the weights with which an adapter replaces those of norms, by the norm's number; null:
// that norm is the base's.
typedef const float* const* ReefNormWeights;

// Computes x += delta * delta_scale where there is a delta, then y = x / rms(x) * weight.
struct ReefNormArgs {
    uint16_t* x;  // rounded to bf16 after the addition; the norm reads the rounded x
    int64_t x_stride;
    const uint16_t* delta;  // null: none
    int64_t delta_stride;
    uint16_t* y;  // null: only the addition
    int64_t y_stride;
    const float* weight;  // [width], of rows whose adapter has none
    float delta_scale, eps;
    int32_t rows, width;
    int32_t groups;  // each row is this many neighbouring vectors of `width`, one norm each
    int32_t norm;    // its number
    const ReefNormWeights* replaced;  // [rows] of each row's adapter or null; null: no row's
};

// Computes y [rows, width] = activation(x[:, :width]) * x[:, width:].
struct ReefGateArgs {
    const uint16_t* x;
    int64_t x_stride;
    uint16_t* y;
    int64_t y_stride;
    int32_t rows, width, activation;
};

// Copies y[i] = x[rows_of_x[i]].
struct ReefGatherArgs {
    const uint16_t* x;
    int64_t x_stride;
    const int32_t* rows_of_x;
    uint16_t* y;
    int64_t y_stride;
    int32_t rows, width;
};

// Finds the first of the largest logits of each row, and that largest logit.
struct ReefGreedyArgs {
    const float* logits;
    int64_t logits_stride;
    int32_t* token_ids;
    float* highest;  // NaN where a logit of the row is NaN
    int32_t rows, vocab;
};

// Describes how one token is drawn (draw.cpp).
struct ReefDraw {
    int32_t row;              // of logits: none is NaN or plus infinity, at least one is finite
    int32_t best;             // token id of one of the row's largest logits
    uint64_t seed, position;  // the noise is a function of these and the token id
    float temperature;
    int32_t top_k;  // 0: all
    float top_p;    // 1: all
    float min_p;    // 0: all
};

// Draws token_ids[i] as draws[i] describes.
struct ReefDrawArgs {
    const float* logits;
    int64_t logits_stride;
    const ReefDraw* draws;
    int32_t* token_ids;
    float* scratch;          // [num_draws, scratch_stride]
    int64_t scratch_stride;  // at least 2 k + 256, k the largest top_k < vocab; 0 without top_k
    int32_t num_draws, vocab;
};

}  // extern "C"

namespace reef {

// Adds to a call of attention how its work is cut; attention_plan decides.
struct AttentionCall : ReefAttentionArgs {
    int lanes = 0;             // heads of queries in a chunk; 0: all chunks are one
    int spans = 1;             // of keys that are computed apart
    float* records = nullptr;  // of these spans; null: none is computed apart
};

// Lists the kernels of one instruction set. linear_prepare must have ended before linear begins;
// lora_shrink reads only x and may run concurrently with the linear of the same x.
struct Kernels {
    Task (*linear_prepare)(const ReefLinearArgs*, int threads);  // may have no chunks
    Task (*linear)(const ReefLinearArgs*, int threads);
    Task (*lora_shrink)(const ReefLoraArgs*, int threads);
    Task (*lora_expand)(const ReefLoraArgs*, int threads);
    Task (*plain_shrink)(const ReefPlainArgs*, int threads);
    Task (*plain_expand)(const ReefPlainArgs*, int threads);  // after plain_shrink
    Task (*store)(const ReefStoreArgs*, int threads);
    // Sets lanes and spans, and returns how many floats `records` needs; 0: it stays null, and
    // attention_merge is not called.
    int64_t (*attention_plan)(AttentionCall*, int threads);
    Task (*attention)(const AttentionCall*, int threads);
    Task (*attention_merge)(const AttentionCall*, int threads);
    Task (*embed)(const ReefEmbedArgs*, int threads);
    Task (*norm)(const ReefNormArgs*, int threads);
    Task (*gate)(const ReefGateArgs*, int threads);
    Task (*gather)(const ReefGatherArgs*, int threads);
    Task (*greedy)(const ReefGreedyArgs*, int threads);
    Task (*draw)(const ReefDrawArgs*, int threads);
};

}  // namespace reef
