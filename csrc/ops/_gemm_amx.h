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
  static ISOTILE_INLINE Words load(const Src* p, __mmask32 mask) { return {{_mm512_maskz_loadu_epi16(mask, p)}}; }
};

template <int i>
struct Constant {
  static constexpr int value = i;
};

// One side of a product: row i (of a, or column i of b) starts at data + rows.at(i).
template <class Kind>
struct Side {
  const typename Kind::Src* data;
  const IndexMap* rows;
  int64_t k;  // stride of k

  bool direct() const { return Kind::kParts == 1 && k == 1 && rows->even(); }
};

ISOTILE_INLINE __mmask32 first_of_32(int64_t n) {
  return n >= 32 ? ~__mmask32{0} : n <= 0 ? 0 : (__mmask32{1} << n) - 1;
}

ISOTILE_INLINE void store_tile(__m512 (&words)[16], bool transposed, char* out) {
  if (transposed) transpose_16x16(words);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_ps(out + 64 * i, words[i]);
}

// Rows [first, first + count) of a side, k in [k0, k0 + kc), as panels of 32 rows [k block][tile][part], `panel_bytes`
// from one to the next; the last has one tile if that is enough. left: tiles of rows; else pairs of k.
template <class Kind>
inline void pack_side(const Side<Kind>& side, int64_t first, int64_t count, int64_t k0, int64_t kc, bool left,
                      char* out, int64_t panel_bytes) {
  using Src = typename Kind::Src;
  constexpr int kParts = Kind::kParts;
  const int64_t blocks = ceil_div(kc, kTileK), panels = ceil_div(count, kPanelSide);
  const auto tiles_of = [&](int64_t panel) { return count - panel * kPanelSide > kTileSide ? 2 : 1; };
  if (side.k != 1 && side.rows->even() && side.rows->step() == 1) {  // rows next to each other: pairs of whole lines
    using I = Vec<int32_t>;  // element j of the first operand, element j of the second: as words
    const I both = I::iota(0) * I::set1(0x10001) + I::set1(0x200000);
    const __m512i low = both.v, high = (both + I::set1(0x100010)).v;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t k_left = kc - block * kTileK;
      const Src* from = side.data + first + (k0 + block * kTileK) * side.k;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const __mmask32 mask = first_of_32(count - panel * kPanelSide);
        const int tiles = tiles_of(panel);
        alignas(64) char pairs[2][kParts][kTileBytes];
        char* to = out + panel * panel_bytes + block * tiles * kParts * kTileBytes;
        for (int64_t r = 0; r < 16; ++r) {
          const Src* p = from + panel * kPanelSide + 2 * r * side.k;
          if (k_left > 2 * kTileK) __builtin_prefetch(p + kTileK * side.k, 0, 2);
          if (k_left > 2 * kTileK) __builtin_prefetch(p + (kTileK + 1) * side.k, 0, 2);
          const auto even = Kind::load(p, 2 * r < k_left ? mask : 0);
          const auto odd = Kind::load(p + side.k, 2 * r + 1 < k_left ? mask : 0);
#pragma GCC unroll 2
          for (int part = 0; part < kParts; ++part) {
            const __m512i words0 = _mm512_permutex2var_epi16(even.part[part], low, odd.part[part]);
            const __m512i words1 = _mm512_permutex2var_epi16(even.part[part], high, odd.part[part]);
            if (left) {
              _mm512_store_si512(pairs[0][part] + 64 * r, words0);
              _mm512_store_si512(pairs[1][part] + 64 * r, words1);
            } else {
              _mm512_store_si512(to + part * kTileBytes + 64 * r, words0);
              if (tiles == 2) _mm512_store_si512(to + (kParts + part) * kTileBytes + 64 * r, words1);
            }
          }
        }
        if (!left) continue;
        for (int tile = 0; tile < tiles; ++tile)
          for (int part = 0; part < kParts; ++part) {
            __m512 words[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) words[i] = _mm512_load_ps(pairs[tile][part] + 64 * i);
            store_tile(words, true, to + (tile * kParts + part) * kTileBytes);
          }
      }
    }
    return;
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
        __m512 words[kParts][16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) {
          const Src* p = rows[i] + block * kTileK * side.k;
          Src line[kTileK];
          if (side.k != 1) {
            for (int64_t k = 0; k < kTileK; ++k) line[k] = k < k_left ? p[k * side.k] : Src{};
            p = line;
          }
          const auto loaded = Kind::load(p, i < some ? mask : 0);
#pragma GCC unroll 2
          for (int part = 0; part < kParts; ++part) words[part][i] = _mm512_castsi512_ps(loaded.part[part]);
        }
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) store_tile(words[part], !left, to + part * kTileBytes);
      }
    }
  }
}

