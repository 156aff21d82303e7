// Draws one token of each row by temperature, top-k, top-p, min-p and the Gumbel-max trick.
//
// With x the row's logits and t the largest of them, y = (x - t) / temperature. The token drawn is
// the argmax of y + noise (Yellott 1977; the first of equals) among those that the filters leave:
//     top-k   x >= the k-th largest x
//     top-p   e^y summed over what has a larger x  <  top_p * the sum over what top-k leaves
//     min-p   y >= log(min_p)
// The noise is a counter-based hash of (seed, position, token id) and depends on nothing else.
//
// For most tokens little of that is computed. Noise has a largest value and a cheap upper bound, so
// nearly every token is known to lose before its logarithms are computed. The nucleus of top-p is
// never determined: it is enough to know whether the winner lies inside, and one sum tells that. If
// it lies outside, so do all tokens that are no likelier, and the next winner is searched for among
// the likelier ones: 1 + ln(1 / top_p) rounds on average.
//
// These shortcuts never change a result, and sums run in one order: lane i holds x[16 j + i], and
// blocks of kBlock are added in double. The result is the same on every instruction set.
#include <algorithm>
#include <functional>
#include <limits>

#include "simd.h"
#include "table.h"

namespace REEF_ISA {
namespace {

constexpr int kLanes = 16;
constexpr int kBlock = 4096;         // logits summed in float before the sum is added in double
constexpr int kLeastWork = 1 << 14;  // logits that are worth a chunk of their own
constexpr int kTopKSlack = 256;      // see ReefDrawArgs::scratch_stride
constexpr float kMaxNoise = 16.7f;   // above -log(-log(1 - 2^-24))
constexpr float kNoMass = -60.f;     // e^-60 times 2^31 is below a float's rounding error of 1
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Row {
    const float* logits;
    int vocab;
    float highest, inverse_temperature;

    // Returns y, never NaN for a logit below plus infinity, however small the temperature is.
    F16 scaled(F16 x) const { return (x - set1(highest)) * set1(inverse_temperature); }
};

Row row_of(const ReefDrawArgs& a, const ReefDraw& draw) {
    const float* logits = a.logits + draw.row * a.logits_stride;
    const float inverse = std::min(1.f / draw.temperature, std::numeric_limits<float>::max());
    return {logits, a.vocab, logits[draw.best], inverse};
}

inline float next_above(float x) { return std::nextafter(x, kInfinity); }

// Calls body(index, x) for every sixteen logits of [begin, end). Beyond the end x is NaN, which no
// comparison selects.
template <class Body>
inline void for_vectors(const float* logits, int begin, int end, Body body) {
    int i = begin;
    for (; i + kLanes <= end; i += kLanes) body(i, load(logits + i));
    if (i == end) return;
    float last[kLanes];
    std::fill(std::copy(logits + i, logits + end, last), last + kLanes, kNan);
    body(i, load(last));
}

// ==== noise ====

constexpr int kNoiseBits = 23;  // (n + 0.5) / 2^23 is exact in float32 and never 0 or 1

// Mixes 64 bits by SplitMix64's finalizer (Steele et al. 2014).
uint64_t mix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// Mixes 32 bits by MurmurHash3's finalizer (Appleby).
inline I16 mix32(I16 x) {
    x = (x ^ shift_right<16>(x)) * set1(static_cast<int32_t>(0x85EBCA6Bu));
    x = (x ^ shift_right<13>(x)) * set1(static_cast<int32_t>(0xC2B2AE35u));
    return x ^ shift_right<16>(x);
}

// Computes standard Gumbel noise -log(-log(u)), where u = 1 - (n + 0.5) / 2^23 for a hash n of the
// token id.
class Noise {
public:
    Noise(uint64_t seed, uint64_t position) {
        const uint64_t key = mix64(seed ^ mix64(position + 1));
        low_ = set1(static_cast<int32_t>(key));
        high_ = set1(static_cast<int32_t>(key >> 32));
    }

