#include "bindings/segments.h"

#include <algorithm>

namespace fastattn {
namespace {

struct Segment {
  int64_t id;
  SegmentRange range;
};

// The segments of one sequence's keys, by id.
void read_segments(const int64_t* ids, int64_t keys, std::vector<Segment>& segments) {
  segments.clear();
  for (int64_t key = 0; key < keys; ++key) {
    if (key > 0 && ids[key] == ids[key - 1]) {
      ++segments.back().range.last;
    } else {
      segments.push_back({ids[key], {key, key + 1, true}});
    }
  }
  std::sort(segments.begin(), segments.end(), [](const Segment& a, const Segment& b) {
    return a.id != b.id ? a.id < b.id : a.range.first < b.range.first;
  });
  size_t count = 0;
  for (const Segment& run : segments) {  // those of one id become one
    if (count > 0 && segments[count - 1].id == run.id) {
      segments[count - 1].range.last = run.range.last;
      segments[count - 1].range.whole = false;
    } else {
      segments[count++] = run;
    }
  }
  segments.resize(count);
}

}  // namespace

void find_segments(AttentionParams& p, SegmentRanges& ranges) {
  if (p.query_segments == nullptr) {
    return;
  }
  ranges.resize(static_cast<size_t>(p.batch * p.seqlen_q));
  p.segment_ranges = ranges.data();
  std::vector<Segment> segments;
  for (int64_t b = 0; b < p.batch; ++b) {
    read_segments(p.key_segments + b * p.segment_strides[1], p.seqlen_k, segments);
    const int64_t* ids = p.query_segments + b * p.segment_strides[0];
    SegmentRange* row = ranges.data() + b * p.seqlen_q;
    for (int64_t i = 0; i < p.seqlen_q; ++i) {
      if (i > 0 && ids[i] == ids[i - 1]) {
        row[i] = row[i - 1];
        continue;
      }
      const auto found = std::lower_bound(segments.begin(), segments.end(), ids[i],
                                          [](const Segment& segment, int64_t id) { return segment.id < id; });
      const bool there = found != segments.end() && found->id == ids[i];
      row[i] = there ? found->range : SegmentRange{0, 0, true};
      p.scattered_segments |= !row[i].whole;
    }
  }
}

}  // namespace fastattn
