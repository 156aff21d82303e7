// Computes attention in AMX tiles: up to sixteen lanes by sixteen keys, or dimensions, at a time.
//
// A tile of keys is a run and 32 or 16 dimensions in bf16, 64 or 16 in int8, and a tile of values a
// run and 16 dimensions, as they lie in the KV blocks: nothing is copied but the first and last
// keys of a context. While lanes' weights are computed, the next tiles are multiplied already.
//
// Over int8 the results have the bits of the vector kernel, since sums of integers are exact. Over
// bf16 they have not: a tile adds even and odd dimensions apart.
#include <type_traits>

#include "amx.h"
#include "attention_amx.h"
#include "attention_chunks.h"
#include "attention_int8.h"
#include "table.h"

namespace REEF_ISA {
namespace {

// Shapes the tiles of attention:
//
//     0 to 3  sums of 16 columns         4 5  a's lanes and b's columns, 64 bytes of each deep
//                                        6 7  the same for a quarter or half of the depth
class AttentionTiles {
public:
    AttentionTiles(int lanes, int small_depth) {
        TileConfig config;
        for (int tile : {0, 1, 2, 3}) config.set(tile, lanes, 64);
        config.set(4, lanes, kAmxDepth);
        config.set(5, kAmxDepth / 4, 64);
        config.set(6, lanes, small_depth);
        config.set(7, small_depth / 4, 64);
        config.load();
    }
    AttentionTiles(const AttentionTiles&) = delete;
    ~AttentionTiles() { _tile_release(); }
};

// ==== Products of weights and values, for both formats ====

struct Unsigned { static constexpr int kRunBytes = kRun; };  // of weights
struct Bf16 { static constexpr int kRunBytes = 2 * kRun; };

// Adds the product of tiles 6 and 7 to tile C.
template <class Product, int C>
inline void add_product() {
    constexpr bool kIsBf16 = std::is_same_v<Product, Bf16>;
    if constexpr (C == 0 && kIsBf16) _tile_dpbf16ps(0, 6, 7);
    if constexpr (C == 1 && kIsBf16) _tile_dpbf16ps(1, 6, 7);
    if constexpr (C == 2 && kIsBf16) _tile_dpbf16ps(2, 6, 7);
    if constexpr (C == 3 && kIsBf16) _tile_dpbf16ps(3, 6, 7);
    if constexpr (C == 0 && !kIsBf16) _tile_dpbusd(0, 6, 7);
    if constexpr (C == 1 && !kIsBf16) _tile_dpbusd(1, 6, 7);
    if constexpr (C == 2 && !kIsBf16) _tile_dpbusd(2, 6, 7);
    if constexpr (C == 3 && !kIsBf16) _tile_dpbusd(3, 6, 7);
}

// Sets 16 N columns of c to p v, over the runs.
template <class Product, int N, class P, class C>
void multiply_columns(const P* p, int64_t p_stride, const uint8_t* const* values, Runs runs,
                      int width, int d, C* c, int64_t c_stride) {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 3) _tile_zero(3);
    for (int r = runs.first; r < runs.last; ++r) {
        const uint8_t* v = values[r] + d * 4;
        _tile_loadd(6, reinterpret_cast<const uint8_t*>(p) + r * Product::kRunBytes, p_stride);
        _tile_loadd(7, v, width * 4);
        add_product<Product, 0>();
        if constexpr (N > 1) {
            _tile_loadd(7, v + 64, width * 4);
            add_product<Product, 1>();
        }
        if constexpr (N > 2) {
            _tile_loadd(7, v + 128, width * 4);
            add_product<Product, 2>();
        }
        if constexpr (N > 3) {
            _tile_loadd(7, v + 192, width * 4);
            add_product<Product, 3>();
        }
    }
    _tile_stored(0, c + d, c_stride * 4);
    if constexpr (N > 1) _tile_stored(1, c + d + 16, c_stride * 4);
    if constexpr (N > 2) _tile_stored(2, c + d + 32, c_stride * 4);
    if constexpr (N > 3) _tile_stored(3, c + d + 48, c_stride * 4);
}

template <class Product, class P, class C>
void multiply_values(const P* p, int64_t p_stride, const uint8_t* const* values, Runs runs,
                     int width, C* c, int64_t c_stride) {
    int d = 0;
    for (; d + 64 <= width; d += 64)
        multiply_columns<Product, 4>(p, p_stride, values, runs, width, d, c, c_stride);
    for (; d < width; d += 16)
        multiply_columns<Product, 1>(p, p_stride, values, runs, width, d, c, c_stride);
}

// ==== int8 ====

class AmxProducts {
public:
    static constexpr int kLanesAtOnce = kAmxRows / 2;  // of each lane high and low bytes

