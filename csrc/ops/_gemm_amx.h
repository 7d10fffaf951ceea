// Matrix products on tiles (simd/tile.h): bfloat16, and float16 as two bfloat16 parts. Included by _gemm_run.h only.
//
// c [left][right] = left [rows][k] x right [k][columns]. Each operand of y = a @ b can take either side, because
// products commute and both sides sum in the same order: `swapped` computes y's transpose. The left side is read where
// it lies if its k is contiguous (a tile is 16 rows of 64 bytes, whatever their distance); the right side is packed
// into pairs of k. So a weight [n, k] of a `linear` goes left and is never copied while the rows of x are fewer.
//
// Accumulation: k in blocks of 32, block after block into the accumulator, in the order that tile.h tells for one
// block. Sums that go through memory go on where they were. So an element's bits depend on its row of a, its column
// of b and nothing else: not on m, n, the batch, the strides, the sides, the blocking or the number of threads. A k
// that is no multiple of 32 is filled up with zeros.
//
// A b that is made where it is used (Gemm::make_b) is packed from a block in L1; made by columns it goes left, as it is.
//
// A task is a block of the left side times a block of the right one. For each chunk of k: the right block lies packed
// in L2; panels of 32 left rows pass over it, 2 x 2 tiles at a time, while the next panel is fetched.
#pragma once
#include "base/cpu.h"
#include "base/parallel.h"
#include "base/scratch.h"
#include "ops/_gemm.h"
#include "ops/_gemm_pack.h"
#include "simd/tile.h"

#if ISOTILE_HAS_TILES

namespace isotile {
namespace ISOTILE_ISA {

constexpr int64_t kTileSide = 16;       // rows of a left tile, columns of a right one
constexpr int64_t kTileK = 32;          // k of both
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kPanelSide = 32;      // two tiles

struct Bf16Tiles {
  using Src = BFloat16;
  static constexpr int kParts = 1;
  struct Words {
    __m512i part[kParts];
  };
  // The elements of a block's 32 that are word r.
  static constexpr int64_t low(int64_t r) { return 2 * r; }
  static constexpr int64_t high(int64_t r) { return 2 * r + 1; }
  // Columns 0 - 15 and 16 - 31 of two steps of k.
  static ISOTILE_INLINE void interleave(__m512i first, __m512i second, __m512i* out) {
    using I = Vec<int32_t>;  // element j of the first operand, element j of the second: as words
    const I both = I::iota(0) * I::set1(0x10001) + I::set1(0x200000);
    out[0] = _mm512_permutex2var_epi16(first, both.v, second);
    out[1] = _mm512_permutex2var_epi16(first, (both + I::set1(0x100010)).v, second);
  }
  struct Loader {
    ISOTILE_INLINE Words load(const Src* p, __mmask32 mask) { return {{_mm512_maskz_loadu_epi16(mask, p)}}; }
    ISOTILE_INLINE Words load(const Src* p) { return {{_mm512_loadu_si512(p)}}; }
    ISOTILE_INLINE bool all_finite() const { return true; }
  };
};

// float16's 11 significant bits are bfloat16's 8 and a rest of 3; the range fits too, down to the subnormals. So the
// four products of the parts are the exact product. Only infinity and NaN have no rest: run_tiled() tells. Words pair
// elements 16 apart, which saves the shuffles.
struct F16Tiles {
  using Src = Float16;
  static constexpr int kParts = 2;
  struct Words {
    __m512i part[kParts];
  };
  static constexpr int64_t low(int64_t r) { return r; }
  static constexpr int64_t high(int64_t r) { return r + 16; }
  static ISOTILE_INLINE void interleave(__m512i first, __m512i second, __m512i* out) {
    out[0] = lower_halves(first, second);
    out[1] = upper_halves(first, second);
  }
  struct Loader {
    __m512i largest = _mm512_setzero_si512();  // magnitudes' bits, shifted left by one

    ISOTILE_INLINE Words load(const Src* p, __mmask32 mask) {
      const __m512i halves = _mm512_maskz_loadu_epi16(mask, p);
      return split(halves, _mm512_castsi512_si256(halves), _mm512_extracti64x4_epi64(halves, 1));
    }
    ISOTILE_INLINE Words load(const Src* p) {
      const auto* half = reinterpret_cast<const __m256i*>(p);
      return split(_mm512_loadu_si512(p), _mm256_loadu_si256(half), _mm256_loadu_si256(half + 1));
    }
    ISOTILE_INLINE bool all_finite() const {
      return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(static_cast<short>(0xf800))) == 0;
    }

