// Declares the kernels of the instruction set that the including file is compiled for; `table` in
// table.cpp collects them.
#pragma once
#include "kernels.h"

namespace REEF_ISA {

reef::Task linear_prepare(const ReefLinearArgs* args, int threads);
reef::Task linear(const ReefLinearArgs* args, int threads);
reef::Task lora_shrink(const ReefLoraArgs* args, int threads);
reef::Task lora_expand(const ReefLoraArgs* args, int threads);
reef::Task plain_shrink(const ReefPlainArgs* args, int threads);
reef::Task plain_expand(const ReefPlainArgs* args, int threads);
reef::Task store(const ReefStoreArgs* args, int threads);
int64_t attention_plan(reef::AttentionCall* args, int threads);
reef::Task attention(const reef::AttentionCall* args, int threads);
reef::Task attention_merge(const reef::AttentionCall* args, int threads);
reef::Task embed(const ReefEmbedArgs* args, int threads);
reef::Task norm(const ReefNormArgs* args, int threads);
reef::Task gate(const ReefGateArgs* args, int threads);
reef::Task gather(const ReefGatherArgs* args, int threads);
reef::Task greedy(const ReefGreedyArgs* args, int threads);
reef::Task draw(const ReefDrawArgs* args, int threads);

}  // namespace REEF_ISA
