#include "linear.h"
#include "table.h"

namespace REEF_ISA {
reef::Task lora_shrink(const ReefLoraArgs* args, int) { return {nullptr, args, 0}; }
reef::Task lora_expand(const ReefLoraArgs* args, int) { return {nullptr, args, 0}; }
}
