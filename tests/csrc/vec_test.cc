// The contracts of csrc/simd/vec.h and tile.h, for the instruction set this file is compiled for. Prints one line for each
// failed claim and, for each elementary function, its largest error; exits with 1 if any claim failed.
// Usage: vec_test [stride over float's bit patterns; default 1009]
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "base/cpu.h"
#include "simd/math.h"
#include "simd/tile.h"
#include "simd/vec.h"

using isotile::BFloat16;
using isotile::Float16;
namespace isa = isotile::ISOTILE_ISA;
using isa::Vec;

namespace {

int failures = 0;

void expect(bool ok, const char* claim, double detail = 0) {
  if (ok) return;
  if (++failures <= 40) std::printf("FAILED %s (%.9g)\n", claim, detail);
}

template <class T>
bool same(T a, T b) {  // the same value and sign of zero; any NaN is like another
  if (a != a || b != b) return a != a && b != b;
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}
bool same(BFloat16 a, BFloat16 b) { return a.bits == b.bits; }
bool same(Float16 a, Float16 b) { return a.bits == b.bits; }

const float kSpecials[] = {0.0f,     -0.0f,    1.0f,       -1.0f,      0.5f,       1.5f,     2.5f,     -2.5f,    3.7f,
                           -3.7f,    1e-45f,   -1e-40f,    1.1754944e-38f, 3.4e38f, -3.4e38f, INFINITY, -INFINITY, NAN,
                           65504.0f, 65519.9f, 65520.0f,   6.1e-5f,    5.9e-8f,    2.9e-8f,  8388607.5f, 4194304.5f,
                           1e10f,    -1e10f,   2.1474836e9f, 0.99999994f, 100.0f, -104.0f};
constexpr int kSpecialCount = sizeof(kSpecials) / sizeof(kSpecials[0]);

// Memory whose end is the end of what may be touched.
template <class T>
struct Guarded {
  static constexpr int kCount = 64;
  Guarded() {
    page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    base = static_cast<char*>(mmap(nullptr, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED) std::abort();
    mprotect(base, page, PROT_NONE);
    mprotect(base + 2 * page, page, PROT_NONE);
    end = reinterpret_cast<T*>(base + 2 * page);
  }
  ~Guarded() { munmap(base, 3 * page); }
  size_t page;
  char* base;
  T* end;
};

template <class V, class T>
void check_memory(const char* name) {
  using A = typename V::Scalar;
  constexpr int kLanes = V::kLanes;
  Guarded<T> memory;
  for (int n = 0; n <= kLanes; ++n) {
    T* p = memory.end - n;
    for (int i = 0; i < n; ++i) isotile::from_accumulator(static_cast<A>(i + 1) / 4, p + i);
    A lanes[kLanes];
    V::load(p, n).store(lanes);
    for (int i = 0; i < kLanes; ++i) expect(lanes[i] == (i < n ? static_cast<A>(i + 1) / 4 : A(0)), name, n);
    // A partial store writes its lanes and nothing before them; beyond is the guard page.
    T* before = memory.end - n - 1;
    isotile::from_accumulator(A(77), before);
    V::set1(A(2.5)).store(p, n);
    for (int i = 0; i < n; ++i) expect(isotile::to_double(p[i]) == 2.5, name, n);
    expect(isotile::to_double(*before) == 77, name, n);
    // and within ordinary memory nothing after them
    T plain[2 * kLanes];
    for (T& x : plain) isotile::from_accumulator(A(9), &x);
    V::iota(A(1)).store(plain, n);
    for (int i = 0; i < 2 * kLanes; ++i) expect(isotile::to_double(plain[i]) == (i < n ? i + 1 : 9), name, n);
    T spread[3 * kLanes];
    for (T& x : spread) isotile::from_accumulator(A(9), &x);
    V::iota(A(1)).store_strided(spread, 3, n);
    for (int i = 0; i < 3 * kLanes; ++i) {
      expect(isotile::to_double(spread[i]) == (i % 3 == 0 && i / 3 < n ? i / 3 + 1 : 9), name, n);
    }
    V::load_strided(spread, 3, n).store(lanes);
    for (int i = 0; i < kLanes; ++i) expect(lanes[i] == (i < n ? i + 1 : 0), name, n);
  }
  T whole[kLanes + 3];
  for (int i = 0; i < kLanes + 3; ++i) isotile::from_accumulator(static_cast<A>(i), whole + i);
  A lanes[kLanes];
  V::load(whole + 1).store(lanes);  // any alignment
  for (int i = 0; i < kLanes; ++i) expect(lanes[i] == i + 1, name, i);
  V::load(whole, kLanes + 5).store(lanes);
  for (int i = 0; i < kLanes; ++i) expect(lanes[i] == i, name, i);
  alignas(64) T aligned[kLanes];
  V::iota(A(3)).stream(aligned);
  isa::stream_fence();
  for (int i = 0; i < kLanes; ++i) expect(isotile::to_double(aligned[i]) == i + 3, name, i);
}

// Vector conversion equals the scalar one on every pattern tried, and that one is the nearest, ties to even.
template <class T>
void check_narrowing(const char* name, uint32_t step) {
  using V = Vec<float>;
  float in[V::kLanes];
  T out[V::kLanes], want;
  int filled = 0;
  const auto flush = [&](int n) {
    V::load(in).store(out);
    for (int i = 0; i < n; ++i) {
      isotile::from_float(in[i], &want);
      expect(same(out[i], want), name, in[i]);
      if (in[i] != in[i]) {
        expect(std::isnan(isotile::to_float(want)), name, in[i]);
        continue;
      }
      const T below{static_cast<uint16_t>(want.bits - 1)}, above{static_cast<uint16_t>(want.bits + 1)};
      const double x = in[i], d = std::fabs(x - isotile::to_double(want));
      if (std::isinf(isotile::to_double(want))) continue;  // overflow: check_overflow_boundary
      for (const T& other : {below, above}) {
        const double apart = std::fabs(x - isotile::to_double(other));
        if (std::isnan(apart)) continue;  // zero has no neighbour on one side
        expect(d < apart || (d == apart && want.bits % 2 == 0), name, x);
      }
    }
  };
  for (uint64_t b = 0; b < (uint64_t{1} << 32); b += step) {
    in[filled++] = isotile::bit_cast<float>(static_cast<uint32_t>(b));
    if (filled == V::kLanes) flush(filled), filled = 0;
  }
  for (float x : kSpecials) {
    for (float& lane : in) lane = x;
    flush(1);
  }
}
// The largest value that rounds to the largest finite one, and the next, which rounds to infinity.
template <class T>
void check_overflow_boundary(const char* name, float last, float first, double largest) {
  T out;
  isotile::from_float(last, &out);
  expect(isotile::to_double(out) == largest, name, last);
  isotile::from_float(first, &out);
  expect(std::isinf(isotile::to_double(out)), name, first);
  isotile::from_float(-INFINITY, &out);
  expect(isotile::to_double(out) == -INFINITY, name, -INFINITY);
}
template <class T>
void check_widening(const char* name) {
  using V = Vec<float>;
  T in[V::kLanes];
  float out[V::kLanes];
  for (uint32_t b = 0; b < 65536; b += V::kLanes) {
    for (int i = 0; i < V::kLanes; ++i) in[i].bits = static_cast<uint16_t>(b + i);
    V::load(in).store(out);
    for (int i = 0; i < V::kLanes; ++i) {
      expect(same(out[i], isotile::to_float(in[i])), name, b + i);
      if (out[i] == out[i]) {  // there and back
        T back;
        isotile::from_float(out[i], &back);
        expect(back.bits == in[i].bits, name, b + i);
      }
    }
  }
}

template <class V>
void check_arithmetic() {
  using A = typename V::Scalar;
  using M = typename V::Mask;
  constexpr int kLanes = V::kLanes;
  const bool fused = std::string(ISOTILE_TEST_NAME) != "scalar";
  const auto lane = [](V v) {
    A lanes[kLanes];
    v.store(lanes);
    return lanes[kLanes - 1];
  };
  const auto flag = [&](M m) { return lane(isa::select(m, V::set1(1), V::zero())) == 1; };
  for (int i = 0; i < kSpecialCount; ++i) {
    const A a = kSpecials[i];
    const V va = V::set1(a);
    expect(same(lane(-va), -a), "negation", a);
    expect(same(lane(isa::abs(va)), std::fabs(a)), "abs", a);
    expect(same(lane(isa::sqrt(va)), std::sqrt(a)), "sqrt", a);
    expect(same(lane(isa::round(va)), std::nearbyint(a)), "round", a);
    expect(flag(isa::is_nan(va)) == (a != a), "is_nan", a);
    for (int j = 0; j < kSpecialCount; ++j) {
      const A b = kSpecials[j];
      const V vb = V::set1(b);
      expect(same(lane(va + vb), a + b), "+", a);
      expect(same(lane(va - vb), a - b), "-", a);
      expect(same(lane(va * vb), a * b), "*", a);
      expect(same(lane(va / vb), a / b), "/", a);
      expect(same(lane(isa::max(va, vb)), a > b ? a : b), "max", a);
      expect(same(lane(isa::min(va, vb)), a < b ? a : b), "min", a);
      expect(std::isnan(lane(isa::max_nan(va, vb))) == (a != a || b != b), "max_nan", a);
      expect(std::isnan(lane(isa::min_nan(va, vb))) == (a != a || b != b), "min_nan", a);
      expect(same(lane(isa::copysign(va, vb)), std::copysign(a, b)), "copysign", a);
      expect(flag(va < vb) == (a < b), "<", a);
      expect(flag(va <= vb) == (a <= b), "<=", a);
      expect(flag(va > vb) == (a > b), ">", a);
      expect(flag(va >= vb) == (a >= b), ">=", a);
      expect(flag(va == vb) == (a == b), "==", a);
      expect(flag(va != vb) == (a != b), "!=", a);
      expect(flag(!(va < vb)) == !(a < b), "!", a);
      for (const A c : {A(0.3), A(-1), A(INFINITY)}) {
        const V vc = V::set1(c);
        expect(same(lane(isa::fma(va, vb, vc)), fused ? std::fma(a, b, c) : a * b + c), "fma", a);
        expect(same(lane(isa::fnma(va, vb, vc)), fused ? std::fma(-a, b, c) : -a * b + c), "fnma", a);
      }
    }
  }
  for (int n = 0; n <= kLanes; ++n) {
    const M first = M::first(n);
    A lanes[kLanes];
    isa::select(first, V::iota(1), V::zero()).store(lanes);
    for (int i = 0; i < kLanes; ++i) expect(lanes[i] == (i < n ? i + 1 : 0), "Mask::first", n);
    expect(first.any() == (n > 0), "any", n);
    expect(first.all() == (n == kLanes), "all", n);
    expect((first & !first).any() == false, "&", n);
    expect((first | !first).all(), "|", n);
    A values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = static_cast<A>(i == n ? 100 : i);
    A sum = 0;
    for (A x : values) sum += x;
    expect(isa::reduce_add(V::load(values)) == sum, "reduce_add", n);
    expect(isa::reduce_max(V::load(values)) == (n < kLanes ? 100 : kLanes - 1), "reduce_max", n);
    for (int i = 0; i < kLanes; ++i) values[i] = -values[i];
    expect(isa::reduce_min(V::load(values)) == (n < kLanes ? -100 : 1 - kLanes), "reduce_min", n);
  }
}

void check_integers() {
  using I = Vec<int32_t>;
  const auto lane = [](I v) {
    int32_t lanes[I::kLanes];
    v.store(lanes);
    return lanes[I::kLanes - 1];
  };
  const auto flag = [&](I::Mask m) { return lane(isa::select(m, I::set1(1), I::zero())) == 1; };
  const int32_t values[] = {0, 1, -1, 7, -7, 65536, 0x12345678, -0x12345678, INT32_MAX, INT32_MIN};
  for (int32_t a : values) {
    const uint32_t ua = static_cast<uint32_t>(a);
    const I va = I::set1(a);
    expect(lane(isa::shift_left<5>(va)) == static_cast<int32_t>(ua << 5), "shift_left", a);
    expect(lane(isa::shift_right<5>(va)) == static_cast<int32_t>(ua >> 5), "shift_right", a);
    expect(lane(isa::shift_right_sign<5>(va)) == a >> 5, "shift_right_sign", a);
    float f[I::kLanes];
    isa::to_float(va).store(f);
    expect(f[0] == static_cast<float>(a), "to_float", a);
    for (int32_t b : values) {
      const uint32_t ub = static_cast<uint32_t>(b);
      const I vb = I::set1(b);
      expect(lane(va + vb) == static_cast<int32_t>(ua + ub), "int +", a);
      expect(lane(va - vb) == static_cast<int32_t>(ua - ub), "int -", a);
      expect(lane(va * vb) == static_cast<int32_t>(ua * ub), "int *", a);
      expect(lane(va & vb) == (a & b), "int &", a);
      expect(lane(va | vb) == (a | b), "int |", a);
      expect(lane(va ^ vb) == (a ^ b), "int ^", a);
      expect(flag(va < vb) == (a < b), "int <", a);
      expect(flag(va <= vb) == (a <= b), "int <=", a);
      expect(flag(va > vb) == (a > b), "int >", a);
      expect(flag(va >= vb) == (a >= b), "int >=", a);
      expect(flag(va == vb) == (a == b), "int ==", a);
      expect(flag(va != vb) == (a != b), "int !=", a);
      const uint64_t product = static_cast<uint64_t>(ua) * ub;
      expect(lane(isa::mul_high_unsigned(va, vb)) == static_cast<int32_t>(product >> 32), "mul_high_unsigned", a);
    }
  }
  int32_t lanes[I::kLanes];
  I::iota(5).store(lanes);
  for (int i = 0; i < I::kLanes; ++i) expect(lanes[i] == 5 + i, "int iota", i);
  Guarded<int32_t> memory;
  for (int n = 0; n <= I::kLanes; ++n) {
    I::iota(3).store(memory.end - n, n);
    I::load(memory.end - n, n).store(lanes);
    for (int i = 0; i < I::kLanes; ++i) expect(lanes[i] == (i < n ? 3 + i : 0), "int partial", n);
  }
  for (float x : {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 1e9f, -2147483648.0f, 2147483648.0f, 3e9f, NAN}) {
    isa::to_int(Vec<float>::set1(x)).store(lanes);
    const bool fits = x >= -2147483648.0f && x < 2147483648.0f;
    expect(lanes[0] == (fits ? static_cast<int32_t>(std::nearbyint(x)) : INT32_MIN), "to_int", x);
    float back[I::kLanes];
    isa::as_float(isa::as_int(Vec<float>::set1(x))).store(back);
    expect(same(back[0], x), "as_int", x);
  }
}

// The distance from the true value in units of float's last place there (subnormals included).
double ulps(float got, double want) {
  if (std::isnan(want)) return std::isnan(got) ? 0 : INFINITY;
  const double largest = std::numeric_limits<float>::max();
  if (std::isnan(got)) return INFINITY;
  if (std::isinf(got)) {  // right where the true value rounds to it
    const double edge = largest + std::ldexp(1.0, 103);
    return (got > 0 ? want >= edge * (1 - 1e-7) : -want >= edge * (1 - 1e-7)) ? 0 : INFINITY;
  }
  if (std::isinf(want)) return INFINITY;
  int exponent;
  std::frexp(want, &exponent);
  const double unit = std::ldexp(1.0, exponent - 24 < -149 ? -149 : exponent - 24);
  return std::fabs(got - want) / unit;
}

template <class Got, class Want>
void check_function(const char* name, uint32_t step, double most, const Got& got, const Want& want) {
  using V = Vec<float>;
  double worst = 0;
  float worst_at = 0;
  float in[V::kLanes], out[V::kLanes];
  const auto flush = [&](int n) {
    got(V::load(in)).store(out);
    for (int i = 0; i < n; ++i) {
      const double error = ulps(out[i], want(static_cast<double>(in[i])));
      if (!(error <= worst)) worst = error, worst_at = in[i];
    }
  };
  int filled = 0;
  for (uint64_t b = 0; b < (uint64_t{1} << 32); b += step) {
    in[filled++] = isotile::bit_cast<float>(static_cast<uint32_t>(b));
    if (filled == V::kLanes) flush(filled), filled = 0;
  }
  // Where exp, sigmoid and tanh live, closely.
  for (float x = -110; x < 110; x += step * 1e-6f) {
    in[filled++] = x;
    if (filled == V::kLanes) flush(filled), filled = 0;
  }
  for (float x : kSpecials) {
    for (float& lane : in) lane = x;
    flush(1);
  }
  std::printf("%s %s %.3f ulp at %.9g\n", ISOTILE_TEST_NAME, name, worst, worst_at);
  expect(worst <= most, name, worst_at);
}

template <class Got, class Want>
void check_double_function(const char* name, const Got& got, const Want& want) {
  double lanes[Vec<double>::kLanes];
  for (float x : kSpecials) {
    got(Vec<double>::set1(x)).store(lanes);
    const double w = want(static_cast<double>(x));
    for (double lane : lanes) expect(same(lane, w) || std::fabs(lane - w) <= 4e-16 * std::fabs(w), name, x);
  }
}

void check_double_rounding() {
  // Halfway in float16 plus a little that float cannot hold: rounding twice would go to the even neighbour below.
  const double x = 1.0 + std::ldexp(1.0, -11) + std::ldexp(1.0, -40);
  Float16 h;
  isotile::from_double(x, &h);
  expect(isotile::to_double(h) == 1.0 + std::ldexp(1.0, -10), "double to float16 rounds once");
  isotile::from_double(-x, &h);
  expect(isotile::to_double(h) == -1.0 - std::ldexp(1.0, -10), "double to float16 rounds once");
  BFloat16 b;
  isotile::from_double(1.0 + std::ldexp(1.0, -8) + std::ldexp(1.0, -40), &b);
  expect(isotile::to_double(b) == 1.0 + std::ldexp(1.0, -7), "double to bfloat16 rounds once");
  isotile::from_double(1.0 + 3 * std::ldexp(1.0, -8) - std::ldexp(1.0, -40), &b);
  expect(isotile::to_double(b) == 1.0 + std::ldexp(1.0, -7), "double to bfloat16 rounds once");
}

#if ISOTILE_HAS_TILES
namespace tiles = isa::tiles;

uint32_t random_state = 1;
uint32_t random_bits() { return random_state = random_state * 1664525u + 1013904223u; }

float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

// c += a x b in the order that tile.h promises. a [rows][32], b [16][n][2].
float dot_bf16_in_order(const BFloat16* a, const BFloat16* b, int n, float c) {
  float sum[2] = {0, 0};
  for (int r = 0; r < 16; ++r)
    for (int h = 0; h < 2; ++h) {
      const float x = flushed(isotile::to_float(a[2 * r + h])), y = flushed(isotile::to_float(b[2 * (r * n) + h]));
      sum[h] = flushed(std::fma(x, y, sum[h]));
    }
  return flushed(flushed(c) + flushed(sum[0] + sum[1]));
}

constexpr tiles::Config kWhole = tiles::Config::uniform();

constexpr tiles::Config narrow_config(int rows, int columns) {
  tiles::Config c = tiles::Config::uniform();
  c.set(0, rows, 4 * columns);
  c.set(1, rows, 64);
  c.set(2, 16, 4 * columns);
  return c;
}

void check_bf16_tiles(int rows, int columns, int range) {
  const tiles::Config config = narrow_config(rows, columns);
  BFloat16 a[16 * 32], b[16 * 16 * 2];
  float c[16 * 16], want[16 * 16];
  const auto draw = [&] {  // exponents within `range` of each other
    const uint32_t exponent = static_cast<uint32_t>(127 - range / 2 + static_cast<int>(random_bits() >> 16) % range);
    return BFloat16{static_cast<uint16_t>((random_bits() >> 16 & 0x807f) | exponent << 7)};
  };
  for (BFloat16& x : a) x = draw();
  for (BFloat16& x : b) x = draw();
  for (int i = 0; i < rows * columns; ++i) c[i] = isotile::to_float(draw());
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j)
      want[i * columns + j] = dot_bf16_in_order(a + 32 * i, b + 2 * j, columns, c[i * columns + j]);
  tiles::Scope scope(config);
  tiles::load<0>(c, 4 * columns);
  tiles::load<1>(a, 64);
  tiles::load_once<2>(b, 4 * columns);
  tiles::dot_bf16<0, 1, 2>();
  tiles::store<0>(c, 4 * columns);
  for (int i = 0; i < rows * columns; ++i) expect(same(c[i], want[i]), "dot_bf16", rows * 100 + columns);
}

template <class A, class B, class Dot>
void check_integer_tiles(const char* name, const Dot& dot) {
  A a[16 * 64];
  B b[16 * 64];
  int32_t c[16 * 16], want[16 * 16];
  for (A& x : a) x = static_cast<A>(random_bits() >> 24);
  for (B& x : b) x = static_cast<B>(random_bits() >> 24);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      int32_t sum = c[16 * i + j] = static_cast<int32_t>(random_bits() >> 4);
      for (int k = 0; k < 64; ++k) sum += a[64 * i + k] * b[64 * (k / 4) + 4 * j + k % 4];
      want[16 * i + j] = sum;
    }
  tiles::Scope scope(kWhole);
  tiles::load<3>(c, 64);
  tiles::load<5>(a, 64);
  tiles::load<7>(b, 64);
  dot();
  tiles::store<3>(c, 64);
  expect(std::memcmp(c, want, sizeof(c)) == 0, name);
}

