// Overlaps neighbouring steps. A step is a tile of keys for a group of lanes:
//
//     keys      s = q k
//     weights   p by softmax of s
//     values    each lane's o += p v
//
// The keys of the next step are multiplied before the weights of this one are computed, so that
// memory and tiles work meanwhile.
#pragma once
#include "attention_keys.h"

namespace REEF_ISA {

struct Step {
    Tile tile;
    int start;         // the tile's position
    int first, count;  // lanes
    int buffer;        // number of the Kind's buffer of scores
};
constexpr int kStepBuffers = 2;

// Kind(args, work, lanes) takes the queries, and computes the three operations for at most `lanes`
// lanes at a time, itself at most Kind::kLanesAtOnce.
template <class Kind>
class PipelinedAttention {
public:
    PipelinedAttention(const reef::AttentionCall& a, const Work& work)
        : a_(a),
          work_(work),
          groups_((work.lanes() + Kind::kLanesAtOnce - 1) / Kind::kLanesAtOnce),
          group_size_((work.lanes() + groups_ - 1) / groups_),
          kind_(a, work, group_size_) {}

    void begin(const Tile& tile, int start) { start_step(tile, start, 0); }

    void add(const Tile& tile, int start, const Tile* next, Lanes* lanes) {
        ValuesAhead ahead(a_.kv, next, start + kTile, work_);
        for (int group = 0; group < groups_; ++group) {
            const Step step = step_;
            if (group + 1 < groups_) start_step(tile, start, group + 1);
            else if (next) start_step(*next, start + kTile, 0);
            kind_.weights(step, &ahead, lanes);
            kind_.values(step, lanes);
        }
    }

private:
    void start_step(const Tile& tile, int start, int group) {
        const int first = group * group_size_;
        step_ = {tile, start, first, std::min(group_size_, work_.lanes() - first),
                 1 - step_.buffer};
        kind_.keys(step_);
    }

    const reef::AttentionCall& a_;
    const Work& work_;
    const int groups_, group_size_;  // of lanes; the last group may have fewer
    Step step_ = {};                 // whose keys have been multiplied
    Kind kind_;
};

}  // namespace REEF_ISA
