#include "linear.h"
#include "table.h"

namespace REEF_ISA {
reef::Task linear_bf16(const ReefLinearArgs* args, int) { return {nullptr, args, 0}; }
}