   private:
    ISOTILE_INLINE Words split(__m512i halves, __m256i half0, __m256i half1) {
      largest = _mm512_max_epu16(largest, _mm512_add_epi16(halves, halves));
      const __m512i x0 = _mm512_castps_si512(_mm512_cvtph_ps(half0)), x1 = _mm512_castps_si512(_mm512_cvtph_ps(half1));
      return {{upper_halves(x0, x1), upper_halves(rest(x0), rest(x1))}};
    }
    // Without the bits that upper_halves() takes.
    static ISOTILE_INLINE __m512i rest(__m512i x) {
      const __m512 first = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(kUpper)));
      return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(x), first));
    }
  };

 private:
  static constexpr int kUpper = static_cast<int>(0xffff0000);
  // Words of the upper halves of x0 (low) and x1 (high).
  static ISOTILE_INLINE __m512i upper_halves(__m512i x0, __m512i x1) {
    // 0xd8: the last operand chooses between the second (1) and the first (0), bit by bit
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(x0, 16), x1, _mm512_set1_epi32(kUpper), 0xd8);
  }
  static ISOTILE_INLINE __m512i lower_halves(__m512i x0, __m512i x1) {
    return _mm512_ternarylogic_epi32(x0, _mm512_slli_epi32(x1, 16), _mm512_set1_epi32(kUpper), 0xd8);
  }
};

// One side of a product: row i (of a, or column i of b) starts at data + rows.at(i).
template <class Kind>
struct Side {
  const typename Kind::Src* data;
  const IndexMap* rows;
  int64_t k, depth;  // stride of k, how many there are

  bool direct() const { return Kind::kParts == 1 && k == 1 && rows->even(); }
};

ISOTILE_INLINE __mmask32 first_of_32(int64_t n) {
  return n >= 32 ? ~__mmask32{0} : n <= 0 ? 0 : (__mmask32{1} << n) - 1;
}

ISOTILE_INLINE void store_turned(__m512 (&words)[16], char* out) {
  transpose_16x16(words);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_ps(out + 64 * i, words[i]);
}

// Rows [first, first + count) of a side, k in [k0, k0 + kc), as panels of 32 rows [k block][tile][part], `panel_bytes`
// from one to the next; the last has one tile if that is enough. left: tiles of rows; else pairs of k. Returns whether
// the kind cannot do the products of an element.
template <class Kind>
inline bool pack_side(const Side<Kind>& side, int64_t first, int64_t count, int64_t k0, int64_t kc, bool left,
                      char* out, int64_t panel_bytes) {
  using Src = typename Kind::Src;
  constexpr int kParts = Kind::kParts;
  typename Kind::Loader loader;
  const int64_t blocks = ceil_div(kc, kTileK), panels = ceil_div(count, kPanelSide);
  const auto tiles_of = [&](int64_t panel) { return count - panel * kPanelSide > kTileSide ? 2 : 1; };
  if (side.k != 1 && side.rows->even() && side.rows->step() == 1) {  // rows next to each other: pairs of whole lines
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t k_left = kc - block * kTileK;
      const Src* from = side.data + first + (k0 + block * kTileK) * side.k;
      const bool ahead = k0 + (block + 2) * kTileK <= side.depth;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const __mmask32 mask = first_of_32(count - panel * kPanelSide);
        const int tiles = tiles_of(panel);
        alignas(64) char pairs[2][kParts][kTileBytes];
        char* to = out + panel * panel_bytes + block * tiles * kParts * kTileBytes;
        for (int64_t r = 0; r < 16; ++r) {
          const Src* p = from + panel * kPanelSide + Kind::low(r) * side.k;
          const Src* q = from + panel * kPanelSide + Kind::high(r) * side.k;
          if (ahead) {
            __builtin_prefetch(p + kTileK * side.k, 0, 2);
            __builtin_prefetch(q + kTileK * side.k, 0, 2);
          }
          const auto first_k = loader.load(p, Kind::low(r) < k_left ? mask : 0);
          const auto second_k = loader.load(q, Kind::high(r) < k_left ? mask : 0);
#pragma GCC unroll 2
          for (int part = 0; part < kParts; ++part) {
            __m512i words[2];
            Kind::interleave(first_k.part[part], second_k.part[part], words);
            if (left) {
              _mm512_store_si512(pairs[0][part] + 64 * r, words[0]);
              _mm512_store_si512(pairs[1][part] + 64 * r, words[1]);
            } else {
              _mm512_store_si512(to + part * kTileBytes + 64 * r, words[0]);
              if (tiles == 2) _mm512_store_si512(to + (kParts + part) * kTileBytes + 64 * r, words[1]);
            }
          }
        }
        if (!left) continue;
        for (int tile = 0; tile < tiles; ++tile)
          for (int part = 0; part < kParts; ++part) {
            __m512 words[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) words[i] = _mm512_load_ps(pairs[tile][part] + 64 * i);
            store_turned(words, to + (tile * kParts + part) * kTileBytes);
          }
      }
    }
    return !loader.all_finite();
  }
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int tiles = tiles_of(panel);
    for (int tile = 0; tile < tiles; ++tile) {
      const int64_t row = panel * kPanelSide + tile * kTileSide, some = least(count - row, kTileSide);
      const Src* rows[16];
      for (int64_t i = 0; i < 16; ++i)
        rows[i] = side.data + side.rows->at(first + row + (i < some ? i : 0)) + k0 * side.k;
      char* to = out + panel * panel_bytes + tile * kParts * kTileBytes;
      for (int64_t block = 0; block < blocks; ++block, to += tiles * kParts * kTileBytes) {
        const int64_t k_left = kc - block * kTileK;
        const __mmask32 mask = first_of_32(k_left);
        const Src* at[16];
        Src lines[16][kTileK];
        for (int64_t i = 0; i < 16; ++i) at[i] = rows[i] + block * kTileK * side.k;
        if (side.k != 1) {
          for (int64_t i = 0; i < some; ++i) {
            for (int64_t k = 0; k < least(kTileK, k_left); ++k) lines[i][k] = at[i][k * side.k];
            at[i] = lines[i];
          }
        }
        if (left) {
          for (int64_t i = 0; i < 16; ++i) {
            const auto loaded = loader.load(at[i], i < some ? mask : 0);
            for (int part = 0; part < kParts; ++part)
              _mm512_store_si512(to + part * kTileBytes + 64 * i, loaded.part[part]);
          }
          continue;
        }
        __m512 words[kParts][16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) {
          const auto loaded = loader.load(at[i], i < some ? mask : 0);
#pragma GCC unroll 2
          for (int part = 0; part < kParts; ++part) words[part][i] = _mm512_castsi512_ps(loaded.part[part]);
        }
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) store_turned(words[part], to + part * kTileBytes);
      }
    }
  }
  return !loader.all_finite();
}