    AmxProducts(int head_dim, int lanes) : bytes_(head_dim), tiles_(2 * lanes, kRun) {}

    // Sets s = q k of a run, of which k is unsigned.
    void keys(Halves<int8_t> q, const uint8_t* keys, int run, Halves<int32_t> s) const {
        _tile_zero(0);
        int d = 0;
        for (; d + kAmxDepth <= bytes_; d += kAmxDepth) {
            _tile_loadd(4, q.rows + d, q.stride);
            _tile_loadd(5, keys + d * kRun, 64);
            _tile_dpbsud(0, 4, 5);
        }
        for (; d < bytes_; d += 16) {
            _tile_loadd(6, q.rows + d, q.stride);
            _tile_loadd(7, keys + d * kRun, 64);
            _tile_dpbsud(0, 6, 7);
        }
        _tile_stored(0, s.rows + run * kRun, s.stride * 4);
    }

    // Sets o = p v, of which p is unsigned.
    void values(Halves<const uint8_t> p, const uint8_t* const* values, Runs runs, int width,
                Halves<int32_t> o) const {
        multiply_values<Unsigned>(p.rows, p.stride, values, runs, width, o.rows, o.stride);
    }

private:
    const int bytes_;
    const AttentionTiles tiles_;
};

// ==== bf16 ====

constexpr int kQueryStride = kMaxHeadDim + 32;
constexpr int kWeightStride = kTile + 32;

class AmxBf16Attention {
public:
    static constexpr int kLanesAtOnce = kAmxRows;

    AmxBf16Attention(const reef::AttentionCall& a, const Work& work, int lanes)
        : work_(work),
          rule_(score_rule(a)),
          head_dim_(a.kv.head_dim),
          width_(padded_dim(a.kv.head_dim)),
          tiles_(lanes, 2 * kRun) {
        for (int lane = 0; lane < work.lanes(); ++lane)
            std::copy_n(query_of(a, work, lane), head_dim_, q_ + lane * kQueryStride);
    }

    void keys(const Step& step) {
        const bf16* q = q_ + step.first * kQueryStride;
        const Runs seen = runs(step);
        float* s = s_[step.buffer];
        int r = seen.first;
        for (; r + 2 <= seen.last; r += 2) multiply_runs<true>(q, step.tile.keys + r, s + r * kRun);
        if (r < seen.last) multiply_runs<false>(q, step.tile.keys + r, s + r * kRun);
    }

    void weights(const Step& step, ValuesAhead* ahead, Lanes* lanes) {
        for (int i = 0; i < step.count; ++i) {
            const int lane = step.first + i;
            factors_[i] =
                softmax(s_[step.buffer] + i * kScoreStride, work_.visible(lane, step.start), rule_,
                        {lanes->highest + lane, lanes->sums + lane * 16}, p_ + i * kWeightStride);
            ahead->fetch_share();
        }
    }

    void values(const Step& step, Lanes* lanes) {
        multiply_seen_values(step);
        for (int i = 0; i < step.count; ++i)
            add_products(o_ + i * kOutStride, factors_[i], width_,
                         lanes->out + (step.first + i) * kOutStride);
    }

private:
    Runs runs(const Step& step) const { return Runs(work_.visible_to_any(step.start)); }

    // Multiplies values, of which a tile that some lane does not see whole is copied, with zeros
    // where no lane sees it. If the rest is not finite, each lane needs a copy of its own, since 0
    // times such a value is not 0.
    void multiply_seen_values(const Step& step) {
        const Visible first = work_.visible(step.first, step.start);
        const Visible last = work_.visible(step.first + step.count - 1, step.start);
        Tile tile = step.tile;
        const bool is_whole = first.bits() == ~uint64_t{0} && last.bits() == ~uint64_t{0};
        if (!is_whole && !copy_values(work_.visible_to_any(step.start), &tile))
            return multiply_values_lane_by_lane(step);
        multiply_values<Bf16>(p_, kWeightStride * 2, tile.values, runs(step), width_, o_,
                              kOutStride);
    }

