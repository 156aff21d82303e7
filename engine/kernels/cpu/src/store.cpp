#include "linear.h"
#include "table.h"

namespace REEF_ISA {
reef::Task store(const ReefStoreArgs* args, int) { return {nullptr, args, 0}; }
}
