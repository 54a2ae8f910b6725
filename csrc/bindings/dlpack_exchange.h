// The part of DLPack's C exchange table (https://dmlc.github.io/dlpack) that is used here: types publish it as
// `__dlpack_c_exchange_api__`, and reading a tensor through it takes a tenth of the time that its attributes take.
#pragma once

#include <cstdint>

namespace fastattn {

constexpr uint32_t kDLPackMajor = 1;
constexpr int32_t kDLCpu = 1;
enum DLCode : uint8_t { kDLInt = 0, kDLFloat = 2, kDLBfloat = 4, kDLFloat8E4M3 = 10, kDLFloat8E5M2 = 12 };

struct DLTensor {
  void* data;
  struct {
    int32_t type;
    int32_t id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; may be null where rows are contiguous
  uint64_t byte_offset;
};

// Fills a view that lives as long as the object is not touched; -1 with an error set.
using ViewOfObject = int (*)(void* object, DLTensor* view);

struct DLPackExchange {
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  const void* previous;
  void* allocate;
  void* from_object;
  void* to_object;
  ViewOfObject view_of_object;  // may be null
  void* current_work_stream;
};

}  // namespace fastattn
