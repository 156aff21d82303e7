// Collects the kernels of one instruction set.
#include "table.h"

namespace REEF_ISA {

extern const reef::Kernels table;
const reef::Kernels table = {
    linear_prepare, linear,    lora_shrink,     lora_expand, plain_shrink, plain_expand, store,
    attention_plan, attention, attention_merge, embed,       norm,         gate,         gather,
    greedy,         draw,
};

}  // namespace REEF_ISA
