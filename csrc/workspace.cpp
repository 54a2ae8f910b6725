#include "workspace.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace fastattn {
namespace {

constexpr size_t kPoolBytes = size_t{64} << 20;
constexpr size_t kPoolBlocks = 16;  // as many calls at once find theirs again; the search is linear

struct Block {
  char* data;
  size_t size;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t bytes = 0;
};

// Never destroyed: a thread may still give a block back while the process exits.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

// The smallest block that fits without wasting more than half of it.
bool take(size_t size, Block& block) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  auto best = p.blocks.end();
  for (auto it = p.blocks.begin(); it != p.blocks.end(); ++it) {
    const bool fits = it->size >= size && it->size / 2 <= size;
    if (fits && (best == p.blocks.end() || it->size < best->size)) {
      best = it;
    }
  }
  if (best == p.blocks.end()) {
    return false;
  }
  block = *best;
  p.bytes -= block.size;
  p.blocks.erase(best);
  return true;
}

}  // namespace

Workspace::Workspace(size_t bytes) : data_(nullptr), size_(0) {
  const size_t rounded = (std::max<size_t>(bytes, 4096) + kScratchAlign - 1) / kScratchAlign * kScratchAlign;
  Block block{};
  if (take(rounded, block)) {
    data_ = block.data;
    size_ = block.size;
    return;
  }
  data_ = static_cast<char*>(std::aligned_alloc(kScratchAlign, rounded));
  if (data_ == nullptr) {
    throw std::bad_alloc();
  }
  size_ = rounded;
}

Workspace::~Workspace() {
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    if (p.bytes + size_ <= kPoolBytes && p.blocks.size() < kPoolBlocks) {
      try {
        p.blocks.push_back({data_, size_});
        p.bytes += size_;
        return;
      } catch (const std::bad_alloc&) {  // no room to remember it: let it go
      }
    }
  }
  std::free(data_);
}

void guard_scratch_pool() {
  pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
}

ScratchInfo scratch_info() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return {static_cast<int64_t>(p.bytes), static_cast<int64_t>(kPoolBytes), kPackedBudget};
}

}  // namespace fastattn