    I16 hash(I16 token_ids) const {
        const I16 words = mix32(mix32(token_ids ^ low_) + high_);
        return shift_right<32 - kNoiseBits>(words ^ set1(int32_t{-1}));
    }

    // Bounds the noise without a logarithm: -log(-log(u)) <= -log(1 - u), and between two powers of
    // two a logarithm is above its chord, which a float's bits, read as an integer, follow. The
    // 0.001 covers rounding errors.
    static F16 upper_bound(I16 hash) {
        const F16 bits = to_float(bits_of(to_float(hash) + set1(0.5f)));
        const float ln2 = 0.69314718f;
        return fma(bits, set1(-ln2 / (1 << 23)), set1((127 + kNoiseBits) * ln2 + 0.001f));
    }

    static float exact(int32_t hash) {
        const double u = 1.0 - (hash + 0.5) / (1 << kNoiseBits);
        return static_cast<float>(-std::log(-std::log(u)));
    }

    float of(int32_t token_id) const {
        int32_t hashes[kLanes];
        store(hashes, hash(set1(token_id)));
        return exact(hashes[0]);
    }

private:
    I16 low_, high_;
};

// ==== the winner ====

struct Winner {
    float noisy;
    int32_t token_id;
};

I16 first_token_ids() {
    int32_t ids[kLanes];
    for (int i = 0; i < kLanes; ++i) ids[i] = i;
    return load(ids);
}

// Returns the best of `winner` and of those of sixteen tokens that are chosen.
Winner challenge(Winner winner, uint32_t chosen, int32_t first, F16 scaled, I16 hash) {
    float y[kLanes];
    int32_t hashes[kLanes];
    store(y, scaled);
    store(hashes, hash);
    for (; chosen; chosen &= chosen - 1) {
        const int i = __builtin_ctz(chosen);
        const float noisy = y[i] + Noise::exact(hashes[i]);
        const bool is_earlier = first + i < winner.token_id;
        if (noisy > winner.noisy || (noisy == winner.noisy && is_earlier)) {
            winner = {noisy, first + i};
        }
    }
    return winner;
}

// Returns the argmax of y + noise among x >= lowest, y >= least. The row's largest logit, that of
// token `best`, is always one of them, and is the first winner that the others must exceed.
int32_t find_winner(const Row& row, const Noise& noise, int32_t best, float lowest, float least) {
    Winner winner = {noise.of(best), best};
    F16 bar = set1(winner.noisy), least_y = set1(std::max(least, winner.noisy - kMaxNoise));
    const F16 lowest_x = set1(lowest);
    const I16 lanes = first_token_ids();
    for_vectors(row.logits, 0, row.vocab, [&](int i, F16 x) {
        const F16 y = row.scaled(x);
        const uint32_t hopeful = at_least(x, lowest_x) & at_least(y, least_y);
        if (!hopeful) return;
        const I16 hash = noise.hash(lanes + set1(static_cast<int32_t>(i)));
        const uint32_t chosen = hopeful & at_least(y + Noise::upper_bound(hash), bar);
        if (!chosen) return;
        winner = challenge(winner, chosen, i, y, hash);
        bar = set1(winner.noisy);
        least_y = set1(std::max(least, winner.noisy - kMaxNoise));
    });
    return winner.token_id;
}

// ==== top-k ====

// Finds the k-th largest of the values pushed. Keeps those that can still be among the k largest,
// and drops the others once the room is full.
class KthLargest {
public:
    KthLargest(int k, float* room) : kept_(room), k_(k), capacity_(2 * k + kTopKSlack) {}

    void push(F16 x) {
        uint32_t chosen = at_least(x, set1(lowest_));
        if (!chosen) return;
        float values[kLanes];
        store(values, x);
        for (; chosen; chosen &= chosen - 1) kept_[size_++] = values[__builtin_ctz(chosen)];
        if (size_ + kLanes > capacity_) forget();
    }

