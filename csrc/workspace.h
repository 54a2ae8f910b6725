// The only room that allocates scratch.
//
// A call leases one block for all it needs and gives it back at its end. Blocks given back wait in a process-wide pool
// of at most kPoolBytes, so that a model's calls do not go to the system each time and an idle process holds little.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn {

constexpr size_t kScratchAlign = 64;  // a cache line, and a ZMM register

// Packed keys and values of all heads in flight stay within this; a head that is longer is packed block by block, by
// each task for itself.
constexpr int64_t kPackedBudget = int64_t{64} << 20;

class Workspace {
 public:
  explicit Workspace(size_t bytes);  // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return data_; }

 private:
  char* data_;
  size_t size_;
};

// Keeps forked children from inheriting the pool's lock from a thread that they do not have. Called once, at load.
void guard_scratch_pool();

struct ScratchInfo {
  int64_t pooled_bytes;
  int64_t pool_limit;
  int64_t packed_budget;
};

ScratchInfo scratch_info();

}  // namespace fastattn
