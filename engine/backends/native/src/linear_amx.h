// Declares the linear kernels that multiply in AMX tiles. Their results have the bits of those with
// vector instructions: sums of integers are exact, and all else is computed in the same order.
#pragma once
#include "linear.h"

namespace REEF_ISA {

reef::Task amx_int8(const ReefLinearArgs* args);
reef::Task amx_round_wide_rows(const ReefLinearArgs* args);
reef::Task amx_int8_wide(const ReefLinearArgs* args);
reef::Task amx_fourbit(const ReefLinearArgs* args, int threads);
reef::Task amx_short_int8(const ReefLinearArgs* args, int threads);

// Returns the kernels of `table`, with linear layers that use AMX where it is faster.
reef::Kernels with_amx(reef::Kernels table);

}  // namespace REEF_ISA
