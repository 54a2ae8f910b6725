#include "workspace.h"

#include <pthread.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>

namespace fastattn {
namespace {

constexpr size_t kPoolBytes = size_t{64} << 20;  // what one call packs at most, for a model's next layer to find
constexpr size_t kPoolBlocks = 16;               // as many calls at once find theirs again; the search is linear

struct Block {
  char* data;
  size_t size;
};

struct Pool {
  std::mutex mutex;
  Block blocks[kPoolBlocks];  // the one unused for longest first
  size_t count = 0;
  size_t bytes = 0;

  Block remove(size_t index) {
    const Block block = blocks[index];
    std::copy(blocks + index + 1, blocks + count, blocks + index);
    --count;
    bytes -= block.size;
    return block;
  }
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
  size_t best = p.count;
  for (size_t i = 0; i < p.count; ++i) {
    const bool fits = p.blocks[i].size >= size && p.blocks[i].size / 2 <= size;
    if (fits && (best == p.count || p.blocks[i].size < p.blocks[best].size)) {
      best = i;
    }
  }
  if (best == p.count) {
    return false;
  }
  block = p.remove(best);
  return true;
}

// Makes room for `size` bytes, for the block `keep` if there is one: what was unused for longest goes, lest sizes that
// nobody asks for any more fill the pool.
void make_room(size_t size, const Block* keep) {
  Block expelled[kPoolBlocks];
  size_t count = 0;
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    while (p.count > 0 && (p.count == kPoolBlocks || p.bytes + size > kPoolBytes)) {
      expelled[count++] = p.remove(0);
    }
    if (keep != nullptr) {
      p.blocks[p.count++] = *keep;
      p.bytes += keep->size;
    }
  }
  std::for_each(expelled, expelled + count, [](const Block& block) { std::free(block.data); });
}

class ScratchError : public std::bad_alloc {
 public:
  explicit ScratchError(size_t bytes) { std::snprintf(text_, sizeof text_, "cannot get %zu bytes of scratch", bytes); }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[64];
};

// Pages of 2 MiB where the system gives them on request: packed operands and partial sums are walked in many streams at
// once, more of them than there are entries for small pages.
constexpr size_t kHugePage = size_t{2} << 20;

char* allocate(size_t bytes) {
  const bool huge = bytes >= kHugePage;
  auto* data = static_cast<char*>(std::aligned_alloc(huge ? kHugePage : kScratchAlign, bytes));
#ifdef MADV_HUGEPAGE
  if (huge && data != nullptr) {
    madvise(data, bytes, MADV_HUGEPAGE);  // advice: without it the pages are small
  }
#endif
  return data;
}

}  // namespace

Workspace::Workspace(size_t bytes) : data_(nullptr), size_(0) {
  const size_t step = bytes < kHugePage ? kScratchAlign : kHugePage;
  const size_t rounded = (std::max<size_t>(bytes, 4096) + step - 1) / step * step;
  Block block{};
  if (take(rounded, block)) {
    data_ = block.data;
    size_ = block.size;
    return;
  }
  data_ = allocate(rounded);
  if (data_ == nullptr) {  // what is kept for later calls is better used now
    make_room(kPoolBytes, nullptr);
    data_ = allocate(rounded);
  }
  if (data_ == nullptr) {
    throw ScratchError(rounded);
  }
  size_ = rounded;
}

Workspace::~Workspace() {
  if (size_ > kPoolBytes) {
    std::free(data_);
    return;
  }
  const Block block{data_, size_};
  make_room(size_, &block);
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