// Left rows where the kernel finds them: whole blocks of k, then at most one packed block.
struct LeftRows {
  const char* data;
  int64_t row_bytes, tile_bytes, block_bytes;  // from one row, tile, block of k to the next
  int64_t blocks;
  const char* tail = nullptr;
};

// c [kLeft tiles][kRight tiles], row stride ldc, = or += the product. right: blocks of [kRight][part] tiles.
// Accumulators: tile 2 l + r, or l if there are four; left tiles 4 and 5 (6), right tiles 6 and 7.
template <class Kind, int kLeft, int kRight, bool kSwapped>
inline void multiply_tiles(const LeftRows& left, const char* right, float* c, int64_t ldc, bool add,
                           Prefetch* prefetch) {
  using namespace tiles;
  static_assert(kLeft * kRight <= 4 && (kLeft <= 2 || kRight == 1), "four accumulators");
  const auto each_accumulator = [&](const auto& f) __attribute__((always_inline)) {
    f(Constant<0>{}, c);
    if constexpr (kRight == 2) f(Constant<1>{}, c + 16);
    if constexpr (kLeft == 2) f(Constant<2>{}, c + 16 * ldc);
    if constexpr (kLeft == 2 && kRight == 2) f(Constant<3>{}, c + 16 * ldc + 16);
    if constexpr (kLeft == 4) {
      f(Constant<1>{}, c + 16 * ldc);
      f(Constant<2>{}, c + 32 * ldc);
      f(Constant<3>{}, c + 48 * ldc);
    }
  };
  if (add) each_accumulator([&](auto t, float* p) __attribute__((always_inline)) { load<t.value>(p, 4 * ldc); });
  else each_accumulator([&](auto t, float*) __attribute__((always_inline)) { zero<t.value>(); });

  const auto block = [&](const char* l, int64_t row_bytes, int64_t tile_bytes, const char* r)
                         __attribute__((always_inline)) {
    if constexpr (kLeft == 4) {
      load<7>(r, 64);
      load<4>(l, row_bytes);
      dot_bf16<0, 4, 7>();
      load<5>(l + tile_bytes, row_bytes);
      dot_bf16<1, 5, 7>();
      load<6>(l + 2 * tile_bytes, row_bytes);
      dot_bf16<2, 6, 7>();
      load<4>(l + 3 * tile_bytes, row_bytes);
      dot_bf16<3, 4, 7>();
    } else {
      load<6>(r, 64);
      load<4>(l, row_bytes);
      dot_bf16<0, 4, 6>();
      if constexpr (kRight == 2) {
        load<7>(r + kTileBytes, 64);
        dot_bf16<1, 4, 7>();
      }
      if constexpr (kLeft == 2) {
        load<5>(l + tile_bytes, row_bytes);
        dot_bf16<2, 5, 6>();
        if constexpr (kRight == 2) dot_bf16<3, 5, 7>();
      }
    }
  };
  const char* l = left.data;
  for (int64_t i = 0; i < left.blocks; ++i, l += left.block_bytes, right += kRight * kTileBytes) {
    prefetch->next();
    block(l, left.row_bytes, left.tile_bytes, right);
  }
  if (left.tail != nullptr) block(left.tail, 64, kTileBytes, right);
  each_accumulator([&](auto t, float* p) __attribute__((always_inline)) { store<t.value>(p, 4 * ldc); });
}


