#include "linear.h"
#include "table.h"

namespace REEF_ISA {
reef::Task quantize_rows(const ReefLinearArgs* args, int) { return {nullptr, args, 0}; }
reef::Task linear_int8(const ReefLinearArgs* args, int) { return {nullptr, args, 0}; }
}
