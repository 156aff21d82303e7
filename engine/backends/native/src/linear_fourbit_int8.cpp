// Computes linear layers of 4-bit codes with int8 activations, with vector instructions.
#include "fourbit_int8.h"
#include "table.h"

namespace REEF_ISA {

reef::Task linear_nf4_int8(const ReefLinearArgs* args, int threads) {
    return fourbit::task<fourbit::Nf4Int8>(args, threads);
}

reef::Task linear_int4_int8(const ReefLinearArgs* args, int threads) {
    if (args->linear->zeros == nullptr) return fourbit::task<fourbit::Int4Int8>(args, threads);
    return fourbit::task<fourbit::Int4ZerosInt8>(args, threads);
}

}  // namespace REEF_ISA
