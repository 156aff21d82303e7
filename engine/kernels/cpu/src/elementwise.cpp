#include "linear.h"
#include "table.h"

namespace REEF_ISA {
reef::Task embed(const ReefEmbedArgs* args, int) { return {nullptr, args, 0}; }
reef::Task norm(const ReefNormArgs* args, int) { return {nullptr, args, 0}; }
reef::Task gate(const ReefGateArgs* args, int) { return {nullptr, args, 0}; }
reef::Task gather(const ReefGatherArgs* args, int) { return {nullptr, args, 0}; }
}