    template <bool BOTH>
    void multiply_runs(const bf16* q, const uint8_t* const* keys, float* s) const {
        _tile_zero(0);
        if constexpr (BOTH) _tile_zero(1);
        int d = 0;
        for (; d + 32 <= head_dim_; d += 32) {
            _tile_loadd(4, q + d, kQueryStride * 2);
            _tile_loadd(5, keys[0] + d * kRun * 2, 64);
            _tile_dpbf16ps(0, 4, 5);
            if constexpr (!BOTH) continue;
            _tile_loadd(5, keys[1] + d * kRun * 2, 64);
            _tile_dpbf16ps(1, 4, 5);
        }
        if (d < head_dim_) {
            _tile_loadd(6, q + d, kQueryStride * 2);
            _tile_loadd(7, keys[0] + d * kRun * 2, 64);
            _tile_dpbf16ps(0, 6, 7);
            if constexpr (BOTH) {
                _tile_loadd(7, keys[1] + d * kRun * 2, 64);
                _tile_dpbf16ps(1, 6, 7);
            }
        }
        _tile_stored(0, s, kScoreStride * 4);
        if constexpr (BOTH) _tile_stored(1, s + kRun, kScoreStride * 4);
    }

    // Copies the values of a tile that are seen, with zeros for others in their runs.
    bool copy_values(Visible seen, Tile* tile) {
        const __m512i magnitude = _mm512_set1_epi16(0x7fff);
        __m512i largest = _mm512_setzero_si512();
        const Runs runs(seen);
        for (int r = runs.first; r < runs.last; ++r) {
            const uint8_t* from = tile->values[r];
            bf16* to = values_ + r * kRun * width_;
            tile->values[r] = reinterpret_cast<const uint8_t*>(to);
            for (int pair = r * kRun / 2; pair < (r + 1) * kRun / 2; ++pair) {
                const uint64_t bits = seen.bits() >> 2 * pair;
                const __mmask32 mask =
                    (bits & 1 ? 0x55555555u : 0u) | (bits & 2 ? 0xaaaaaaaau : 0u);
                for (int d = 0; d < width_; d += 16, from += 64, to += 32) {
                    const __m512i v = _mm512_maskz_loadu_epi16(mask, from);
                    largest = _mm512_max_epu16(largest, _mm512_and_si512(v, magnitude));
                    _mm512_storeu_si512(to, v);
                }
            }
        }
        return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;
    }

    void multiply_values_lane_by_lane(const Step& step) {
        alignas(64) float kept[kAmxRows * kOutStride];
        for (int i = 0; i < step.count; ++i) {
            const Visible seen = work_.visible(step.first + i, step.start);
            float* row = o_ + i * kOutStride;
            std::fill_n(row, width_, 0.f);
            if (!seen.empty()) {
                Tile tile = step.tile;
                copy_values(seen, &tile);
                multiply_values<Bf16>(p_, kWeightStride * 2, tile.values, Runs(seen), width_, o_,
                                      kOutStride);
            }
            std::copy_n(row, width_, kept + i * kOutStride);
        }
        for (int i = 0; i < step.count; ++i)
            std::copy_n(kept + i * kOutStride, width_, o_ + i * kOutStride);
    }

    const Work& work_;
    const ScoreRule rule_;
    const int head_dim_, width_;
    const AttentionTiles tiles_;
    alignas(64) bf16 q_[kMaxLanes * kQueryStride];
    alignas(64) bf16 values_[kTile * kMaxHeadDim];
    alignas(64) float s_[kStepBuffers][kAmxRows * kScoreStride];
    alignas(64) bf16 p_[kAmxRows * kWeightStride];
    alignas(64) float o_[kAmxRows * kOutStride];
    float factors_[kAmxRows];
};

}  // namespace

bool amx_attends(const ReefAttentionArgs& args) { return args.kv.head_dim % 16 == 0; }

reef::Task amx_attention(const reef::AttentionCall* args, int) {
    return args->kv.format == REEF_KV_INT8
               ? attention_task<PipelinedAttention<Int8Attention<AmxProducts>>>(args)
               : attention_task<PipelinedAttention<AmxBf16Attention>>(args);
}

}  // namespace REEF_ISA
