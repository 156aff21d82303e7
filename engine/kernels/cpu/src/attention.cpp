#include "linear.h"
#include "table.h"

namespace REEF_ISA {
reef::Task attention(const ReefAttentionArgs* args, int) { return {nullptr, args, 0}; }
}
