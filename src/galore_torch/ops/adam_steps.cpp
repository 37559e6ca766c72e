// Whole steps of Adam in one fp32 matrix. On the means of neighbours, alone or with what the means leave of G: in both moments (FOAM, arXiv
// 2512.07112), or in the first one, with one denominator a block. On a block of rows, with the sign of G in all others or without (FRUGAL,
// arXiv 2411.07837). The plain road, slots/recovery.py, is the oracle. What moments are made of is read twice, once to see that it is
// finite; W and the moments are moved once.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define LANES 16  // floats of one vector
#endif
#endif

namespace {

enum Residual { NONE, IN_BOTH, IN_FIRST };

constexpr int64_t CHUNK = 512;  // elements of a row's blocks worked on at a time: with their moments in full they stay in the L1 cache

struct Step {
  float new1, new2;  // 1 - beta1, 1 - beta2
  float size;        // lr, bias corrections and scale in it
  float eps, decay;  // W <- decay W - ...
  float sign;        // -1: climb
};

#ifdef LANES
using Vector = float __attribute__((vector_size(4 * LANES)));
using Lanes = std::make_integer_sequence<int, LANES>;

inline Vector load(const float* from) { Vector x; std::memcpy(&x, from, sizeof x); return x; }
inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }

template <int B, int PART, int... L>
inline Vector repeated(Vector x, std::integer_sequence<int, L...>) { return __builtin_shufflevector(x, x, ((PART * LANES + L) / B)...); }

template <int B, int... PART>
inline void spread_vector(float* to, Vector x, std::integer_sequence<int, PART...>) {
  (store(to + PART * LANES, repeated<B, PART>(x, Lanes{})), ...);
}

template <int... L>
inline Vector sums_of_pairs(Vector x, Vector y, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(x, y, (2 * L)...) + __builtin_shufflevector(x, y, (2 * L + 1)...);
}

template <int B, bool SQUARED>
inline Vector block_sums(const float* from) {
  if constexpr (B == 1) { const Vector x = load(from); return SQUARED ? x * x : x; }
  else return sums_of_pairs(block_sums<B / 2, SQUARED>(from), block_sums<B / 2, SQUARED>(from + LANES * B / 2), Lanes{});
}

// w <- decay w - factor (sign g + shift), of LANES blocks
template <int B, int... PART>
inline void move_blocks(float* w, const float* g, Vector shift, Vector factor, float decay, float sign, std::integer_sequence<int, PART...>) {
  (store(w + PART * LANES, decay * load(w + PART * LANES) -
                               repeated<B, PART>(factor, Lanes{}) * (sign * load(g + PART * LANES) + repeated<B, PART>(shift, Lanes{}))), ...);
}
#endif

// to[i B + j] = from[i] for i < n, j < B
template <int B>
inline void spread(float* __restrict to, const float* __restrict from, int64_t n) {
  int64_t i = 0;
#ifdef LANES
  for (; i + LANES <= n; i += LANES) spread_vector<B>(to + i * B, load(from + i), std::make_integer_sequence<int, B>{});
#endif
  for (; i < n; ++i) for (int j = 0; j < B; ++j) to[i * B + j] = from[i];
}

// to[i] = factor times the sum over j of from[i B + j], or of its square
template <int B, bool SQUARED = false>
inline void means_in_row(float* __restrict to, const float* __restrict from, int64_t n, float factor) {
  int64_t i = 0;
#ifdef LANES
  for (; i + LANES <= n; i += LANES) store(to + i, factor * block_sums<B, SQUARED>(from + i * B));
#endif
  for (; i < n; ++i) {
    float sum = 0;
    for (int j = 0; j < B; ++j) sum += SQUARED ? from[i * B + j] * from[i * B + j] : from[i * B + j];
    to[i] = sum * factor;
  }
}

// to[k] = factor times the sum over j of from[j stride + k], or of its square
template <int B, bool SQUARED = false>
inline void means_of_rows(float* __restrict to, const float* __restrict from, int64_t stride, int64_t n, float factor) {
  for (int64_t k = 0; k < n; ++k) {
    float sum = 0;
    for (int j = 0; j < B; ++j) sum += SQUARED ? from[j * stride + k] * from[j * stride + k] : from[j * stride + k];
    to[k] = sum * factor;
  }
}

inline float squares(const float* __restrict x, int64_t n) {
  constexpr int SUMS = 64;  // independent, so that they need not wait for each other
  float sums[SUMS] = {}, total = 0;
  int64_t i = 0;
  for (; i + SUMS <= n; i += SUMS) for (int j = 0; j < SUMS; ++j) sums[j] += x[i + j] * x[i + j];
  for (; i < n; ++i) total += x[i] * x[i];
  for (float sum : sums) total += sum;
  return total;
}