void check_tile_configurations() {
  constexpr tiles::Config other = narrow_config(3, 5);
  int32_t c[16 * 16], from[16 * 16];
  for (int i = 0; i < 256; ++i) from[i] = i + 1;
  tiles::Scope scope(kWhole);
  tiles::load<0>(from, 64);
  scope.use(kWhole);  // is in use: nothing is lost
  tiles::store<0>(c, 64);
  expect(std::memcmp(c, from, sizeof(c)) == 0, "use() of the same configuration");
  scope.use(other);
  for (int32_t& x : c) x = -1;
  tiles::store<0>(c, 20);
  for (int i = 0; i < 256; ++i) expect(c[i] == (i < 15 ? 0 : -1), "use() of another configuration", i);
  tiles::load<0>(from, 64);
  tiles::zero<0>();
  tiles::store<0>(c, 20);
  for (int i = 0; i < 256; ++i) expect(c[i] == (i < 15 ? 0 : -1), "zero", i);
}

// Packed words are those of a whole matrix with zeros around; the memory ends where the elements do.
void check_tile_packing() {
  Guarded<uint16_t> wide;
  Guarded<uint8_t> bytes;
  uint8_t got[16 * 80];
  for (int k = 0; k <= 64; ++k)
    for (int n = 1; n <= 16; ++n) {
      const auto element = [&](int i, int j) { return i < k && j < n ? 1 + (i * 37 + j * 11) % 255 : 0; };
      const int stride = n + k % 3;  // rows with and without a gap
      const auto check = [&](const char* name, int size) {
        for (int r = 0; r < 16; ++r)
          for (int j = 0; j < 16; ++j)
            for (int h = 0; h < 4 / size; ++h) {
              const int at = r * 80 + 4 * j + h * size;
              const int x = size == 1 ? got[at] : got[at] | got[at + 1] << 8;
              expect(x == element(r * (4 / size) + h, j), name, k * 100 + n);
            }
      };
      uint8_t* quads = bytes.end - (k == 0 ? 0 : (k - 1) * stride + n);
      for (int i = 0; i < k; ++i)
        for (int j = 0; j < n; ++j) quads[i * stride + j] = static_cast<uint8_t>(element(i, j));
      tiles::pack_quads(quads, stride, k, n, got, 80);
      check("pack_quads", 1);
      uint8_t* columns = bytes.end - (n * k + (n - 1) * (k % 3));
      for (int j = 0; j < n; ++j)
        for (int i = 0; i < k; ++i) columns[j * (k + k % 3) + i] = static_cast<uint8_t>(element(i, j));
      tiles::transpose_words(columns, k + k % 3, k, n, got, 80);
      check("transpose_words", 1);
      if (k > 32) continue;
      uint16_t* pairs = wide.end - (k == 0 ? 0 : (k - 1) * stride + n);
      for (int i = 0; i < k; ++i)
        for (int j = 0; j < n; ++j) pairs[i * stride + j] = static_cast<uint16_t>(element(i, j));
      tiles::pack_pairs(reinterpret_cast<const BFloat16*>(pairs), stride, k, n, got, 80);
      check("pack_pairs", 2);
    }
}

