// Keys and values as the products read them.
//
// The first product broadcasts single lanes of key rows, the second loads vectors of value rows, so float32 and float64
// are read where they lie. Other types, and elements that are not adjacent, are packed: keys as [key][D] rows of
// operand elements, values as [key / depth][padded Dv] lanes (bfloat16 products pair two keys in a lane).
#pragma once

#include "algorithm/bytes.h"
#include "algorithm/engine.h"

namespace fastattn {
namespace {

// One head's keys and values over a range that starts at key `start`. Strides are in bytes.
struct KeyValueView {
  const char* key;
  int64_t key_stride;  // a key
  const char* value;
  int64_t value_stride;  // a step of `depth` keys
  int64_t start;
  // Method::rows: where each row of the running block stands, see RowTable.
  const char* const* key_rows;
  const char* const* value_rows;
  DType stored;  // of rows that are decoded
  // The rows that exist, or those of each large page, lie one behind the other. Otherwise the CPU does not know by
  // itself what comes next, and they are asked for.
  bool keys_adjacent;
  bool values_adjacent;
};

struct OperandLayout {
  bool pack_key;
  bool pack_value;
  int64_t key_row_bytes;    // of a packed key
  int64_t value_row_bytes;  // of a packed step

  int64_t head_bytes(int64_t keys, int depth) const {
    return (pack_key ? keys * key_row_bytes : 0) + (pack_value ? keys / depth * value_row_bytes : 0);
  }
};

// Rows that are fetched into the second-level cache ahead of a product that waits for memory.
constexpr int64_t kPrefetchRows = 32;
constexpr int64_t kLine = 64;  // bytes of a cache line

FASTATTN_INLINE void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += kLine) {
    __builtin_prefetch(row + b, 0, 2);
  }
}

// Rows that are asked for beside other work, a line at a time: in bursts they wait for each other, and what stands
// behind them waits too.
struct Fetch {
  const char* const* rows;
  int64_t count;
  int64_t bytes;
  int64_t at = 0;
  FASTATTN_INLINE void step() {
    if (count > 0) {
      __builtin_prefetch(*rows + at, 0, 2);
      at += kLine;
      if (at >= bytes) {
        at = 0;
        ++rows;
        --count;
      }
    }
  }
};

template <class E>
inline int64_t padded_value_dim(const AttentionParams& p) {
  return round_up(p.value_dim, E::kWidth);
}

// `copy_strided`: whether rows that are not adjacent are worth copying.
template <class E>
inline OperandLayout operand_layout(const AttentionParams& p, bool copy_strided) {
  OperandLayout layout{};
  const bool copies = copy_strided && E::kMethod == Method::broadcast;
  const bool gathers = E::kMethod != Method::rows && (p.block_table != nullptr || p.kv_dtype != p.dtype);
  const bool key_scattered = copies && p.key_strides[2] > p.head_dim;
  const bool value_scattered = copies && p.value_strides[2] > p.value_dim;
  layout.pack_key =
      gathers || E::kConvert || p.key_strides[3] != 1 || p.head_dim % E::kDimMultiple != 0 || key_scattered;
  layout.pack_value = gathers || E::kPacksValue || p.value_strides[3] != 1 || value_scattered;
  layout.key_row_bytes = round_up(p.head_dim, E::kDimMultiple) * static_cast<int64_t>(sizeof(typename E::Element));
  layout.value_row_bytes = padded_value_dim<E>(p) * E::kDepth * static_cast<int64_t>(sizeof(typename E::Element));
  return layout;
}

// Keys of a sequence that exist: those past its length are never read.
inline int64_t existing_keys(const AttentionParams& p, int64_t batch) {
  return p.kv_lengths == nullptr ? p.seqlen_k : min64(p.kv_lengths[batch], p.seqlen_k);
}

// Where a row of keys or values stands, in elements from the start of its tensor.
inline int64_t row_index(const AttentionParams& p, const int64_t* strides, int64_t batch, int64_t head, int64_t key) {
  if (p.block_table == nullptr) {
    return batch * strides[0] + head * strides[1] + key * strides[2];
  }
  const int64_t page = p.block_table[batch * p.block_table_stride + key / p.page_size];
  return page * strides[0] + head * strides[1] + key % p.page_size * strides[2];
}

template <class E>
inline const typename E::Source* key_row(const AttentionParams& p, int64_t batch, int64_t head, int64_t key) {
  return at<typename E::Source>(p.key, row_index(p, p.key_strides, batch, head, key));
}

template <class E>
inline const typename E::Source* value_row(const AttentionParams& p, int64_t batch, int64_t head, int64_t key) {
  return at<typename E::Source>(p.value, row_index(p, p.value_strides, batch, head, key));
}

// Elements [0, count) of a strided row, copied next to each other.
template <class T>
inline const T* gather_row(const T* row, int64_t stride, int64_t count, T* buffer) {
  for (int64_t i = 0; i < count; ++i) {
    buffer[i] = row[i * stride];
  }
  return buffer;
}

// Keys or values as the caller has them.
struct StoredRows {
  const void* data;
  const int64_t* strides;
  const float* scales;  // null where they are not quantised
  const int64_t* scale_strides;
  int64_t columns;

