// The arguments of one attention call, as the kernels see them: plain data, no ownership, no Python.
//
// Every tensor is addressed in the canonical order (batch, head, row, column) whatever its layout in memory;
// strides count elements and may be 0 (broadcast). What the fields mean is fixed in fastattn/problem.py, which
// validates meaning; bindings/make_params.cpp validates memory safety; kernels only assert.
#pragma once

#include <cstdint>

namespace fastattn {

// The last three are of caches: numbers of one byte that a scale multiplies. 4 and 5 are codes of the bindings.
enum class DType : int32_t {
  float32 = 0,
  float64 = 1,
  bfloat16 = 2,
  float16 = 3,
  int8 = 6,
  float8_e4m3fn = 7,
  float8_e5m2 = 8,
};

// Bytes of a number.
constexpr int64_t size_of(DType dtype) {
  return dtype == DType::float64                               ? 8
         : dtype == DType::float32                             ? 4
         : dtype == DType::bfloat16 || dtype == DType::float16 ? 2
                                                               : 1;
}

// The type of log-sum-exps, and of weights that are summed.
constexpr DType lse_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// A window bound that never cuts.
constexpr int64_t kUnbounded = int64_t{1} << 62;

// What the kernels' fixed buffers hold.
constexpr int64_t kMaxHeadDim = 576;
constexpr int64_t kMaxValueDim = 512;

// Up to this many queries, keys and values are read where they lie and each query pays for itself; above it, a panel's
// lanes fill. Decided by the number of queries and the type alone, so that a row's bits do not depend on how many heads
// share its keys. At 2048 keys float32 heads of their own gain a third to two thirds up to 12 queries; grouped heads
// are even. A 16-bit type's wide method is quicker, and widening rows for each query dearer: beyond 4 it wins.
constexpr int64_t few_queries(DType dtype) { return dtype == DType::float32 || dtype == DType::float64 ? 12 : 4; }

// Dropout: a probability stays, times `scale`, where its random 32-bit number is at least `threshold`.
struct Dropout {
  uint64_t threshold;  // p * 2^32, rounded up; 0: no dropout
  double scale;        // 1 / (1 - p)
  uint64_t seed;
  uint32_t offset;
  int64_t first_head;  // heads are counted from here
};

// Where the keys of a query's segment lie: none outside of [first, last), and `whole` if all in it are of the segment.
struct SegmentRange {
  int64_t first;
  int64_t last;
  bool whole;
};

struct AttentionParams {
  DType dtype;     // of query, out and weights
  DType kv_dtype;  // of key and value: the same, or one of a cache

  int64_t batch;        // B
  int64_t query_heads;  // Hq, a multiple of kv_heads
  int64_t kv_heads;     // Hkv
  int64_t seqlen_q;     // Lq
  int64_t seqlen_k;     // Lk
  int64_t head_dim;     // D, of query and key
  int64_t value_dim;    // Dv, of value and out

  const void* query;
  int64_t query_strides[4];  // (B, Hq, Lq, D)
  // Where there are pages, these two have those of a page in place of a batch's: (pages, Hkv, page_size, D).
  const void* key;
  int64_t key_strides[4];  // (B, Hkv, Lk, D)
  const void* value;
  int64_t value_strides[4];      // (B, Hkv, Lk, Dv)
  const float* key_scales;       // null, or what multiplies a row of keys
  int64_t key_scale_strides[3];  // (B or pages, Hkv, Lk or page_size)
  const float* value_scales;     // null, or what multiplies a row of values
  int64_t value_scale_strides[3];
  const int64_t* block_table;  // null, or (B, pages of a sequence): where keys [n * page_size, ...) lie, as far as used
  int64_t block_table_stride;  // of a sequence
  int64_t page_size;           // keys a page; Lk is as many as the pages of a sequence hold

  void* out;
  int64_t out_strides[4];  // (B, Hq, Lq, Dv)

  void* lse;                   // null, or float32 (float64 for float64 inputs)
  int64_t lse_strides[3];      // (B, Hq, Lq)
  void* weights;               // null, or the probabilities
  int64_t weights_strides[4];  // (B, Hq, Lq, Lk)

  const uint8_t* mask;  // null, or bytes: nonzero = attend
  int64_t mask_strides[4];
  const void* bias;  // null, or added to the scores; -inf masks
  DType bias_dtype;  // dtype or float32
  int64_t bias_strides[4];

  const int64_t* kv_lengths;           // null, or (B,): keys at and past it do not exist
  const int64_t* kv_starts;            // null, or (B,): keys before it do not exist
  const int64_t* query_lengths;        // null, or (B,): queries at and past it do not exist
  const int64_t* query_segments;       // null, or (B, Lq): a query attends to the keys of its own segment
  const int64_t* key_segments;         // null, or (B, Lk)
  int64_t segment_strides[2];          // of a sequence, in query_segments and in key_segments
  const SegmentRange* segment_ranges;  // null without segments, or (B, Lq)
  bool scattered_segments;             // some of these are not whole
  const int64_t* query_offset;         // (B,): query i stands at key position i + offset
  int64_t window_left;                 // keys from i + offset - window_left ...
  int64_t window_right;                // ... to i + offset + window_right; the causal rule is window_right <= 0

  const double* alibi_slopes;  // null, or (B, Hq): score -= slope * |i + offset - j|
  int64_t alibi_strides[2];
  const double* sinks;  // null, or (Hq,): one more logit in the normaliser
  double scale;
  double softcap;  // 0 = none
  Dropout dropout;

  int32_t num_threads;  // at most this many
};

// The arguments of one backward call. Gradients that are null are not computed.
struct BackwardParams {
  AttentionParams forward;  // out and lse are read

  const void* grad_out;             // of forward.dtype
  int64_t grad_out_strides[4];      // (B, Hq, Lq, Dv)
  const void* grad_lse;             // null, or of lse's type
  int64_t grad_lse_strides[3];      // (B, Hq, Lq)
  const void* grad_weights;         // null, or of forward.dtype
  int64_t grad_weights_strides[4];  // (B, Hq, Lq, Lk)

  void* grad_query;  // of forward.dtype, and so are the next two
  int64_t grad_query_strides[4];
  void* grad_key;
  int64_t grad_key_strides[4];
  void* grad_value;
  int64_t grad_value_strides[4];
  void* grad_bias;  // of lse's type; a stride of 0 sums over the axis
  int64_t grad_bias_strides[4];
  double* grad_slopes;  // (B, Hq)
  double* grad_sinks;   // (B, Hq)
};

// The arguments of one look at what attention looks at. What is written is contiguous, and of float32 (float64 for
// float64 inputs) where it is not keys.
struct InsightParams {
  AttentionParams forward;  // out may be null: the values are then not read; neither dropout, lse nor weights

  int64_t top_k;         // at least 1
  int64_t* keys;         // (B, Hq, Lq, top_k), those of largest weight first; -1 where fewer are visible
  void* weights;         // (B, Hq, Lq, top_k)
  void* entropy;         // (B, Hq, Lq), natural logarithms
  void* key_mass;        // (B, Hq, Lk), sums over the queries
  const int64_t* edges;  // null, or (edge_count,), rising: distances i + offset - j at which a bucket starts
  int64_t edge_count;
  void* distance_mass;  // null, or (B, Hq, edge_count + 1), sums over queries and keys
};

}  // namespace fastattn
