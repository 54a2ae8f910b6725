// Where the keys of each query's segment lie: where they stand side by side, which is usual, that is all there is to a
// segment, and otherwise kernels compare the segments of what is left.
#pragma once

#include <vector>

#include "params.h"

namespace fastattn {

using SegmentRanges = std::vector<SegmentRange>;

// Sets `ranges`, (B, Lq), and what the parameters say of them, which points there; in time and memory of the lengths'
// order. Nothing without segments.
void find_segments(AttentionParams& p, SegmentRanges& ranges);

}  // namespace fastattn
