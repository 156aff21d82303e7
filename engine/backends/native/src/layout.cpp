// Describes the structs and enums of the C ABI as text.
//
// Python mirrors them by hand (structs.py) and compares them with this text when it loads the
// library (layout.py). The line of a struct has its size and the type and offset of its fields:
// "ReefLoraSegment 16 sites:pointer64@0 start:int32@8 ...". The line of an enum has its values:
// "enum KvFormat BF16=0 INT8=1".
#include <cstddef>
#include <string>
#include <type_traits>

#include "pack.h"
#include "program.h"

namespace {

template <class T>
constexpr const char* kind_of() {
    if (std::is_pointer_v<T>) return "pointer";
    if (std::is_class_v<T> || std::is_union_v<T>) return "struct";
    return std::is_floating_point_v<T> ? "float" : std::is_signed_v<T> ? "int" : "uint";
}

// Adds to `text`: " name:kind+bits@offset".
void add_field(std::string* text, const char* name, const char* kind, size_t bytes, size_t offset) {
    *text += std::string(" ") + name + ":" + kind + std::to_string(8 * bytes) + "@";
    *text += std::to_string(offset);
}

#define FIELD(T, name) \
    add_field(&text, #name, kind_of<decltype(T::name)>(), sizeof(T::name), offsetof(T, name));

// FIELDS(T, a, b) expands to FIELD(T, a) FIELD(T, b), for up to 15 fields.
#define FIELDS_1(T, name) FIELD(T, name)
#define FIELDS_2(T, name, ...) FIELD(T, name) FIELDS_1(T, __VA_ARGS__)
#define FIELDS_3(T, name, ...) FIELD(T, name) FIELDS_2(T, __VA_ARGS__)
#define FIELDS_4(T, name, ...) FIELD(T, name) FIELDS_3(T, __VA_ARGS__)
#define FIELDS_5(T, name, ...) FIELD(T, name) FIELDS_4(T, __VA_ARGS__)
#define FIELDS_6(T, name, ...) FIELD(T, name) FIELDS_5(T, __VA_ARGS__)
#define FIELDS_7(T, name, ...) FIELD(T, name) FIELDS_6(T, __VA_ARGS__)
#define FIELDS_8(T, name, ...) FIELD(T, name) FIELDS_7(T, __VA_ARGS__)
#define FIELDS_9(T, name, ...) FIELD(T, name) FIELDS_8(T, __VA_ARGS__)
#define FIELDS_10(T, name, ...) FIELD(T, name) FIELDS_9(T, __VA_ARGS__)
#define FIELDS_11(T, name, ...) FIELD(T, name) FIELDS_10(T, __VA_ARGS__)
#define FIELDS_12(T, name, ...) FIELD(T, name) FIELDS_11(T, __VA_ARGS__)
#define FIELDS_13(T, name, ...) FIELD(T, name) FIELDS_12(T, __VA_ARGS__)
#define FIELDS_14(T, name, ...) FIELD(T, name) FIELDS_13(T, __VA_ARGS__)
#define FIELDS_15(T, name, ...) FIELD(T, name) FIELDS_14(T, __VA_ARGS__)
#define SIXTEENTH(_1, _2, _3, _4, _5, _6, _7, _8, _9, _10, _11, _12, _13, _14, _15, macro, ...) \
    macro
#define FIELDS(T, ...)                                                                        \
    SIXTEENTH(__VA_ARGS__, FIELDS_15, FIELDS_14, FIELDS_13, FIELDS_12, FIELDS_11, FIELDS_10,  \
              FIELDS_9, FIELDS_8, FIELDS_7, FIELDS_6, FIELDS_5, FIELDS_4, FIELDS_3, FIELDS_2, \
              FIELDS_1, )                                                                     \
    (T, __VA_ARGS__)

#define LINE(T, name, ...)                        \
    text += name " " + std::to_string(sizeof(T)); \
    FIELDS(T, __VA_ARGS__)                        \
    text += "\n"

// Adds the line of a struct. Does not compile unless it names every field: a structured binding
// needs as many names as the struct has fields.
#define STRUCT(Name, ...)                                                                 \
    static_cast<void>(                                                                    \
        [](const Reef##Name& all) { [[maybe_unused]] const auto& [__VA_ARGS__] = all; }); \
    LINE(Reef##Name, "Reef" #Name, __VA_ARGS__)
#define UNION(Name, ...) LINE(Reef##Name, "Reef" #Name, __VA_ARGS__)

void add_value(std::string* text, const char* name, int value) {
    *text += std::string(" ") + name + "=" + std::to_string(value);
}

std::string describe_enums() {
    std::string text = "enum Format";
    add_value(&text, "BF16", REEF_BF16);
    add_value(&text, "INT8", REEF_INT8);
    add_value(&text, "NF4", REEF_NF4);
    add_value(&text, "NF4_INT8", REEF_NF4_INT8);
    add_value(&text, "INT4", REEF_INT4);
    add_value(&text, "INT8_WIDE", REEF_INT8_WIDE);
    add_value(&text, "INT4_INT8", REEF_INT4_INT8);
    add_value(&text, "SHORT_INT8", REEF_SHORT_INT8);
    text += "\nenum KvFormat";
    add_value(&text, "BF16", REEF_KV_BF16);
    add_value(&text, "INT8", REEF_KV_INT8);
    text += "\nenum Activation";
    add_value(&text, "SILU", REEF_SILU);
    add_value(&text, "GELU", REEF_GELU);
    add_value(&text, "GELU_TANH", REEF_GELU_TANH);
    text += "\nenum OpKind";
    add_value(&text, "EMBED", REEF_OP_EMBED);
    add_value(&text, "NORM", REEF_OP_NORM);
    add_value(&text, "LINEAR", REEF_OP_LINEAR);
    add_value(&text, "STORE", REEF_OP_STORE);
    add_value(&text, "ATTENTION", REEF_OP_ATTENTION);
    add_value(&text, "GATE", REEF_OP_GATE);
    add_value(&text, "GATHER", REEF_OP_GATHER);
    return text + "\n";
}

std::string describe_structs() {
    std::string text;
    STRUCT(Linear, format, in_features, out_features, group_size, packed, scales, zeros,
           multipliers, bias, input_order);
    STRUCT(LinearArgs, linear, x, x_stride, y, y_stride, rows, y_is_float, scratch);
    STRUCT(LoraSlice, r0, r1, out0, out1, b, scale, shift);
    STRUCT(LoraSite, a, slices, lora_rank, num_slices);
    STRUCT(LoraSegment, sites, start, end);
    STRUCT(LoraBatch, segments, rows, num_segments, max_lora_rank);
    STRUCT(LoraArgs, batch, site, in_features, x, x_stride, y, y_stride, h, h_stride, threads,
           y_is_float);
    STRUCT(PlainSlice, b, r0, r1, out0, out1);
    STRUCT(PlainSite, a, scale, shift, slices, num_slices, lora_rank, out_features);
    STRUCT(PlainArgs, site, x, x_stride, y, y_stride, h, rows, in_features);
    STRUCT(PlainLora, sites, h, first);
    STRUCT(KvLayer, base, block_bytes, format, block_size, kv_heads, head_dim);
    STRUCT(Requests, num_requests, table_stride, row_starts, context_lens, block_tables);
    STRUCT(StoreArgs, kv, qkv, qkv_stride, cos, sin, positions, slot_mapping, rows, heads,
           rotary_dim);
    STRUCT(AttentionArgs, kv, requests, q, q_stride, out, out_stride, heads, window, scale,
           soft_cap);
    STRUCT(EmbedArgs, table, token_ids, x, x_stride, scale, rows, width);
    STRUCT(NormArgs, x, x_stride, delta, delta_stride, y, y_stride, weight, delta_scale, eps, rows,
           width, groups, norm, replaced);
    STRUCT(GateArgs, x, x_stride, y, y_stride, rows, width, activation);
    STRUCT(GatherArgs, x, x_stride, rows_of_x, y, y_stride, rows, width);
    STRUCT(GreedyArgs, logits, logits_stride, token_ids, highest, rows, vocab);
    STRUCT(Draw, row, best, seed, position, temperature, top_k, top_p, min_p);
    STRUCT(DrawArgs, logits, logits_stride, draws, token_ids, scratch, scratch_stride, num_draws,
           vocab);
    STRUCT(PackArgs, format, in_features, out_features, group_size, weight, weight_stride, packed);
    UNION(OpArgs, embed, norm, linear, store, attention, gate, gather);
    STRUCT(Op, kind, lora_site, on_outputs, lora, args);
    STRUCT(Step, rows, num_outputs, token_ids, positions, slot_mapping, output_rows, requests, lora,
           output_lora, lora_h, lora_h_stride, norms, output_norms, plain, nanoseconds);
    return text;
}

}  // namespace

// Returns a text that lives as long as the library.
extern "C" const char* reef_struct_layouts() {
    static const std::string text = describe_enums() + describe_structs();
    return text.c_str();
}