// Left rows where the kernel finds them: whole blocks of k, then at most one packed block.
struct LeftRows {
  const char* data;
  int64_t row_bytes, tile_bytes, block_bytes;  // from one row, tile, block of k to the next
  int64_t blocks;
  const char* tail;
};

// What a kernel does between its products. Fetches what comes next:
struct FetchAhead {
  Prefetch prefetch;
  ISOTILE_INLINE void first() {}
  ISOTILE_INLINE const char* next(int64_t block, const LeftRows& left) {
    prefetch.next();
    return left.data + block * left.block_bytes;
  }
};
// or packs its own left side besides, one block ahead: whole rows next to each other in k, and whole tiles. If nobody
// wants them again, into the same few blocks, so that L1 is enough for the rest.
template <class Kind, int kLeft>
struct PackAhead {
  static constexpr int64_t kAgain = 4;
  const typename Kind::Src* from;
  int64_t stride, blocks;
  char* to;
  bool keep;
  Prefetch* prefetch;
  typename Kind::Loader loader;

  ISOTILE_INLINE char* place(int64_t block) const {
    return to + (keep ? block : block % kAgain) * kLeft * Kind::kParts * kTileBytes;
  }
  ISOTILE_INLINE void pack(int64_t block) {
    char* out = place(block);
    for (int tile = 0; tile < kLeft; ++tile)
#pragma GCC unroll 16
      for (int row = 0; row < 16; ++row) {
        const auto words = loader.load(from + (16 * tile + row) * stride + block * kTileK);
#pragma GCC unroll 2
        for (int part = 0; part < Kind::kParts; ++part)
          _mm512_store_si512(out + (tile * Kind::kParts + part) * kTileBytes + 64 * row, words.part[part]);
      }
  }
  ISOTILE_INLINE void first() { pack(0); }
  ISOTILE_INLINE const char* next(int64_t block, const LeftRows&) {
    prefetch->next();
    if (block + 1 < blocks) pack(block + 1);
    return place(block);
  }
};

