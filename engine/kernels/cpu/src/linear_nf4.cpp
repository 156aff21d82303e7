#include "linear.h"
#include "table.h"

namespace REEF_ISA {
reef::Task linear_nf4(const ReefLinearArgs* args, int) { return {nullptr, args, 0}; }
reef::Task linear_nf4_int8(const ReefLinearArgs* args, int) { return {nullptr, args, 0}; }
}
