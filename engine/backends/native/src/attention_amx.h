// Declares attention in AMX tiles.
#pragma once
#include "kernels.h"

namespace REEF_ISA {

// Returns whether the call has a shape for tiles.
bool amx_attends(const ReefAttentionArgs& args);

reef::Task amx_attention(const reef::AttentionCall* args, int threads);

}  // namespace REEF_ISA