// c [kLeft tiles][kRight tiles], row stride ldc, = or += the product. right: blocks of [kRight][part] tiles.
// Accumulator 2 l + r, left tiles 4 and 5, right tiles 6 and 7. Two parts: high(a) high(b), high(a) low(b), low(a)
// low(b), low(a) high(b), in this order whichever side a is on.
template <class Kind, int kLeft, int kRight, bool kSwapped, class Between>
inline void multiply_tiles(const LeftRows& left, const char* right, float* c, int64_t ldc, bool add,
                           Between* between) {
  using namespace tiles;
  constexpr int kParts = Kind::kParts;
  between->first();
  if (add) {
    tiles::load<0>(c, 4 * ldc);
    if constexpr (kRight == 2) tiles::load<1>(c + 16, 4 * ldc);
    if constexpr (kLeft == 2) tiles::load<2>(c + 16 * ldc, 4 * ldc);
    if constexpr (kLeft == 2 && kRight == 2) tiles::load<3>(c + 16 * ldc + 16, 4 * ldc);
  } else {
    zero<0>(), zero<1>(), zero<2>(), zero<3>();
  }
  const auto block = [](const char* l, int64_t row_bytes, int64_t tile_bytes, const char* r)
                         __attribute__((always_inline)) {
    const auto load_left = [&](int part) __attribute__((always_inline)) {
      tiles::load<4>(l + part * kTileBytes, row_bytes);
      if constexpr (kLeft == 2) tiles::load<5>(l + part * kTileBytes + tile_bytes, row_bytes);
    };
    const auto load_right = [&](int part) __attribute__((always_inline)) {
      tiles::load<6>(r + part * kTileBytes, 64);
      if constexpr (kRight == 2) tiles::load<7>(r + (kParts + part) * kTileBytes, 64);
    };
    const auto multiply = [] {
      dot_bf16<0, 4, 6>();
      if constexpr (kRight == 2) dot_bf16<1, 4, 7>();
      if constexpr (kLeft == 2) dot_bf16<2, 5, 6>();
      if constexpr (kLeft == 2 && kRight == 2) dot_bf16<3, 5, 7>();
    };
    load_right(0);
    load_left(0);
    multiply();
    if constexpr (kParts == 2) {
      const auto then = [&](bool right_side, int part) __attribute__((always_inline)) {
        if (right_side) load_right(part);
        else load_left(part);
        multiply();
      };
      then(!kSwapped, 1);
      then(kSwapped, 1);
      then(!kSwapped, 0);
    }
  };
  for (int64_t i = 0; i < left.blocks; ++i, right += kRight * kParts * kTileBytes)
    block(between->next(i, left), left.row_bytes, left.tile_bytes, right);
  if (left.tail != nullptr) block(left.tail, 64, kTileBytes, right);
  tiles::store<0>(c, 4 * ldc);
  if constexpr (kRight == 2) tiles::store<1>(c + 16, 4 * ldc);
  if constexpr (kLeft == 2) tiles::store<2>(c + 16 * ldc, 4 * ldc);
  if constexpr (kLeft == 2 && kRight == 2) tiles::store<3>(c + 16 * ldc + 16, 4 * ldc);
}

// Of one product, how its sides are taken and cut.
struct TiledPlan {
  bool swapped;
  int64_t left_block, right_block;  // of a task: rows, columns; multiples of 64 or everything
  int64_t chunk;                    // of k, a multiple of kTileK
  bool* not_finite;                 // set where a side holds what the kind cannot multiply

  void tell_not_finite() const { __atomic_store_n(not_finite, true, __ATOMIC_RELAXED); }
};

template <class Kind>
struct TiledSides {
  Side<Kind> left, right;
  IndexMap columns;  // of b
  int64_t left_count, right_count;

  TiledSides(const TiledSides&) = delete;  // the sides point to `columns`
  TiledSides(const Gemm& g, bool swapped) {
    using Src = typename Kind::Src;
    columns.append(g.n, g.b_n);
    const Side<Kind> a{static_cast<const Src*>(g.a.data) + g.a.offset, &g.a.rows, g.a.col, g.k};
    const Side<Kind> b{static_cast<const Src*>(g.b) + g.b_offset, &columns, g.b_k, g.k};
    left = swapped ? b : a;
    right = swapped ? a : b;
    left_count = swapped ? g.n : g.m;
    right_count = swapped ? g.m : g.n;
  }
};

constexpr int64_t kMadeK = 256;                // elements of a row that are made at a time
constexpr int64_t kMadeRow = kMadeK + kTileK;  // an odd number of lines, which spreads over L1's sets
constexpr int64_t kPanelsWorthPacking = 8;     // of the right side
constexpr int64_t kFinishSide = 64;            // of y's columns, at a time

template <class Kind>
constexpr int64_t kBlockBytes = 2 * kTileBytes * Kind::kParts;  // of a panel, one block of k

// Bytes of a packed side with `count` rows and `k`.
template <class Kind>
inline int64_t packed_bytes(int64_t count, int64_t k) {
  return ceil_div(count, kPanelSide) * ceil_div(k, kTileK) * kBlockBytes<Kind>;
}

// c [rows][columns] -> out [columns][rows]; whole tiles of both are touched.
inline void transpose_group(const float* c, int64_t ldc, int64_t rows, int64_t columns, float* out, int64_t ldo) {
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; j += 16) {
      __m512 words[16];
#pragma GCC unroll 16
      for (int w = 0; w < 16; ++w) words[w] = _mm512_load_ps(c + (i + w) * ldc + j);
      transpose_16x16(words);
#pragma GCC unroll 16
      for (int w = 0; w < 16; ++w) _mm512_store_ps(out + (j + w) * ldo + i, words[w]);
    }
}