  static StoredRows keys(const AttentionParams& p) {
    return {p.key, p.key_strides, p.key_scales, p.key_scale_strides, p.head_dim};
  }
  static StoredRows values(const AttentionParams& p) {
    return {p.value, p.value_strides, p.value_scales, p.value_scale_strides, p.value_dim};
  }
};

inline bool is_quantised(const AttentionParams& p) { return p.kv_dtype != p.dtype; }

inline float row_scale(const AttentionParams& p, const StoredRows& rows, int64_t batch, int64_t head, int64_t key) {
  return rows.scales[row_index(p, rows.scale_strides, batch, head, key)];
}

// Whether a scale does not go into a probability, which is up to 2^8: the product would not be finite. Its row of
// values is added by itself.
inline bool stands_alone(float scale) { return !(__builtin_fabsf(scale) < 0x1p118F); }

// The numbers of a quantised row, which starts at `index`, times its scale.
template <class E, class Stored>
FASTATTN_NOINLINE void dequantise(const StoredRows& rows, int64_t index, float scale, typename E::Source* out) {
  using V = typename E::V;
  const int64_t count = rows.columns;
  Stored gathered[kMaxHeadDim];
  const auto* row = at<Stored>(rows.data, index);
  row = rows.strides[3] == 1 ? row : gather_row(row, rows.strides[3], count, gathered);
  const auto factor = V::set1(scale);
  int64_t d = 0;
  for (; d + E::kWidth <= count; d += E::kWidth) {
    V::store(out + d, V::mul(V::load(row + d), factor));
  }
  if (d < count) {
    const int rest = static_cast<int>(count - d);
    V::store_partial(out + d, V::mul(V::load_partial(row + d, rest), factor), rest);
  }
}

// A row as numbers of the engine's type next to each other: where it lies, or in `buffer`. `scaled`: times its scale.
template <class E>
inline const typename E::Source* read_row(const AttentionParams& p, const StoredRows& rows, int64_t batch, int64_t head,
                                          int64_t key, typename E::Source* buffer, bool scaled = true) {
  const int64_t index = row_index(p, rows.strides, batch, head, key);
  if constexpr (sizeof(typename E::Scalar) == sizeof(float)) {
    if (is_quantised(p)) {
      const float scale = scaled ? row_scale(p, rows, batch, head, key) : 1;
      switch (p.kv_dtype) {
        case DType::int8:
          dequantise<E, Int8>(rows, index, scale, buffer);
          break;
        case DType::float8_e4m3fn:
          dequantise<E, Float8E4M3>(rows, index, scale, buffer);
          break;
        default:
          dequantise<E, Float8E5M2>(rows, index, scale, buffer);
      }
      return buffer;
    }
  }
  const auto* row = at<typename E::Source>(rows.data, index);
  return rows.strides[3] == 1 ? row : gather_row(row, rows.strides[3], rows.columns, buffer);
}

// Asks for the row that is read kPrefetchRows later.
template <class E>
FASTATTN_INLINE void prefetch_later(const AttentionParams& p, const StoredRows& rows, int64_t batch, int64_t head,
                                    int64_t key) {
  const int64_t later = key + kPrefetchRows;
  if (later < existing_keys(p, batch)) {
    const int64_t size = is_quantised(p) ? 1 : static_cast<int64_t>(sizeof(typename E::Source));
    prefetch_row(static_cast<const char*>(rows.data) + row_index(p, rows.strides, batch, head, later) * size,
                 rows.columns * size);
  }
}

// Method::rows: rows as they are stored, without their scales.
template <class E>
FASTATTN_NOINLINE void copy_rows(const AttentionParams& p, const StoredRows& rows, int64_t batch, int64_t head,
                                 int64_t begin, int64_t end, int64_t row_bytes, const bool* skip, char* out) {
  using Stored = typename E::Stored;
  for (int64_t key = begin; key < min64(end, p.seqlen_k); ++key, out += row_bytes) {
    if (skip != nullptr && skip[key - begin]) {
      memset(out, 0, static_cast<size_t>(row_bytes));
      continue;
    }
    gather_row(at<Stored>(rows.data, row_index(p, rows.strides, batch, head, key)), rows.strides[3], rows.columns,
               reinterpret_cast<Stored*>(out));
  }
}

