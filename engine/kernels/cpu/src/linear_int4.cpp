#include "linear.h"
#include "table.h"

namespace REEF_ISA {
reef::Task linear_int4(const ReefLinearArgs* args, int) { return {nullptr, args, 0}; }
}