// Columns [r, r + count) of a right side, k in [k0, k0 + kc), packed as pack_side() does.
template <class Kind>
inline bool pack_right(const Gemm& g, const Side<Kind>& side, int64_t r, int64_t count, int64_t k0, int64_t kc,
                       char* out, int64_t panel_bytes) {
  if (!g.made_by_rows) return pack_side(side, r, count, k0, kc, false, out, panel_bytes);
  if constexpr (Kind::kParts == 1) {
    Scratch<BFloat16> block(kTileK * kMadeRow);
    IndexMap rows;
    rows.append(kMadeK, 1);
    for (int64_t k = 0; k < kc; k += kTileK) {
      const int64_t depth = least(kTileK, kc - k);
      const Side<Kind> made{block.data(), &rows, kMadeRow, depth};
      for (int64_t j = 0; j < count; j += kMadeK) {
        const int64_t columns = least(kMadeK, count - j);
        g.make_b(g.b, k0 + k, depth, r + j, columns, block.data(), kMadeRow);
        for (int64_t c = 0; c < columns;) {  // a last panel of one tile has a step of its own from block to block
          const int64_t left = columns - c, lone = left % kPanelSide;
          const int64_t now = lone > 0 && lone <= kTileSide && left > kPanelSide ? left - lone : left;
          const int64_t tiles = now > kTileSide ? 2 : 1;
          pack_side(made, c, now, 0, depth, false,
                    out + (j + c) / kPanelSide * panel_bytes + k / kTileK * tiles * kTileBytes, panel_bytes);
          c += now;
        }
      }
    }
  }
  return false;
}

