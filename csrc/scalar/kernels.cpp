// The scalar tier: attention as obvious loops in double precision, one row at a time. It is the oracle in C++ and the
// tier of last resort, compiled for any CPU. The softmax is online: sums are rescaled when the maximum moves.
#include <cmath>

#include "dispatch.h"
#include "parallel.h"
#include "scalar/backward.h"
#include "scalar/insight.h"
#include "scalar/rows.h"

namespace fastattn {
namespace {

// Sums of one row under the largest score so far.
struct Sums {
  double peak = -kInfinity;
  double total = 0;
  double output[kMaxValueDim] = {};
};

template <class T>
void add_key(const AttentionParams& p, const Row& r, int64_t key, Sums& sums) {
  const double s = score<T>(p, r, key);
  if (s > sums.peak) {
    const double rescale = std::exp(sums.peak - s);
    sums.peak = s;
    sums.total *= rescale;
    for (int64_t d = 0; d < p.value_dim; ++d) {
      sums.output[d] *= rescale;
    }
  }
  // A first score of -inf or NaN leaves the peak at -inf.
  const double prob = std::exp(s - (sums.peak == -kInfinity ? 0 : sums.peak));
  sums.total += prob;
  const double weight = prob * kept(p, r, key);
  const CachedRow row = value_row(p, r, key);
  for (int64_t d = 0; d < p.value_dim; ++d) {
    sums.output[d] += weight * load_cached<T>(p, p.value, row, p.value_strides[3], d);
  }
}

// log of the normaliser, with the sink.
double log_sum(const AttentionParams& p, const Row& r, const Sums& sums) {
  const double own = sums.total == 0 ? -kInfinity : (sums.peak == -kInfinity ? 0 : sums.peak) + std::log(sums.total);
  if (p.sinks == nullptr) {
    return own;
  }
  const double sink = p.sinks[r.head];
  const double high = own > sink ? own : sink;
  return high == -kInfinity ? high : high + std::log(std::exp(own - high) + std::exp(sink - high));
}

template <class T>
void write_row(const AttentionParams& p, const Row& r, const Sums& sums) {
  const double lse = log_sum(p, r, sums);
  const bool empty = sums.total == 0;
  // Not exp(peak - lse): where scores are near the lowest number, log(total) is lost in lse.
  const double peak = sums.peak == -kInfinity ? 0 : sums.peak;
  const double sink = p.sinks == nullptr ? -kInfinity : p.sinks[r.head];
  const double inverse = empty ? 0 : 1 / (sums.total + std::exp(sink - peak));
  for (int64_t d = 0; d < p.value_dim; ++d) {
    store<T>(p.out, offset(p.out_strides, r, d), sums.output[d] * inverse);
  }
  if (p.lse != nullptr) {
    const int64_t index = r.batch * p.lse_strides[0] + r.head * p.lse_strides[1] + r.row * p.lse_strides[2];
    if (p.dtype == DType::float64) {
      store<double>(p.lse, index, lse);
    } else {
      store<float>(p.lse, index, lse);
    }
  }
  for (int64_t key = 0; p.weights != nullptr && key < p.seqlen_k; ++key) {
    const bool seen = !empty && visible<T>(p, r, key);
    store<T>(p.weights, offset(p.weights_strides, r, key),
             seen ? std::exp(score<T>(p, r, key) - peak) * inverse * kept(p, r, key) : 0);
  }
}

template <class T>
void run_row(void* context, int64_t index, int /*thread*/) {
  const AttentionParams& p = *static_cast<const AttentionParams*>(context);
  const Row r = row_at(p, index);
  Sums sums;
  for (int64_t key = 0; key < p.seqlen_k; ++key) {
    if (visible<T>(p, r, key)) {
      add_key<T>(p, r, key, sums);
    }
  }
  write_row<T>(p, r, sums);
}

template <class T>
void forward(const AttentionParams* calls, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    AttentionParams p = calls[i];
    parallel_for(p.batch * p.query_heads * p.seqlen_q, p.num_threads, run_row<T>, &p);
  }
}

// Independent sums in plain C++: what this tier could reach.
template <class T>
double peak_fma(int64_t rounds) {
  T sum[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  volatile T seed = T(0.5);
  const T x = seed;
  for (int64_t i = 0; i < rounds; ++i) {
    for (T& s : sum) {
      s = s * x + x;
    }
  }
  volatile T kept = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
  (void)kept;
  return static_cast<double>(rounds) * 8 * 2;
}

}  // namespace

void register_scalar(KernelTable& table) {
  constexpr const char* kIsa = "scalar";
  constexpr const char* kPath = "scalar loops in double precision";
  table.set_forward(DType::float32, forward<float>, kIsa, kPath, kPath);
  table.set_forward(DType::float64, forward<double>, kIsa, kPath, kPath);
  table.set_forward(DType::bfloat16, forward<Bfloat16>, kIsa, kPath, kPath);
  table.set_forward(DType::float16, forward<Float16>, kIsa, kPath, kPath);
  table.set_quantised(DType::float32, forward<float>);
  table.set_quantised(DType::float64, forward<double>);
  table.set_quantised(DType::bfloat16, forward<Bfloat16>);
  table.set_quantised(DType::float16, forward<Float16>);
  table.set_backward(DType::float32, backward<float>);
  table.set_backward(DType::float64, backward<double>);
  table.set_backward(DType::bfloat16, backward<Bfloat16>);
  table.set_backward(DType::float16, backward<Float16>);
  table.set_insight(DType::float32, insight<float, float>);
  table.set_insight(DType::float64, insight<double, double>);
  table.set_insight(DType::bfloat16, insight<Bfloat16, float>);
  table.set_insight(DType::float16, insight<Float16, float>);
  table.peak_fma_f32 = peak_fma<float>;
  table.peak_fma_f64 = peak_fma<double>;
}

}  // namespace fastattn