    // Returns minus infinity, which excludes no token, where fewer than k numbers were pushed.
    float get() {
        if (size_ < k_) return -kInfinity;
        forget();
        return kept_[k_ - 1];
    }

private:
    void forget() {
        std::nth_element(kept_, kept_ + k_ - 1, kept_ + size_, std::greater<float>());
        size_ = k_;
        lowest_ = next_above(kept_[k_ - 1]);
    }

    float* kept_;
    int k_, capacity_, size_ = 0;
    float lowest_ = -kInfinity;  // smaller values cannot change the result
};

float kth_largest(const Row& row, int k, float* scratch) {
    KthLargest kth(k, scratch);
    for_vectors(row.logits, 0, row.vocab, [&](int, F16 x) { kth.push(x); });
    return kth.get();
}

// ==== top-p ====

struct Mass {
    double all = 0.0, above = 0.0;  // sums of e^y
};

double sum_in_order(F16 a) {
    float lanes[kLanes];
    store(lanes, a);
    double result = 0.0;
    for (float lane : lanes) result += lane;
    return result;
}

// Sums e^y over x >= lowest, and over those of them with x > limit.
Mass mass_of(const Row& row, float lowest, float limit) {
    const F16 lowest_x = set1(lowest), above_x = set1(next_above(limit)), least_y = set1(kNoMass);
    Mass mass;
    for (int start = 0; start < row.vocab; start += kBlock) {
        F16 all = zero(), above = zero();
        for_vectors(row.logits, start, std::min(row.vocab, start + kBlock), [&](int, F16 x) {
            const F16 y = row.scaled(x);
            if (!(at_least(x, lowest_x) & at_least(y, least_y))) return;
            const F16 e = exp(y);
            all = all + where_at_least(x, lowest_x, e);
            above = above + where_at_least(x, above_x, e);
        });
        mass.all += sum_in_order(all);
        mass.above += sum_in_order(above);
    }
    return mass;
}

// ==== a row ====

int32_t draw_token(const Row& row, const ReefDraw& draw, float* scratch) {
    const Noise noise(draw.seed, draw.position);
    const float least = static_cast<float>(std::log(static_cast<double>(draw.min_p)));
    const bool has_top_k = 0 < draw.top_k && draw.top_k < row.vocab;
    float lowest = has_top_k ? kth_largest(row, draw.top_k, scratch) : -kInfinity;
    for (double nucleus = 0.0;;) {  // the mass that top-p asks for, once it is known
        const int32_t token_id = find_winner(row, noise, draw.best, lowest, least);
        const float x = row.logits[token_id];
        if (draw.top_p >= 1.f || !(x < row.highest)) return token_id;
        const Mass mass = mass_of(row, lowest, x);
        if (nucleus == 0.0) nucleus = static_cast<double>(draw.top_p) * mass.all;
        if (mass.above < nucleus) return token_id;
        lowest = next_above(x);
    }
}

int draws_per_chunk(const ReefDrawArgs& a) {
    return std::clamp(kLeastWork / std::max(a.vocab, 1), 1, std::max(a.num_draws, 1));
}

void draw_chunk(const void* args, int chunk) {
    const auto& a = *static_cast<const ReefDrawArgs*>(args);
    const int begin = chunk * draws_per_chunk(a);
    for (int i = begin; i < std::min(a.num_draws, begin + draws_per_chunk(a)); ++i) {
        float* scratch = a.scratch + i * a.scratch_stride;
        a.token_ids[i] = draw_token(row_of(a, a.draws[i]), a.draws[i], scratch);
    }
}

}  // namespace

reef::Task draw(const ReefDrawArgs* args, int) {
    const int per_chunk = draws_per_chunk(*args);
    return {draw_chunk, args, (args->num_draws + per_chunk - 1) / per_chunk};
}

}  // namespace REEF_ISA