// Packs keys [begin, end) of one head to `out`; `end` is padded with zero rows to a multiple of kKeys.
template <class E>
FASTATTN_NOINLINE void pack_keys(const AttentionParams& p, int64_t batch, int64_t head, int64_t begin, int64_t end,
                                 int64_t row_bytes, char* out) {
  using V = typename E::V;
  using Source = typename E::Source;
  const StoredRows keys = StoredRows::keys(p);
  if constexpr (E::kMethod == Method::rows) {
    copy_rows<E>(p, keys, batch, head, begin, end, row_bytes, nullptr, out);
    return;
  } else {
    Source buffer[kMaxHeadDim];
    const int64_t stop = min64(end, p.seqlen_k);
    for (int64_t key = begin; key < stop; ++key, out += row_bytes) {
      const Source* row = read_row<E>(p, keys, batch, head, key, buffer);
      auto* to = reinterpret_cast<typename E::Element*>(out);
      if constexpr (E::kConvert) {
        int64_t d = 0;
        for (; d + E::kWidth <= p.head_dim; d += E::kWidth) {
          V::store(to + d, V::load(row + d));
        }
        if (d < p.head_dim) {
          const int rest = static_cast<int>(p.head_dim - d);
          V::store_partial(to + d, V::load_partial(row + d, rest), rest);
        }
      } else {
        memcpy(to, row, p.head_dim * sizeof(Source));
        for (int64_t d = p.head_dim; d < round_up(p.head_dim, E::kDimMultiple); ++d) {
          to[d] = Source{};
        }
      }
    }
    memset(out, 0, static_cast<size_t>((round_up(end, E::kKeys) - max64(stop, begin)) * row_bytes));
  }
}

// Packs one step of values, `depth` rows, to `out`.
template <class E>
FASTATTN_INLINE void pack_value_step(const typename E::Source* const (&rows)[E::kDepth], int64_t value_dim, char* out) {
  using V = typename E::V;
  auto* to = reinterpret_cast<typename E::Scalar*>(out);
  for (int64_t d = 0; d < value_dim; d += E::kWidth) {
    const int count = static_cast<int>(min64(E::kWidth, value_dim - d));
    if constexpr (E::kDepth == 2) {
      V::store(to + d, V::interleave(rows[0] + d, rows[1] + d, count));
    } else if constexpr (E::kMethod == Method::broadcast) {
      V::store(to + d, count == E::kWidth ? V::load(rows[0] + d) : V::load_partial(rows[0] + d, count));
    }
  }
}

// Packs values [begin, end) of one head; steps past the last key are zero, and so are keys with skip[key - begin].
template <class E>
FASTATTN_NOINLINE void pack_values(const AttentionParams& p, int64_t batch, int64_t head, int64_t begin, int64_t end,
                                   int64_t row_bytes, const bool* skip, char* out) {
  using Source = typename E::Source;
  if constexpr (E::kMethod == Method::rows) {
    copy_rows<E>(p, StoredRows::values(p), batch, head, begin, end, row_bytes, skip, out);
    return;
  }
  const StoredRows values = StoredRows::values(p);
  static const Source kZeros[kMaxValueDim] = {};
  Source gathered[E::kDepth][kMaxValueDim];
  const int64_t stop = min64(end, p.seqlen_k);
  // A matrix unit reads a group of steps at once: columns of it, see pack_value_group.
  constexpr int kGroup = E::kMethod == Method::tiles ? E::kWidth : 1;
  alignas(64) typename E::Scalar steps[kGroup][E::kMethod == Method::tiles ? kMaxValueDim : 1];
  const int64_t last = begin + round_up(end - begin, E::kKeys);
  int filled = 0;
  for (int64_t key = begin; key < last; key += E::kDepth) {
    const Source* rows[E::kDepth];
    for (int i = 0; i < E::kDepth; ++i) {
      const bool there = key + i < stop && (skip == nullptr || !skip[key + i - begin]);
      rows[i] = there ? read_row<E>(p, values, batch, head, key + i, gathered[i]) : kZeros;
      prefetch_later<E>(p, values, batch, head, key + i);
    }
    if constexpr (E::kMethod == Method::tiles) {
      pack_value_step<E>(rows, p.value_dim, reinterpret_cast<char*>(steps[filled]));
      if (++filled == kGroup) {
        E::pack_value_group(steps, padded_value_dim<E>(p), key + E::kDepth - kGroup * E::kDepth - begin, out);
        filled = 0;
      }
    } else {
      pack_value_step<E>(rows, p.value_dim, out);
      out += row_bytes;
    }
  }
}

// The view of one head where it lies, or where `keys` keys of it have been packed at `packed`. Rows in pages are found
// through a table, or packed.
template <class E>
inline KeyValueView whole_view(const AttentionParams& p, const OperandLayout& layout, int64_t batch, int64_t head,
                               const char* packed, int64_t keys) {
  KeyValueView view{};
  view.start = 0;
  view.key_stride =
      layout.pack_key ? layout.key_row_bytes : p.key_strides[2] * static_cast<int64_t>(sizeof(typename E::Source));
  view.value_stride = layout.pack_value ? layout.value_row_bytes
                                        : p.value_strides[2] * static_cast<int64_t>(sizeof(typename E::Source));
  const bool lies = existing_keys(p, batch) > 0 && p.block_table == nullptr && p.kv_dtype == p.dtype;
  const auto* first_key = lies ? reinterpret_cast<const char*>(key_row<E>(p, batch, head, 0)) : nullptr;
  const auto* first_value = lies ? reinterpret_cast<const char*>(value_row<E>(p, batch, head, 0)) : nullptr;
  view.key = layout.pack_key ? packed : first_key;
  const char* packed_value = packed + (layout.pack_key ? keys * layout.key_row_bytes : 0);
  view.value = layout.pack_value ? packed_value : first_value;
  return view;
}

}  // namespace
}  // namespace fastattn
