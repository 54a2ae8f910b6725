// What the tiles of a call share, what a panel sees of one, and where a tile finds its operands.
#pragma once

#include "algorithm/panel.h"
#include "dropout.h"

namespace fastattn {
namespace {

// What a tile needs besides scores.
enum class TileKind {
  plain,            // every lane sees every key, nothing is added
  masked,           // some lanes do not see some keys
  adjusted,         // bias, ALiBi, softcap
  adjusted_masked,  // these, and some lanes do not see some keys
};

constexpr bool adjusts(TileKind kind) { return kind == TileKind::adjusted || kind == TileKind::adjusted_masked; }
constexpr bool hides(TileKind kind) { return kind == TileKind::masked || kind == TileKind::adjusted_masked; }

// Every lane's bit.
template <class E>
constexpr uint32_t kAllLanes = E::kLanes == 32 ? ~0U : (1U << E::kLanes) - 1U;

// How much of a tile the rows of a panel see. A tile at the edge of what the rule, the window or the length lets some
// row see is `edge`; within them, `holes` has keys that the dense arguments hide.
enum class Sight : uint8_t { none, edge, holes, all };

// Terms of the dense arguments over one key block, transposed so that lanes are lanes.
template <class E>
struct DenseBlock {
  const uint32_t* visible;         // null, or a bit for each lane, [kBlockKeys]
  const Sight* sights;             // null, or what these bits let through, [kBlockKeys / kKeys]
  const typename E::Scalar* bias;  // null, or [kBlockKeys][kLanes]
};

// What the score tiles of one call share.
template <class E>
struct ScoreRules {
  using Scalar = typename E::Scalar;
  int64_t steps;   // lanes of operands a row: padded D / depth
  Scalar factor;   // multiplies the products; 1 where the scale went into the query
  Scalar softcap;  // 0 = none
  bool alibi;
  Dropout dropout;        // tiles that drop are adjusted ones
  int64_t output_stride;  // padded Dv
  bool natural;           // scores are natural logarithms (adjusted tiles), else to base 2

  double to_log2() const { return natural ? kLog2E : 1.0; }
  double to_natural() const { return natural ? 1.0 : kLn2; }
};

// Where a tile finds its operands and leaves its probabilities.
template <class E>
struct TileContext {
  Panel<E>& panel;
  const ScoreRules<E>& rules;
  DenseBlock<E> dense;
  typename E::Scalar* probs;                        // [strip][kBlockKeys / depth][kRows] lanes of operands
  typename E::Scalar* kept;                         // room for what dropout multiplies a tile by, [key][lane]
  typename E::Scalar* raw;                          // Method::tiles: the block's products, [key][lane]
  bool edge;                                        // the tile reaches past what some lane may see by the rules
  int64_t written;                                  // first key of the block whose probabilities have been written
  alignas(64) typename E::Scalar peaks[E::kLanes];  // largest scores of the block
  Fetch fetch{};                                    // Method::rows
};

// The rows of one tile of keys.
struct TileRows {
  const char* rows;
  int64_t stride;
};

template <class E>
using TileFn = void (*)(TileContext<E>& context, TileRows key, int64_t block_key);
template <class E>
using PassFn = void (*)(TileContext<E>& context, int64_t block_key);

// Scores of a group of keys by the panel's first kActive vectors of queries.
template <class E, int kActive>
using Scores = typename E::Reg[E::kGroupKeys][kActive];

}  // namespace
}  // namespace fastattn