// mean becomes m - mean, and square, the mean square of a block, what its update is divided by, over the step size
inline void move_block_moments(float* __restrict m, float* __restrict v, float* __restrict mean, float* __restrict square, int64_t n, Step s) {
  for (int64_t i = 0; i < n; ++i) {
    m[i] += s.new1 * (mean[i] - m[i]);
    v[i] += s.new2 * (square[i] - v[i]);
    mean[i] = m[i] - mean[i];
    square[i] = s.size / (std::sqrt(v[i]) + s.eps);
  }
}

// shift and factor of n blocks of B neighbours
template <int B>
inline void move_weight_by_blocks(float* __restrict w, const float* __restrict g, const float* __restrict shift, const float* __restrict factor,
                                  int64_t n, Step s) {
  int64_t i = 0;
#ifdef LANES
  for (; i + LANES <= n; i += LANES)
    move_blocks<B>(w + i * B, g + i * B, load(shift + i), load(factor + i), s.decay, s.sign, std::make_integer_sequence<int, B>{});
#endif
  for (; i < n; ++i)
    for (int64_t k = i * B; k < (i + 1) * B; ++k) w[k] = s.decay * w[k] - factor[i] * (s.sign * g[k] + shift[i]);
}

inline void move_moments(float* __restrict m, float* __restrict v, const float* __restrict mean, int64_t n, Step s) {
  for (int64_t i = 0; i < n; ++i) {
    m[i] += s.new1 * (mean[i] - m[i]);
    v[i] += s.new2 * (mean[i] * mean[i] - v[i]);
  }
}

// mean, m and v in full size
inline void move_weight(float* __restrict w, const float* __restrict g, const float* __restrict mean, const float* __restrict m,
                        const float* __restrict v, int64_t n, Step s) {
  for (int64_t i = 0; i < n; ++i) {
    const float rest = s.sign * g[i] - mean[i];
    w[i] = s.decay * w[i] - s.size * (m[i] + rest) / (std::sqrt(v[i] + rest * rest) + s.eps);
  }
}

// as if nothing were left of G
inline void move_weight_by_means(float* __restrict w, const float* __restrict update, int64_t n, Step s) {
  for (int64_t i = 0; i < n; ++i) w[i] = s.decay * w[i] - update[i];
}

inline void updates_of_means(float* __restrict to, const float* __restrict m, const float* __restrict v, int64_t n, Step s) {
  for (int64_t i = 0; i < n; ++i) to[i] = s.size * m[i] / (std::sqrt(v[i]) + s.eps);
}

struct Matrix { float *w; const float* g; float *m, *v; int64_t rows, columns; };  // rows and columns of the means

bool is_finite(const float* g, int64_t n, int threads) {
  const int64_t parts = (n + CHUNK - 1) / CHUNK;
  float total = 0;
#pragma omp parallel for reduction(+ : total) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < parts; ++p) total += squares(g + p * CHUNK, std::min(CHUNK, n - p * CHUNK));
  return std::isfinite(total);
}

template <int B, int RESIDUAL>
void neighbours_in_a_row(Matrix a, Step s, int threads) {
  const int64_t count = a.rows * a.columns, part = CHUNK / B, parts = (count + part - 1) / part;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < parts; ++p) {
    float mean[CHUNK / B], mean_in_full[CHUNK];
    const int64_t at = p * part, n = std::min(part, count - at);
    float *w = a.w + at * B, *m = a.m + at, *v = a.v + at;
    const float* g = a.g + at * B;
    means_in_row<B>(mean, g, n, s.sign / B);
    if constexpr (RESIDUAL == IN_FIRST) {
      float square[CHUNK / B];
      means_in_row<B, true>(square, g, n, 1.0f / B);
      move_block_moments(m, v, mean, square, n, s);
      move_weight_by_blocks<B>(w, g, mean, square, n, s);
      continue;
    }
    move_moments(m, v, mean, n, s);
    if constexpr (RESIDUAL == NONE) {
      updates_of_means(mean, m, v, n, s);
      spread<B>(mean_in_full, mean, n);
      move_weight_by_means(w, mean_in_full, n * B, s);
      continue;
    }
    float m_in_full[CHUNK], v_in_full[CHUNK];
    spread<B>(mean_in_full, mean, n);
    spread<B>(m_in_full, m, n);
    spread<B>(v_in_full, v, n);
    move_weight(w, g, mean_in_full, m_in_full, v_in_full, n * B, s);
  }
}