// Rows [l0, l1) of the left side x columns [r0, r1) of the right one. shared: the whole right side, packed chunk after
// chunk, or null to pack the block here.
template <class Kind, bool kSwapped>
inline void run_tiled_task(const Gemm& g, const TiledPlan& plan, int64_t l0, int64_t l1, int64_t r0, int64_t r1,
                           const char* shared) {
  // A group is what is finished at once: 64 columns of y.
  constexpr int64_t kLeftGroup = kSwapped ? kFinishSide : kPanelSide, kRightGroup = kSwapped ? kPanelSide : kFinishSide;
  constexpr int64_t kGroup = kLeftGroup * kRightGroup;
  static constexpr tiles::Config kWhole = tiles::Config::uniform();
  const TiledSides<Kind> sides(g, kSwapped);
  const int64_t columns = r1 - r0, right_panels = ceil_div(columns, kPanelSide);
  const int64_t right_groups = ceil_div(columns, kRightGroup), left_groups = ceil_div(l1 - l0, kLeftGroup);
  const int64_t chunk = least(plan.chunk, ceil_div(g.k, kTileK) * kTileK), chunks = g.k == 0 ? 1 : ceil_div(g.k, chunk);
  // Rows far apart are slow to load as tiles, and collide in L1: where enough panels pass over them they are packed.
  const bool made = kSwapped && g.make_b != nullptr, readable = !made && sides.left.direct(), keep = chunks > 1;
  const bool direct = readable && right_panels < kPanelsWorthPacking;

  Scratch<char> right_packed(shared == nullptr ? packed_bytes<Kind>(columns, chunk) : 0);
  // A packed left panel takes little of L1; the sums of its whole group wait then.
  const bool pack_ahead = !direct && !made && sides.left.k == 1 && sides.left.rows->even();
  // The hardware's own prefetch ends with a page, and so serves long rows only.
  const bool short_rows = pack_ahead && right_panels == 1 && 2 * g.k <= 4096;
  const int64_t left_k = readable || (pack_ahead && right_panels == 1) ? most(chunk, 1) : kMadeK;
  const int64_t left_bytes = direct ? kBlockBytes<Kind>
                             : made ? kPanelSide * kMadeRow * 2
                                    : packed_bytes<Kind>(kPanelSide, least(chunk, left_k));
  Scratch<char> left_packed(2 * left_bytes);
  Scratch<float> sums((keep ? left_groups : 1) * right_groups * kGroup);
  Scratch<float> turned(kSwapped ? kGroup : 0);

  tiles::Config tail_config = kWhole;  // the last panel's rows are as many as there are
  const int64_t tail_rows = (l1 - l0) % kPanelSide, tail0 = least(tail_rows, kTileSide), tail1 = tail_rows - tail0;
  if (tail_rows > 0) {
    for (int t = 0; t < 6; ++t)
      tail_config.set(t, static_cast<int>(t < 2 || t == 4 ? tail0 : most(tail1, 1)), tiles::kBytes);
  }
  tiles::Scope scope(kWhole);

  for (int64_t k0 = 0, index = 0; index < chunks; k0 += chunk, ++index) {
    const int64_t kc = least(chunk, g.k - k0), blocks = ceil_div(kc, kTileK), panel_bytes = blocks * kBlockBytes<Kind>;
    const bool first = index == 0, last = index + 1 == chunks;
    const char* right = right_packed.data();
    const auto pack = [&](const Side<Kind>& side, int64_t from, int64_t count, int64_t k, int64_t length, bool left,
                          char* to, int64_t bytes) {
      if (pack_side(side, from, count, k, length, left, to, bytes)) plan.tell_not_finite();
    };
    if (shared == nullptr && pack_right(g, sides.right, r0, columns, k0, kc, right_packed.data(), panel_bytes))
      plan.tell_not_finite();
    if (shared != nullptr) right = shared + packed_bytes<Kind>(sides.right_count, k0) + r0 / kPanelSide * panel_bytes;

    // Left rows [l, l + rows), at most a panel; k in [k0 + from, k0 + from + length).
    // ahead: the first kernel packs them.
    const auto left_rows = [&](int64_t l, int64_t rows, int64_t from, int64_t length, bool ahead, char* packed) {
      const int64_t tiles = rows > kTileSide ? 2 : 1, row_bytes = sides.left.rows->step() * 2;
      if (made) {
        g.make_b(g.b, l, rows, k0 + from, length, reinterpret_cast<BFloat16*>(packed), kMadeRow);
        return LeftRows{packed, 2 * kMadeRow, 16 * 2 * kMadeRow, 2 * kTileK, ceil_div(length, kTileK), nullptr};
      }
      if (!direct) {
        if (!ahead) pack(sides.left, l, rows, k0 + from, length, true, packed, left_bytes);
        return LeftRows{packed, 64, kTileBytes * Kind::kParts, tiles * kTileBytes * Kind::kParts,
                        ceil_div(length, kTileK), nullptr};
      }
      const int64_t whole = length / kTileK;
      const char* data = reinterpret_cast<const char*>(sides.left.data + k0 + from) + l * row_bytes;
      LeftRows found{data, row_bytes, 16 * row_bytes, 2 * kTileK, whole, nullptr};
      if (whole * kTileK < length) {
        pack(sides.left, l, rows, k0 + from + whole * kTileK, length - whole * kTileK, true, packed, left_bytes);
        found.tail = packed;
      }
      return found;
    };

    for (int64_t l = l0; l < l1;) {
      // Whole panels by twos, so that the configuration changes once.
      const int64_t panels = kLeftGroup > kPanelSide && l1 - l >= kLeftGroup ? kLeftGroup / kPanelSide : 1;
      const int64_t group_rows = least(l1 - l, panels * kPanelSide), group = (l - l0) / kPanelSide;
      const int64_t rows_of_last = group_rows - (panels - 1) * kPanelSide;
      scope.use(rows_of_last < kPanelSide ? tail_config : kWhole);
      const auto packs_ahead = [&](int64_t panel, int64_t length) {
        return pack_ahead && (panel + 1 < panels || rows_of_last == kPanelSide) && length % kTileK == 0 && length > 0;
      };
      for (int64_t from = 0; from == 0 || from < kc; from += left_k) {
        const int64_t length = least(left_k, kc - from);
        LeftRows left[2];
        for (int64_t p = 0; p < panels; ++p)
          left[p] = left_rows(l + p * kPanelSide, p + 1 < panels ? kPanelSide : rows_of_last, from, length,
                              packs_ahead(p, length), left_packed.data() + p * left_bytes);
        FetchAhead fetch;
        Prefetch& prefetch = fetch.prefetch;
        if ((readable || short_rows) && l + group_rows < l1) {
          const int64_t step = sides.left.rows->step();
          prefetch.row = reinterpret_cast<const char*>(sides.left.data + (l + group_rows) * step + k0 + from);
          prefetch.row_stride = 2 * step;
          prefetch.row_lines = ceil_div(2 * length, 64);
          prefetch.rows_left = least(group_rows, l1 - l - group_rows);
          const int64_t calls = most(1, right_panels * panels * ceil_div(length, kTileK));
          prefetch.per_call = ceil_div(prefetch.row_lines * prefetch.rows_left, calls);
          if (prefetch.per_call > (readable ? 16 : 32)) prefetch.rows_left = 0;  // the hardware's own will do
        }
        for (int64_t rg = 0; rg < right_groups; ++rg) {
          float* c = sums.data() + (keep ? group * right_groups * kPanelSide * kRightGroup : 0);
          if (keep || left_k < kc) c += rg * panels * kPanelSide * kRightGroup;
          const int64_t group_columns = least(columns - rg * kRightGroup, kRightGroup);
          for (int64_t p = 0; p < panels; ++p) {
            const bool two_left = p + 1 < panels || rows_of_last > kTileSide;
            for (int64_t rp = 0; rp * kPanelSide < group_columns; ++rp) {
              const bool two_right = group_columns - rp * kPanelSide > kTileSide;
              const char* right_panel = right + (rg * (kRightGroup / kPanelSide) + rp) * panel_bytes +
                                        from / kTileK * (two_right ? 2 : 1) * kTileBytes * Kind::kParts;
              float* at = c + p * kPanelSide * kRightGroup + rp * kPanelSide;
              const bool add = !first || from > 0;
              if (rg == 0 && rp == 0 && packs_ahead(p, length)) {
                PackAhead<Kind, 2> packer{sides.left.data + (l + p * kPanelSide) * sides.left.rows->step() + k0 + from,
                                          sides.left.rows->step(), left[p].blocks,
                                          left_packed.data() + p * left_bytes, right_panels > 1, &prefetch, {}};
                const auto multiply = two_right ? multiply_tiles<Kind, 2, 2, kSwapped, PackAhead<Kind, 2>>
                                                : multiply_tiles<Kind, 2, 1, kSwapped, PackAhead<Kind, 2>>;
                multiply(left[p], right_panel, at, kRightGroup, add, &packer);
                if (!packer.loader.all_finite()) plan.tell_not_finite();
                continue;
              }
              const auto multiply = two_left ? two_right ? multiply_tiles<Kind, 2, 2, kSwapped, FetchAhead>
                                                         : multiply_tiles<Kind, 2, 1, kSwapped, FetchAhead>
                                    : two_right ? multiply_tiles<Kind, 1, 2, kSwapped, FetchAhead>
                                                : multiply_tiles<Kind, 1, 1, kSwapped, FetchAhead>;
              multiply(left[p], right_panel, at, kRightGroup, add, &fetch);
            }
          }
          if (!last || from + length < kc) continue;
          if constexpr (!kSwapped) {
            finish(g.out, c, kRightGroup, l, group_rows, r0 + rg * kRightGroup, group_columns);
          } else {
            transpose_group(c, kRightGroup, group_rows, group_columns, turned.data(), kLeftGroup);
            finish(g.out, turned.data(), kLeftGroup, r0 + rg * kRightGroup, group_columns, l, group_rows);
          }
        }
      }
      l += group_rows;
    }
  }
}

