#include "linear.h"
#include "table.h"

namespace REEF_ISA {
reef::Task greedy(const ReefGreedyArgs* args, int) { return {nullptr, args, 0}; }
}