// Of one product, how its sides are taken and cut.
struct TiledPlan {
  bool swapped;
  int64_t left_block, right_block;  // of a task: rows, columns; multiples of 64 or everything
  int64_t chunk;                    // of k, a multiple of kTileK
};

template <class Kind>
struct TiledSides {
  Side<Kind> left, right;
  IndexMap columns;  // of b
  int64_t left_count, right_count;

  TiledSides(const Gemm& g, bool swapped) {
    using Src = typename Kind::Src;
    columns.append(g.n, g.b_n);
    const Side<Kind> a{static_cast<const Src*>(g.a.data) + g.a.offset, &g.a.rows, g.a.col};
    const Side<Kind> b{static_cast<const Src*>(g.b) + g.b_offset, &columns, g.b_k};
    left = swapped ? b : a;
    right = swapped ? a : b;
    left_count = swapped ? g.n : g.m;
    right_count = swapped ? g.m : g.n;
  }
};

constexpr int64_t kFinishSide = 64;  // of y's columns, at a time

template <class Kind>
constexpr int64_t kBlockBytes = 2 * kTileBytes * Kind::kParts;  // of a panel, one block of k

// Bytes of a packed side with `count` rows and `k`.
template <class Kind>
inline int64_t packed_bytes(int64_t count, int64_t k) {
  return ceil_div(count, kPanelSide) * ceil_div(k, kTileK) * kBlockBytes<Kind>;
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
  const bool direct = sides.left.direct(), keep = chunks > 1;

  Scratch<char> right_packed(shared == nullptr ? packed_bytes<Kind>(columns, chunk) : 0);
  Scratch<char> left_packed(2 * (direct ? kBlockBytes<Kind> : packed_bytes<Kind>(kPanelSide, chunk)));
  Scratch<float> sums(keep ? left_groups * right_groups * kGroup : kGroup);
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
    if (shared == nullptr) pack_side(sides.right, r0, columns, k0, kc, false, right_packed.data(), panel_bytes);
    else right = shared + packed_bytes<Kind>(sides.right_count, k0) + r0 / kPanelSide * panel_bytes;

    // Left rows [l, l + rows), at most a panel.
    const auto left_rows = [&](int64_t l, int64_t rows, char* packed) {
      const int64_t row_bytes = sides.left.rows->step() * 2;
      if (!direct) {
        const int64_t tiles = rows > kTileSide ? 2 : 1;
        pack_side(sides.left, l, rows, k0, kc, true, packed, panel_bytes);
        return LeftRows{packed, 64, kTileBytes * Kind::kParts, tiles * kTileBytes * Kind::kParts, blocks};
      }
      const int64_t whole = kc / kTileK;
      const char* data = reinterpret_cast<const char*>(sides.left.data + k0) + l * row_bytes;
      LeftRows found{data, row_bytes, 16 * row_bytes, 2 * kTileK, whole};
      if (whole < blocks) {
        pack_side(sides.left, l, rows, k0 + whole * kTileK, kc - whole * kTileK, true, packed, kBlockBytes<Kind>);
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
      LeftRows left[2];
      for (int64_t p = 0; p < panels; ++p)
        left[p] = left_rows(l + p * kPanelSide, p + 1 < panels ? kPanelSide : rows_of_last,
                            left_packed.data() + p * packed_bytes<Kind>(kPanelSide, direct ? kTileK : chunk));
      Prefetch prefetch;
      if (direct && l + group_rows < l1) {
        prefetch.row = left[0].data + group_rows * left[0].row_bytes;
        prefetch.row_stride = left[0].row_bytes;
        prefetch.row_lines = ceil_div(2 * kc, 64);
        prefetch.rows_left = least(group_rows, l1 - l - group_rows);
        prefetch.per_call = ceil_div(prefetch.row_lines * prefetch.rows_left, most(1, right_panels * panels * blocks));
        if (prefetch.per_call > 16) prefetch.rows_left = 0;  // the hardware's own will do
      }
      for (int64_t rg = 0; rg < right_groups; ++rg) {
        float* c = sums.data();
        if (keep) c += (group * right_groups + rg * panels) * kPanelSide * kRightGroup;
        const int64_t group_columns = least(columns - rg * kRightGroup, kRightGroup);
        for (int64_t p = 0; p < panels; ++p) {
          const bool two_left = p + 1 < panels || rows_of_last > kTileSide;
          for (int64_t rp = 0; rp * kPanelSide < group_columns; ++rp) {
            const char* right_panel = right + (rg * (kRightGroup / kPanelSide) + rp) * panel_bytes;
            const bool two_right = group_columns - rp * kPanelSide > kTileSide;
            float* at = c + p * kPanelSide * kRightGroup + rp * kPanelSide;
            const auto multiply = two_left ? (two_right ? multiply_tiles<Kind, 2, 2, kSwapped> : multiply_tiles<Kind, 2, 1, kSwapped>)
                                           : (two_right ? multiply_tiles<Kind, 1, 2, kSwapped> : multiply_tiles<Kind, 1, 1, kSwapped>);
            multiply(left[p], right_panel, at, kRightGroup, !first, &prefetch);
          }
        }
        if (!last) continue;
        if constexpr (!kSwapped) {
          finish(g.out, c, kRightGroup, l, group_rows, r0 + rg * kRightGroup, group_columns);
        } else {
          for (int64_t i = 0; i < group_rows; i += 16)
            for (int64_t j = 0; j < group_columns; j += 16) {
              __m512 words[16];
#pragma GCC unroll 16
              for (int w = 0; w < 16; ++w) words[w] = _mm512_load_ps(c + (i + w) * kRightGroup + j);
              transpose_16x16(words);
#pragma GCC unroll 16
              for (int w = 0; w < 16; ++w) _mm512_store_ps(turned.data() + (j + w) * kLeftGroup + i, words[w]);
            }
          finish(g.out, turned.data(), kLeftGroup, r0 + rg * kRightGroup, group_columns, l, group_rows);
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

template <class Kind>
inline void run_tiled(const GemmList& source) {
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
  if (n == 0 || rows == 0) return;
  const double a_elements = static_cast<double>(rows) * static_cast<double>(most_k);
  IndexMap columns;
  columns.append(n, first.b_n);
  const double plain_cost = a_elements * side_cost<Kind>(first.a.rows, first.a.col, true) +
                            static_cast<double>(b_elements) * side_cost<Kind>(columns, first.b_k, false);
  const double swapped_cost = a_elements * side_cost<Kind>(first.a.rows, first.a.col, false) +
                              static_cast<double>(b_elements) * side_cost<Kind>(columns, first.b_k, true) +
                              5.0 * static_cast<double>(rows) * static_cast<double>(n);
  TiledPlan plan{};
  plan.swapped = swapped_cost < plain_cost;
  const int64_t cycles = work + (b_elements + rows * most_k) / 4;
  const int64_t threads = cycles <= kSerialCycles ? 1 : num_threads();

  // The right block lies in half of L2, and so do the sums of a task if they have to wait for the next chunk of k.
  const int64_t most_left = plan.swapped ? n : most_rows, most_right = plan.swapped ? most_rows : n;
  const int64_t half = l2_cache_bytes() / 2;
  plan.right_block = least(ceil_div(most_right, kPanelSide) * kPanelSide, 512);
  plan.chunk = most(half / (plan.right_block * kBlockBytes<Kind> / kPanelSide) * kTileK, 8 * kTileK);
  const int64_t chunks = most(1, ceil_div(most_k, plan.chunk));
  plan.chunk = most(ceil_div(ceil_div(most_k, chunks), kTileK) * kTileK, kTileK);
  plan.left_block = ceil_div(most_left, kFinishSide) * kFinishSide;
  if (chunks > 1) plan.left_block = least(plan.left_block, most(half / 4 / plan.right_block / kFinishSide * kFinishSide, 256));
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
  else halve(&plan.right_block, 128), halve(&plan.left_block, 128), halve(&plan.right_block, 64);

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
        pack_side(sides.right, r, some, k0, kc, false,
                  shared.data() + cursor.packed + packed_bytes<Kind>(sides.right_count, k0) + r / kPanelSide * panel_bytes,
                  panel_bytes);
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
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
#endif