// What a side costs to be brought into tiles, in copies of it.
template <class Kind>
inline double side_cost(const IndexMap& rows, int64_t k, bool left) {
  if (k == 1) return left ? (Kind::kParts == 1 && rows.even() ? 0 : 2) : 2.5;
  if (rows.even() && rows.step() == 1) return left ? 3 : 1;
  return 10;
}

// Returns whether there was an element that the kind cannot multiply: then the results of its row or column are wrong.
template <class Kind>
inline bool run_tiled(const GemmList& source) {
  constexpr int64_t kSerialCycles = 30000;            // below it threads cost more than they bring
  constexpr int64_t kSharedBytes = int64_t{1} << 29;  // above it each task packs its own right side
  constexpr int64_t kPackPanels = 8;
  const Gemm& first = source.first;
  const int64_t count = source.count(), n = first.n;
  int64_t rows = 0, most_rows = 0, most_k = 0, work = 0, b_elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t m = source.m(i), k = source.k(i);
    rows += m;
    most_rows = most(most_rows, m);
    most_k = most(most_k, k);
    work += ceil_div(m, 16) * ceil_div(n, 16) * most(ceil_div(k, kTileK), 1) * 16 * Kind::kParts * Kind::kParts;
    b_elements += n * k;
  }
  if (n == 0 || rows == 0) return false;
  const double a_elements = static_cast<double>(rows) * static_cast<double>(most_k);
  IndexMap columns;
  columns.append(n, first.b_n);
  const double plain_cost = a_elements * side_cost<Kind>(first.a.rows, first.a.col, true) +
                            static_cast<double>(b_elements) * side_cost<Kind>(columns, first.b_k, false);
  const double swapped_cost = a_elements * side_cost<Kind>(first.a.rows, first.a.col, false) +
                              static_cast<double>(b_elements) * side_cost<Kind>(columns, first.b_k, true) +
                              5.0 * static_cast<double>(rows) * static_cast<double>(n);
  bool not_finite = false;
  TiledPlan plan{};
  plan.not_finite = &not_finite;
  const bool made = first.make_b != nullptr;
  plan.swapped = made ? !first.made_by_rows : swapped_cost < plain_cost;
  const int64_t cycles = work + (b_elements + rows * most_k) / 4;
  const int64_t threads = cycles <= kSerialCycles ? 1 : num_threads();

  // The right block takes at most three eighths of L2, and the sums of a task, where they wait for the next chunk of k,
  // a quarter. A right side that is packed where it is used wants all left rows in one task; few left rows want it
  // packed and used within L1, but read by long stretches.
  const int64_t most_left = plan.swapped ? n : most_rows, most_right = plan.swapped ? most_rows : n;
  const int64_t right_step = made && !plan.swapped ? kMadeK : kFinishSide;
  const int64_t eighth = l2_cache_bytes() / 8, all_right = ceil_div(most_right, right_step) * right_step;
  const auto within = [](int64_t low, int64_t x, int64_t high) { return least(most(x, low), high); };
  plan.right_block = least(all_right, 512);
  plan.left_block = ceil_div(most_left, kFinishSide) * kFinishSide;
  plan.chunk = 3 * eighth / (plan.right_block * 2 * Kind::kParts) / kTileK * kTileK;
  if (!plan.swapped && most_left <= kPanelSide) {
    plan.chunk = made ? 4 * kTileK : kTileK;
  } else if (most_k > plan.chunk) {
    if (!plan.swapped) {
      plan.left_block = least(plan.left_block, 1024);
      plan.right_block = least(all_right, within(right_step, eighth / 2 / plan.left_block / right_step * right_step, 512));
      plan.chunk = 3 * eighth / (plan.right_block * 2 * Kind::kParts) / kTileK * kTileK;
    } else {
      plan.left_block = least(plan.left_block, most(eighth / 2 / plan.right_block / kFinishSide * kFinishSide, 256));
    }
    plan.chunk = most(plan.chunk, 4 * kTileK);
  }
  const int64_t chunks = most(1, ceil_div(most_k, plan.chunk));
  const int64_t k_step = made && plan.swapped ? kMadeK : kTileK;
  plan.chunk = most(ceil_div(ceil_div(most_k, chunks), k_step) * k_step, k_step);
  const auto left_blocks = [&](int64_t i) { return ceil_div(plan.swapped ? n : source.m(i), plan.left_block); };
  const auto right_blocks = [&](int64_t i) { return ceil_div(plan.swapped ? source.m(i) : n, plan.right_block); };
  const auto tasks = [&](int64_t i) { return left_blocks(i) * right_blocks(i); };
  const auto total_tasks = [&] {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += tasks(i);
    return total;
  };
  int64_t total = total_tasks();
  const auto halve = [&](int64_t* block, int64_t smallest) {
    while (threads > 1 && total < 4 * threads && *block > smallest) {
      *block = ceil_div(*block / 2, kFinishSide) * kFinishSide;
      total = total_tasks();
    }
  };
  if (plan.swapped) halve(&plan.left_block, 64), halve(&plan.right_block, 64);
  else halve(&plan.right_block, 128), halve(&plan.left_block, 128), halve(&plan.right_block, made ? 128 : 64);

  const auto packed_of = [&](int64_t i) { return packed_bytes<Kind>(plan.swapped ? source.m(i) : n, source.k(i)); };
  int64_t packed = 0, most_left_blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    packed += packed_of(i);
    most_left_blocks = most(most_left_blocks, left_blocks(i));
  }
  const bool share = most_left_blocks > 1 && packed <= kSharedBytes;
  Scratch<char> shared(share ? packed : 0);
  const auto run = [&](int64_t units, bool parallel, const auto& parts, const auto& unit) {
    int64_t next = 0;
    const auto work_off = [&](int64_t, int64_t) {
      Cursor cursor;
      int64_t current = -1;
      Gemm g = source.first;
      for (;;) {
        const int64_t part = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (part >= units) return;
        advance(&cursor, part, parts, packed_of);
        if (cursor.problem != current) source.place(current = cursor.problem, &g);
        unit(g, part - cursor.first, cursor);
      }
    };
    if (!parallel || threads == 1 || units == 1) work_off(0, 1);
    else parallel_for(0, least(threads, units), 1, work_off);
  };
  if (share) {
    const auto parts = [&](int64_t i) { return ceil_div(plan.swapped ? source.m(i) : n, kPackPanels * kPanelSide); };
    int64_t units = 0;
    for (int64_t i = 0; i < count; ++i) units += parts(i);
    run(units, packed > (1 << 18), parts, [&](const Gemm& g, int64_t part, const Cursor& cursor) {
      const TiledSides<Kind> sides(g, plan.swapped);
      const int64_t r = part * kPackPanels * kPanelSide, some = least(kPackPanels * kPanelSide, sides.right_count - r);
      for (int64_t k0 = 0; k0 < g.k; k0 += plan.chunk) {
        const int64_t kc = least(plan.chunk, g.k - k0), panel_bytes = ceil_div(kc, kTileK) * kBlockBytes<Kind>;
        char* to = shared.data() + cursor.packed + packed_bytes<Kind>(sides.right_count, k0);
        to += r / kPanelSide * panel_bytes;
        if (pack_right(g, sides.right, r, some, k0, kc, to, panel_bytes)) plan.tell_not_finite();
      }
    });
  }
  run(total, true, tasks, [&](const Gemm& g, int64_t part, const Cursor& cursor) {
    const int64_t across = right_blocks(cursor.problem), left = part / across, right = part % across;
    const int64_t l0 = left * plan.left_block, r0 = right * plan.right_block;
    const int64_t left_count = plan.swapped ? g.n : g.m, right_count = plan.swapped ? g.m : g.n;
    const auto task = plan.swapped ? run_tiled_task<Kind, true> : run_tiled_task<Kind, false>;
    task(g, plan, l0, least(left_count, l0 + plan.left_block), r0, least(right_count, r0 + plan.right_block),
         share ? shared.data() + cursor.packed : nullptr);
  });
  return not_finite;
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
#endif
