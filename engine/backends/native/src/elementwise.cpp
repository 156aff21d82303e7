// Computes the operations that read each activation once or twice: embed, norm, gate, gather.
//
// All compute in float32 and round to bf16 once. Sums run over the columns in one fixed order:
// sixteen lanes of four accumulators, column c in accumulator (c / 16) % 4, lane c % 16.
#include <algorithm>

#include "table.h"
#include "vectors.h"

namespace REEF_ISA {
namespace {

constexpr int kMostChunks = 64;  // enough to balance the threads; taking each costs time

// Cuts rows into runs of about `least` elements, or longer ones where there would be too many.
struct RowRuns {
    int rows, length;

    RowRuns(int rows, int64_t row_elements, int64_t least) : rows(rows) {
        const int64_t wanted = std::max(least, rows * row_elements / kMostChunks);
        length = static_cast<int>(
            std::clamp<int64_t>(wanted / std::max<int64_t>(row_elements, 1), 1, std::max(rows, 1)));
    }
    int count() const { return (rows + length - 1) / length; }
    int begin(int run) const { return run * length; }
    int end(int run) const { return std::min(rows, (run + 1) * length); }
};

inline F16 round_to_bf16(F16 a) {
    bf16 rounded[kLanes];
    store(rounded, a);
    return load(rounded);
}

// ==== embed ====

RowRuns embed_runs(const ReefEmbedArgs& a) { return {a.rows, a.width, 1 << 14}; }

void embed_run(const void* args, int run) {
    const auto& a = *static_cast<const ReefEmbedArgs*>(args);
    const RowRuns runs = embed_runs(a);
    const F16 scale = set1(a.scale);
    for (int row = runs.begin(run); row < runs.end(run); ++row) {
        const bf16* from = a.table + static_cast<int64_t>(a.token_ids[row]) * a.width;
        bf16* to = a.x + row * a.x_stride;
        for_vectors(0, a.width,
                    [&](int c, int n) { store_upto(to + c, load_upto(from + c, n) * scale, n); });
    }
}

// ==== norm ====

RowRuns norm_runs(const ReefNormArgs& a) {
    return {a.rows, static_cast<int64_t>(a.width) * a.groups, 1 << 14};
}

void add_delta(bf16* x, const bf16* delta, F16 scale, int width) {
    for_vectors(0, width, [&](int c, int n) {
        store_upto(x + c, fma(load_upto(delta + c, n), scale, load_upto(x + c, n)), n);
    });
}

float sum_of_squares(const bf16* x, int width) {
    F16 sums[4] = {zero(), zero(), zero(), zero()};
    int c = 0;
    for (; c + 4 * kLanes <= width; c += 4 * kLanes) {
        for (int i = 0; i < 4; ++i) {
            const F16 v = load(x + c + i * kLanes);
            sums[i] = fma(v, v, sums[i]);
        }
    }
    for (int i = 0; c < width; ++i, c += kLanes) {
        const F16 v = load_upto(x + c, std::min(kLanes, width - c));
        sums[i] = fma(v, v, sums[i]);
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

const float* weight_of_row(const ReefNormArgs& a, int row) {
    const ReefNormWeights weights = a.replaced ? a.replaced[row] : nullptr;
    return weights && weights[a.norm] ? weights[a.norm] : a.weight;
}

void norm_vector(const bf16* x, const float* weight, bf16* y, const ReefNormArgs& a) {
    const float mean = sum_of_squares(x, a.width) / static_cast<float>(a.width);
    const F16 inverse = set1(1.f / std::sqrt(mean + a.eps));
    for_vectors(0, a.width, [&](int c, int n) {
        const F16 scaled = load_upto(x + c, n) * inverse;
        store_upto(y + c, scaled * load_upto(weight + c, n), n);
    });
}

void norm_run(const void* args, int run) {
    const auto& a = *static_cast<const ReefNormArgs*>(args);
    const RowRuns runs = norm_runs(a);
    const int row_width = a.width * a.groups;
    for (int row = runs.begin(run); row < runs.end(run); ++row) {
        bf16* x = a.x + row * a.x_stride;
        if (a.delta) add_delta(x, a.delta + row * a.delta_stride, set1(a.delta_scale), row_width);
        if (!a.y) continue;
        bf16* y = a.y + row * a.y_stride;
        const float* weight = weight_of_row(a, row);
        for (int c = 0; c < row_width; c += a.width) norm_vector(x + c, weight, y + c, a);
    }
}

// ==== gate ====

inline F16 times_logistic(F16 x, F16 of) { return x / (set1(1.f) + exp(zero() - of)); }

struct Silu {
    F16 operator()(F16 x) const { return times_logistic(x, x); }
};

// Computes x / 2 (1 + erf(x / sqrt 2)) as max(x, 0) - |x| / 2 erfc(|x| / sqrt 2), which avoids
// cancellation. erfc after Abramowitz and Stegun 7.1.26, to 1.5e-7; it is 0 from 20 on.
struct Gelu {
    F16 operator()(F16 x) const {
        const F16 size = min(set1(20.f), abs(x));
        const F16 t = set1(1.f) / fma(set1(0.3275911f * 0.70710678f), size, set1(1.f));
        F16 p = set1(1.061405429f);
        p = fma(p, t, set1(-1.453152027f));
        p = fma(p, t, set1(1.421413741f));
        p = fma(p, t, set1(-0.284496736f));
        p = fma(p, t, set1(0.254829592f));
        const F16 half = size * set1(0.5f);
        return max(zero(), x) - half * (p * t * exp(zero() - half * size));
    }
};

// Computes x / 2 (1 + tanh u) as x / (1 + e^-2u).
struct GeluTanh {
    F16 operator()(F16 x) const {
        const F16 twice_u = x * fma(x * x, set1(0.0713548163f), set1(1.5957691216f));
        return times_logistic(x, twice_u);
    }
};

// Cuts the work into pieces of one or several whole rows; very wide rows are cut at whole vectors.
struct GatePieces {
    static constexpr int kWhole = 6144, kPiece = 4096;  // columns: about 2 microseconds
    RowRuns runs;
    int columns, per_run;

    explicit GatePieces(const ReefGateArgs& a)
        : runs(a.rows, a.width, kPiece),
          columns(a.width <= kWhole || runs.length > 1 ? a.width : kPiece),
          per_run(a.width ? (a.width + columns - 1) / columns : 0) {}
};

template <class Activation>
void gate_piece(const void* args, int piece) {
    const auto& a = *static_cast<const ReefGateArgs*>(args);
    const GatePieces pieces(a);
    const int run = piece / pieces.per_run, begin = piece % pieces.per_run * pieces.columns;
    const int end = std::min(a.width, begin + pieces.columns);
    const Activation activation;
    for (int row = pieces.runs.begin(run); row < pieces.runs.end(run); ++row) {
        const bf16 *gate = a.x + row * a.x_stride, *up = gate + a.width;
        bf16* y = a.y + row * a.y_stride;
        for_vectors(begin, end, [&](int c, int n) {
            store_upto(y + c, activation(load_upto(gate + c, n)) * load_upto(up + c, n), n);
        });
    }
}

// ==== gather ====

RowRuns gather_runs(const ReefGatherArgs& a) { return {a.rows, a.width, 1 << 15}; }

void gather_run(const void* args, int run) {
    const auto& a = *static_cast<const ReefGatherArgs*>(args);
    const RowRuns runs = gather_runs(a);
    for (int row = runs.begin(run); row < runs.end(run); ++row) {
        std::memcpy(a.y + row * a.y_stride, a.x + a.rows_of_x[row] * a.x_stride,
                    static_cast<size_t>(a.width) * sizeof(bf16));
    }
}

}  // namespace

reef::Task embed(const ReefEmbedArgs* args, int) {
    return {embed_run, args, embed_runs(*args).count()};
}

reef::Task norm(const ReefNormArgs* args, int) {
    return {norm_run, args, norm_runs(*args).count()};
}

reef::Task gate(const ReefGateArgs* args, int) {
    const GatePieces pieces(*args);
    const int chunks = pieces.runs.count() * pieces.per_run;
    if (args->activation == REEF_SILU) return {gate_piece<Silu>, args, chunks};
    if (args->activation == REEF_GELU) return {gate_piece<Gelu>, args, chunks};
    return {gate_piece<GeluTanh>, args, chunks};
}

reef::Task gather(const ReefGatherArgs* args, int) {
    return {gather_run, args, gather_runs(*args).count()};
}

}  // namespace REEF_ISA