void check_tiles() {
  for (int rows : {1, 2, 5, 15, 16})
    for (int columns : {1, 3, 8, 16})
      for (int range : {1, 20, 200}) check_bf16_tiles(rows, columns, range);
  check_integer_tiles<uint8_t, int8_t>("dot_u8s8", [] { tiles::dot_u8s8<3, 5, 7>(); });
  check_integer_tiles<int8_t, int8_t>("dot_s8s8", [] { tiles::dot_s8s8<3, 5, 7>(); });
  check_integer_tiles<int8_t, uint8_t>("dot_s8u8", [] { tiles::dot_s8u8<3, 5, 7>(); });
  check_integer_tiles<uint8_t, uint8_t>("dot_u8u8", [] { tiles::dot_u8u8<3, 5, 7>(); });
  check_tile_configurations();
  check_tile_packing();
  // Tiles are a thread's own, also where threads share a core.
  std::vector<std::thread> threads;
  std::vector<int> wrong(8);
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([t, &wrong] {
      int32_t mine[256], back[256];
      for (int32_t& x : mine) x = t;
      for (int round = 0; round < 200; ++round) {
        tiles::Scope scope(kWhole);
        tiles::load<0>(mine, 64);
        std::this_thread::yield();
        tiles::store<0>(back, 64);
        wrong[t] += std::memcmp(mine, back, sizeof(mine)) != 0;
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (int count : wrong) expect(count == 0, "a thread's tiles", count);
}
#else
void check_tiles() {}
#endif

}  // namespace

int main(int argc, char** argv) {
  const uint32_t step = argc > 1 ? static_cast<uint32_t>(std::atoi(argv[1])) : 1009;
  if (!isotile::cpu_runs(ISOTILE_TEST_NAME)) {
    std::printf("this CPU does not run %s\n", ISOTILE_TEST_NAME);
    return 1;
  }
  check_tiles();
  check_memory<Vec<float>, float>("float in memory");
  check_memory<Vec<float>, BFloat16>("bfloat16 in memory");
  check_memory<Vec<float>, Float16>("float16 in memory");
  check_memory<Vec<float>, double>("float from double in memory");
  check_memory<Vec<double>, double>("double in memory");
  check_memory<Vec<double>, float>("double from float in memory");
  check_memory<Vec<double>, BFloat16>("double from bfloat16 in memory");
  check_memory<Vec<double>, Float16>("double from float16 in memory");
  check_narrowing<BFloat16>("to bfloat16", step);
  check_narrowing<Float16>("to float16", step);
  check_overflow_boundary<BFloat16>("bfloat16's largest", std::nextafter(0x1.ffp127f, 0.0f), 0x1.ffp127f, 0x1.fep127);
  check_overflow_boundary<Float16>("float16's largest", std::nextafter(65520.0f, 0.0f), 65520.0f, 65504.0);
  check_widening<BFloat16>("from bfloat16");
  check_widening<Float16>("from float16");
  check_double_rounding();
  check_arithmetic<Vec<float>>();
  check_arithmetic<Vec<double>>();
  check_integers();
  using V = Vec<float>;
  const auto sigmoid = [](double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); };
  check_function("exp", step, 2, [](V x) { return isa::exp(x); }, [](double x) { return std::exp(x); });
  check_function("exp_nonpositive", step, 2, [](V x) { return isa::exp_nonpositive(-abs(x)); },
                 [](double x) { return std::exp(-std::fabs(x)); });
  check_function("exp2_or_zero", step, 4, [](V x) { return isa::exp2_or_zero(min(V::set1(127.0f), x)); },
                 [](double x) { return x < -125 ? 0.0 : std::exp2(x > 127 ? 127.0 : x); });
  check_function("log", step, 2, [](V x) { return isa::log(x); }, [](double x) { return std::log(x); });
  check_function("tanh", step, 2, [](V x) { return isa::tanh(x); }, [](double x) { return std::tanh(x); });
  check_function("erf", step, 2, [](V x) { return isa::erf(x); }, [](double x) { return std::erf(x); });
  check_function("sigmoid", step, 3, [](V x) { return isa::sigmoid(x); }, sigmoid);
  using D = Vec<double>;
  check_double_function("double exp", [](D x) { return isa::exp(x); }, [](double x) { return std::exp(x); });
  check_double_function("double log", [](D x) { return isa::log(x); }, [](double x) { return std::log(x); });
  check_double_function("double tanh", [](D x) { return isa::tanh(x); }, [](double x) { return std::tanh(x); });
  check_double_function("double erf", [](D x) { return isa::erf(x); }, [](double x) { return std::erf(x); });
  check_double_function("double sigmoid", [](D x) { return isa::sigmoid(x); }, sigmoid);
  if (failures) std::printf("%d claims failed\n", failures);
  return failures ? 1 : 0;
}
