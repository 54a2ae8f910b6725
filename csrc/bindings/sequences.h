// Sequences that lie one behind the other, taken apart into the calls that they are.
#pragma once

#include <vector>

#include "params.h"

namespace fastattn {

// Where sequences start among rows, and the last one ends; checked.
using Starts = std::vector<int64_t>;

// One call for each sequence, those whose tasks take longest first. `whole` has a batch of 1, all rows, and tables with
// an entry for each sequence. Sequences without queries are left out.
std::vector<AttentionParams> split_forward(const AttentionParams& whole, const Starts& queries, const Starts& keys);
// The same; the gradients of keys that no query sees are written too, so no sequence is left out.
std::vector<BackwardParams> split_backward(const BackwardParams& whole, const Starts& queries, const Starts& keys);

}  // namespace fastattn
