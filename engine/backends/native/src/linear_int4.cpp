// Computes linear layers of 4-bit integers with a scale and a zero point per group (GPTQ, AWQ).
//
//   sum (code - zero) x  =  sum (code - 8) x  +  (8 - zero) sum x
//
// code - 8 is exact in bf16. The packed zero points are 8 - zero. A group's sum starts with that
// times the sum of the group's x, which the prepare task computes once for all outputs. Where the
// weight's columns are reordered, the prepare task also brings x into their order.
#include "fourbit_bf16.h"
#include "table.h"

namespace REEF_ISA {
namespace {

using fourbit::Panel;
using reef::Int4Layout;

struct Int4 : fourbit::Bf16Format {
    struct Rows {
        const uint8_t* x;
        int64_t stride;
        const float* sums;  // [row][group]
        int groups;
    };
    static Rows rows(const ReefLinearArgs& args) {
        const ReefLinear& linear = *args.linear;
        const Int4Layout layout(linear, args.rows);
        const auto* scratch = static_cast<const uint8_t*>(args.scratch);
        const auto* sums = reinterpret_cast<const float*>(scratch + layout.sums);
        const int groups = linear.in_features / linear.group_size;
        if (linear.input_order != nullptr)
            return {scratch + layout.x, int64_t{linear.in_features} * 2, sums, groups};
        return {reinterpret_cast<const uint8_t*>(args.x), args.x_stride * 2, sums, groups};
    }
    static Values values() {  // -8 ... 7
        alignas(32) static constexpr bf16 kValues[16] = {
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
            0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        };
        return values_at(kValues);
    }
    static F16 start(const Panel& panel, const Rows& rows, int row, int group, int half) {
        return panel.zero_point(group, half) * set1(rows.sums[int64_t{row} * rows.groups + group]);
    }
    static F16 result(const Rows&, int, F16 total) { return total; }
};

// ==== Prepare: the rows in the order of the columns, and the sums of their groups ====

float sum_of(const bf16* x, int count) {  // count is a multiple of 32
    F16 even = zero(), odd = zero();
    for (int k = 0; k < count; k += 32) {
        even = even + load(x + k);
        odd = odd + load(x + k + 16);
    }
    return sum(even + odd);
}

void prepare_row(const ReefLinearArgs& args, int row) {
    const ReefLinear& linear = *args.linear;
    const Int4Layout layout(linear, args.rows);
    auto* scratch = static_cast<uint8_t*>(args.scratch);
    const bf16* x = args.x + row * args.x_stride;
    if (linear.input_order != nullptr) {
        bf16* ordered =
            reinterpret_cast<bf16*>(scratch + layout.x) + int64_t{row} * linear.in_features;
        for (int k = 0; k < linear.in_features; ++k) ordered[k] = x[linear.input_order[k]];
        x = ordered;
    }
    const int groups = linear.in_features / linear.group_size;
    float* sums = reinterpret_cast<float*>(scratch + layout.sums) + int64_t{row} * groups;
    for (int group = 0; group < groups; ++group)
        sums[group] = sum_of(x + int64_t{group} * linear.group_size, linear.group_size);
}

// Returns the rows of one chunk: a few microseconds of work.
int rows_per_chunk(const ReefLinearArgs& args) {
    return 1 + (args.linear->input_order != nullptr ? 8192 : 32768) / args.linear->in_features;
}

void prepare_chunk(const void* p, int chunk) {
    const auto& args = *static_cast<const ReefLinearArgs*>(p);
    const int count = rows_per_chunk(args);
    for (int row = chunk * count; row < args.rows && row < (chunk + 1) * count; ++row)
        prepare_row(args, row);
}

}  // namespace

reef::Task prepare_int4(const ReefLinearArgs* args) {
    return {prepare_chunk, args, fourbit::ceil_div(args->rows, rows_per_chunk(*args))};
}

reef::Task linear_int4(const ReefLinearArgs* args, int threads) {
    return fourbit::task<Int4>(args, threads);
}

}  // namespace REEF_ISA