template <int B, int RESIDUAL>
void neighbours_in_a_column(Matrix a, Step s, int threads) {
  const int64_t columns = a.columns, strips = (columns + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < a.rows * strips; ++p) {
    float mean[CHUNK];
    const int64_t row = p / strips, from = p % strips * CHUNK, n = std::min(CHUNK, columns - from);
    float *w = a.w + row * B * columns + from, *m = a.m + row * columns + from, *v = a.v + row * columns + from;
    const float* g = a.g + row * B * columns + from;
    means_of_rows<B>(mean, g, columns, n, s.sign / B);
    if constexpr (RESIDUAL == IN_FIRST) {
      float square[CHUNK];
      means_of_rows<B, true>(square, g, columns, n, 1.0f / B);
      move_block_moments(m, v, mean, square, n, s);
      for (int64_t j = 0; j < B; ++j) move_weight_by_blocks<1>(w + j * columns, g + j * columns, mean, square, n, s);
      continue;
    }
    move_moments(m, v, mean, n, s);
    if constexpr (RESIDUAL == NONE) updates_of_means(mean, m, v, n, s);
    for (int64_t j = 0; j < B; ++j) {
      if constexpr (RESIDUAL == NONE) move_weight_by_means(w + j * columns, mean, n, s);
      else move_weight(w + j * columns, g + j * columns, mean, m, v, n, s);
    }
  }
}

void adam(float* w, const float* g, float* m, float* v, int64_t n, Step s, int threads) {
  const int64_t parts = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < parts; ++p) {
    float own[CHUNK], update[CHUNK];
    const int64_t at = p * CHUNK, count = std::min(CHUNK, n - at);
    for (int64_t i = 0; i < count; ++i) own[i] = s.sign * g[at + i];
    move_moments(m + at, v + at, own, count, s);
    updates_of_means(update, m + at, v + at, count, s);
    move_weight_by_means(w + at, update, count, s);
  }
}

// w <- decay w - size sign(g); an element of g that is not finite moves nothing
void signs(float* w, const float* g, int64_t n, float decay, float size, int threads) {
  const int64_t parts = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < parts; ++p) {
    float* __restrict to = w + p * CHUNK;
    const float* __restrict from = g + p * CHUNK;
    const int64_t count = std::min(CHUNK, n - p * CHUNK);
    for (int64_t i = 0; i < count; ++i) {
      const float x = std::fabs(from[i]) <= FLT_MAX ? from[i] : 0.0f;
      to[i] = decay * to[i] - size * static_cast<float>((x > 0) - (x < 0));
    }
  }
}

}  // namespace

// One step, in place, on the rows of w (rows x columns) with g from `first` on, `some` of them, whose moments are m and v; the others decay, and
// move by `rest` against the sign of g. 1: done; 0: g of the first is not finite, and nothing was changed.
extern "C" int galore_rows(float* w, const float* g, float* m, float* v, int64_t rows, int64_t columns, int64_t first, int64_t some, float new1,
                           float new2, float size, float eps, float decay, float sign, float rest, int threads) {
  const int64_t from = first * columns, to = (first + some) * columns, end = rows * columns;
  if (!is_finite(g + from, to - from, threads)) return 0;
  adam(w + from, g + from, m, v, to - from, {new1, new2, size, eps, decay, sign}, threads);
  if (rest == 0 && decay == 1) return 1;
  signs(w, g, from, decay, sign * rest, threads);
  signs(w + to, g + to, end - to, decay, sign * rest, threads);
  return 1;
}

// One step, in place, on w (rows tall x columns wide) with g; m and v are rows x columns. One of tall and wide is 1.
// 1: done; 0: g is not finite, and nothing was changed; -1: no code for these blocks.
extern "C" int galore_block_means(float* w, const float* g, float* m, float* v, int64_t rows, int64_t columns, int64_t tall, int64_t wide,
                                  float new1, float new2, float size, float eps, float decay, float sign, int residual, int threads) {
  const Matrix a{w, g, m, v, rows, columns};
  const Step s{new1, new2, size, eps, decay, sign};
#define BLOCKS(B, RESIDUAL)                                                                      \
  if (wide == B && tall == 1) move = neighbours_in_a_row<B, RESIDUAL>;                            \
  if (tall == B && wide == 1) move = neighbours_in_a_column<B, RESIDUAL>;
#define RESIDUALS(B)                                                                             \
  if (residual == NONE) { BLOCKS(B, NONE) }                                                       \
  if (residual == IN_BOTH) { BLOCKS(B, IN_BOTH) }                                                 \
  if (residual == IN_FIRST) { BLOCKS(B, IN_FIRST) }
  void (*move)(Matrix, Step, int) = nullptr;
  RESIDUALS(2) RESIDUALS(4) RESIDUALS(8) RESIDUALS(16) RESIDUALS(32)
  if (move == nullptr) return -1;
  if (!is_finite(g, rows * columns * tall * wide, threads)) return 0;
  move(a, s, threads);
  return 1;
}
