// Kernels of the decoding runner: integer matrices in groups of 32, bfloat16 ones, and one whole step of a decoder.
//
// A matrix w = q s + m (decode_weights.py) lies in blocks of 16 rows. For each group of 32 inputs a block holds 8 (bits
// 4: 4) vectors of 64 bytes; byte 4 r + k of vector v is the code of row r and input 4 v + k, plus 128 (bits 4: plus 8;
// the high halves are those of vector v + 4). So a vector times 4 broadcast activations gives 16 partial sums, one a row,
// and nothing is added across lanes. Sums are integers; the float sum over groups runs in one order whatever the number
// of rows and threads, and so does attention: what a token gives does not depend on its company.
//
// A bfloat16 matrix lies in blocks of 16 rows too, [columns / 2, 16 rows, 2]; its activations are rounded to bfloat16.
//
// Keys lie as [kv heads, blocks, head_dim, 16 keys], values as [kv heads, keys, head_dim].
// Paths: AVX512-VNNI, with AVX512-BF16 or not, AVX2, and plain C++ for others; vector types of GCC and Clang do the rest.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint8_t B64 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));

extern "C" {

struct Matrix {
  const uint8_t* codes;  // bits 16: bfloat16 weights, without scales and minima
  const void* scales;   // bfloat16, or float where wide, [blocks, groups, 16]
  const float* minima;  // [blocks, groups, 16] or null
  const float* bias;    // [out] or null
  int32_t out, columns, bits, wide;
};

struct Norm {
  const float* gain;
  const float* bias;
  float eps;
  int32_t kind;  // 0 none, 1 rms, 2 layer
};

struct Layer {  // heads 0: no attention; up.out 0: no feed
  Matrix qkv, out, up, down;
  Norm before_attention, after_attention, before_feed, after_feed, q_norm, k_norm;
  int32_t heads, kv_heads, head_dim, window, rope, act, gated;  // window 0: none; rope -1: none
  float scale;
};

struct Span {  // the new tokens of one request
  int32_t rows, past, blocks, unused;
  float* const* keys;
  float* const* values;
  const uint8_t* visible;  // [rows, rows], null: a chain
  const int32_t* depths;   // [rows]
};

struct Model {
  const Layer* layers;
  const float* const* cosines;  // [positions, head_dim] for each rope
  const float* const* sines;
  Norm norm;
  int32_t count, width;
};
}

namespace {

constexpr int kGroup = 32, kLanes = 16, kTile = 4;
constexpr int kAhead = 4096;  // bytes of weights that are asked for before they are due

inline F16 load(const float* p) {
  F16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, F16 v) { std::memcpy(p, &v, sizeof v); }

inline float total(F16 v) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

inline float largest(F16 v) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] = std::max(v[i], v[i + half]);
  return v[0];
}

inline F16 rounded(F16 x) {  // to even; |x| < 2^22
  const float magic = 12582912.0f;
  return (x + magic) - magic;
}

inline F16 exponential(F16 x) {
  const F16 low = F16{} - 87.0f, high = F16{} + 88.0f;
  F16 y = x < low ? low : x;
  y = y > high ? high : y;
  const F16 n = rounded(y * 1.44269504f);
  const F16 r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  F16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I16 bits = (__builtin_convertvector(n, I16) + 127) << 23;
  F16 power;
  std::memcpy(&power, &bits, sizeof power);
  return x < low ? F16{} : p * power;
}

struct Rows {  // activations as integers, or as bfloat16
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  std::vector<uint16_t> halves;
  void reserve(size_t rows, size_t columns) {
    codes.resize(std::max(codes.size(), rows * columns));
    halves.resize(codes.size());
    scales.resize(std::max(scales.size(), rows * columns / kGroup));
    sums.resize(scales.size());
  }
};

void quantise(const float* x, int columns, int row, Rows& to) {
  const int groups = columns / kGroup;
  for (int g = 0; g < groups; g++) {
    const F16 a = load(x + g * kGroup), b = load(x + g * kGroup + kLanes);
    const F16 high = a < 0 ? -a : a, other = b < 0 ? -b : b;
    const float top = largest(high > other ? high : other), inverse = top > 0 ? 127.0f / top : 0.0f;
    const I16 first = __builtin_convertvector(rounded(a * inverse), I16);
    const I16 second = __builtin_convertvector(rounded(b * inverse), I16);
    int8_t* codes = to.codes.data() + (size_t)row * columns + g * kGroup;
    int32_t sum = 0;
    for (int i = 0; i < kLanes; i++) {
      codes[i] = (int8_t)first[i];
      codes[i + kLanes] = (int8_t)second[i];
      sum += first[i] + second[i];
    }
    to.scales[(size_t)row * groups + g] = top / 127.0f;
    to.sums[(size_t)row * groups + g] = sum;
  }
}

void narrow(const float* x, int columns, int row, Rows& to) {
  uint16_t* halves = to.halves.data() + (size_t)row * columns;
  for (int i = 0; i < columns; i += kLanes) {
    U16 bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to even
    const H16 half = __builtin_convertvector(bits, H16);
    std::memcpy(halves + i, &half, sizeof half);
  }
}

// activations of one row as the matrix takes them
void prepare(const Matrix& m, const float* x, int row, Rows& to) {
  if (m.bits == 16) narrow(x, m.columns, row, to);
  else quantise(x, m.columns, row, to);
}

// sum of 2 products a lane, of bfloat16 pairs; the activations are spread over the lanes from memory, which costs nothing
inline F16 dot2(F16 sum, B64 weights, const uint16_t* pair) {
#if defined(__AVX512BF16__)
  float two;
  std::memcpy(&two, pair, sizeof two);
  return (F16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_ps(two));
#else
  uint32_t two;
  std::memcpy(&two, pair, sizeof two);
  I16 words;
  std::memcpy(&words, &weights, sizeof words);
  const I16 first = words << 16, second = words & (int32_t)0xffff0000;
  F16 a, b;
  std::memcpy(&a, &first, sizeof a);
  std::memcpy(&b, &second, sizeof b);
  const uint32_t low = two << 16, high = two & 0xffff0000;
  float x, y;
  std::memcpy(&x, &low, 4);
  std::memcpy(&y, &high, 4);
  return (sum + a * x) + b * y;
#endif
}

// sum of 4 products a lane, of unsigned codes (of 8 bits on AVX2: of signed ones) with 4 signed activations
#if defined(__AVX512VNNI__)
constexpr int kShift8 = 128;
template <int BITS>
inline I16 dot4(I16 sum, B64 codes, int32_t four) {
  return (I16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(four));
}
#elif defined(__AVX2__)
constexpr int kShift8 = 0;
template <int BITS>
inline I16 dot4(I16 sum, B64 codes, int32_t four) {
  __m256i part[2], into[2];
  std::memcpy(part, &codes, 64);
  std::memcpy(into, &sum, 64);
  for (int h = 0; h < 2; h++) {
    __m256i x = _mm256_set1_epi32(four), w = part[h];
    if (BITS == 8) {  // 255 * 127 * 2 would not fit 16 bits
      w = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
      x = _mm256_sign_epi8(x, w);
      w = _mm256_abs_epi8(w);
    }
    const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
    into[h] = _mm256_add_epi32(into[h], pairs);
  }
  std::memcpy(&sum, into, 64);
  return sum;
}
#else
constexpr int kShift8 = 128;
template <int BITS>
inline I16 dot4(I16 sum, B64 codes, int32_t four) {
  int8_t x[4];
  std::memcpy(x, &four, 4);
  for (int r = 0; r < kLanes; r++)
    for (int k = 0; k < 4; k++) sum[r] += (int32_t)codes[4 * r + k] * x[k];
  return sum;
}
#endif

template <int BITS>
inline B64 codes_of(const uint8_t* group, int step) {
  B64 v;
  std::memcpy(&v, group + 64 * (BITS == 8 ? step : step % 4), 64);
  return BITS == 8 ? v : step < 4 ? (v & 15) : (v >> 4);
}

inline F16 scales_of(const Matrix& m, size_t place) {
  if (m.wide) return load((const float*)m.scales + place * kLanes);
  uint16_t narrow[kLanes];
  std::memcpy(narrow, (const uint16_t*)m.scales + place * kLanes, sizeof narrow);
  uint32_t words[kLanes];
  for (int i = 0; i < kLanes; i++) words[i] = (uint32_t)narrow[i] << 16;
  F16 v;
  std::memcpy(&v, words, sizeof v);
  return v;
}

template <int BITS, int T>
void block_times_rows(const Matrix& m, const Rows& a, int block, int row, float* y) {
  constexpr int bytes = BITS == 8 ? 512 : 256, shift = BITS == 8 ? kShift8 : 8;
  const int groups = m.columns / kGroup;
  F16 acc[T] = {};
  for (int g = 0; g < groups; g++) {
    const size_t place = (size_t)block * groups + g;
    const uint8_t* group = m.codes + place * bytes;
    const F16 scales = scales_of(m, place);
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch(group + line + kAhead);
    I16 sum[T];
    for (int t = 0; t < T; t++) sum[t] = I16{} - shift * a.sums[(size_t)(row + t) * groups + g];
#pragma GCC unroll 8
    for (int step = 0; step < 8; step++) {
      const B64 codes = codes_of<BITS>(group, step);
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        int32_t four;
        std::memcpy(&four, a.codes.data() + (size_t)(row + t) * m.columns + g * kGroup + 4 * step, 4);
        sum[t] = dot4<BITS>(sum[t], codes, four);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      const size_t at = (size_t)(row + t) * groups + g;
      acc[t] += (scales * a.scales[at]) * __builtin_convertvector(sum[t], F16);
      if (m.minima) acc[t] += load(m.minima + place * kLanes) * (a.scales[at] * (float)a.sums[at]);
    }
  }
  const int first = block * kLanes, count = std::min(kLanes, m.out - first);
  for (int t = 0; t < T; t++) {
    float* to = y + (size_t)(row + t) * m.out + first;
    for (int i = 0; i < count; i++) to[i] = acc[t][i] + (m.bias ? m.bias[first + i] : 0.0f);
  }
}

template <int T>
void block_times_halves(const Matrix& m, const Rows& a, int block, int row, float* y) {
  const int pairs = m.columns / 2;
  const uint8_t* weights = m.codes + (size_t)block * pairs * sizeof(B64);
  F16 even[T] = {}, odd[T] = {};
  for (int p = 0; p < pairs; p += 2) {
    B64 first, second;
    std::memcpy(&first, weights + p * sizeof(B64), sizeof first);
    std::memcpy(&second, weights + (p + 1) * sizeof(B64), sizeof second);
    __builtin_prefetch(weights + p * sizeof(B64) + kAhead);
    __builtin_prefetch(weights + (p + 1) * sizeof(B64) + kAhead);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      const uint16_t* x = a.halves.data() + (size_t)(row + t) * m.columns + 2 * p;
      even[t] = dot2(even[t], first, x);
      odd[t] = dot2(odd[t], second, x + 2);
    }
  }
  const int first = block * kLanes, count = std::min(kLanes, m.out - first);
  for (int t = 0; t < T; t++) {
    const F16 sum = even[t] + odd[t];
    float* to = y + (size_t)(row + t) * m.out + first;
    for (int i = 0; i < count; i++) to[i] = sum[i] + (m.bias ? m.bias[first + i] : 0.0f);
  }
}

template <int BITS, int T>
inline void block_times(const Matrix& m, const Rows& a, int block, int row, float* y) {
  if constexpr (BITS == 16) block_times_halves<T>(m, a, block, row, y);
  else block_times_rows<BITS, T>(m, a, block, row, y);
}

template <int BITS>
void multiply_by(const Matrix& m, const Rows& a, int rows, float* y, int thread, int threads) {
  const int64_t blocks = (m.out + kLanes - 1) / kLanes;
  for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++) {
    int row = 0;
    for (; row + 8 <= rows; row += 8) block_times<BITS, 8>(m, a, block, row, y);
    switch (rows - row) {  // in one go: weights are read once
      case 7: block_times<BITS, 7>(m, a, block, row, y); break;
      case 6: block_times<BITS, 6>(m, a, block, row, y); break;
      case 5: block_times<BITS, 5>(m, a, block, row, y); break;
      case 4: block_times<BITS, 4>(m, a, block, row, y); break;
      case 3: block_times<BITS, 3>(m, a, block, row, y); break;
      case 2: block_times<BITS, 2>(m, a, block, row, y); break;
      case 1: block_times<BITS, 1>(m, a, block, row, y); break;
    }
  }
}

void multiply(const Matrix& m, const Rows& a, int rows, float* y, int thread, int threads) {
  if (m.bits == 16) multiply_by<16>(m, a, rows, y, thread, threads);
  else if (m.bits == 8) multiply_by<8>(m, a, rows, y, thread, threads);
  else multiply_by<4>(m, a, rows, y, thread, threads);
}

void normalise(const Norm& norm, const float* x, float* y, int n) {
  if (norm.kind == 0) {
    if (x != y) std::memcpy(y, x, n * sizeof(float));
    return;
  }
  float mean = 0.0f;
  if (norm.kind == 2) {
    F16 sum = {};
    for (int i = 0; i < n; i += kLanes) sum += load(x + i);
    mean = total(sum) / n;
  }
  F16 squares = {};
  for (int i = 0; i < n; i += kLanes) squares += (load(x + i) - mean) * (load(x + i) - mean);
  const float inverse = 1.0f / std::sqrt(total(squares) / n + norm.eps);
  for (int i = 0; i < n; i += kLanes) {
    F16 v = (load(x + i) - mean) * inverse * load(norm.gain + i);
    if (norm.bias) v += load(norm.bias + i);
    store(y + i, v);
  }
}

void activate(const Layer& layer, const float* up, float* y, int n) {
  for (int i = 0; i < n; i += kLanes) {
    const F16 x = load(up + i);
    F16 v;
    if (layer.act == 0) v = x / (exponential(-x) + 1.0f);
    else if (layer.act == 1) v = x / (exponential((x + x * x * x * 0.044715f) * -1.59576912f) + 1.0f);
    else for (int k = 0; k < kLanes; k++) v[k] = 0.5f * x[k] * (1.0f + std::erf(x[k] * 0.70710678f));
    store(y + i, layer.gated ? v * load(up + n + i) : v);
  }
}

void turn(float* x, const float* cosine, const float* sine, int n) {
  const int half = n / 2;
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i + half] + a * sine[i + half];
  }
}

// norms and positions of one head of one new token; keys and values go to the cache
void place_head(const Layer& l, const Span& span, int row, int head, float* x, const float* cosine, const float* sine,
                float* keys, float* values) {
  const int d = l.head_dim, slot = span.past + row, kv = (head - l.heads) % l.kv_heads;
  if (head >= l.heads + l.kv_heads) {
    std::memcpy(values + ((size_t)kv * span.blocks * kLanes + slot) * d, x, d * sizeof(float));
    return;
  }
  normalise(head < l.heads ? l.q_norm : l.k_norm, x, x, d);
  if (cosine) turn(x, cosine, sine, d);
  if (head < l.heads) return;
  float* to = keys + ((size_t)kv * span.blocks + slot / kLanes) * d * kLanes + slot % kLanes;
  for (int i = 0; i < d; i++) to[(size_t)i * kLanes] = x[i];
}

template <int N>
void weigh_values(const float* scores, size_t stride, const float* values, int from, int to, int d, int at, F16 (*out)[N]) {
  for (int t = 0; t < kTile; t++)
    for (int i = 0; i < N; i++) out[t][i] = F16{};
  for (int j = from; j < to; j++) {
    F16 v[N];
    for (int i = 0; i < N; i++) v[i] = load(values + (size_t)j * d + at + i * kLanes);
    for (int t = 0; t < kTile; t++)
      for (int i = 0; i < N; i++) out[t][i] += scores[t * stride + j - from] * v[i];
  }
}

// up to 4 queries that share a key head: `first` .. `first + count` of rows x group
void attend(const Layer& l, const Span& span, int kv, int first, int count, const float* q, size_t q_stride,
            const float* keys, const float* values, float* y, std::vector<float>& scratch) {
  const int d = l.head_dim, group = l.heads / l.kv_heads;
  keys += (size_t)kv * span.blocks * d * kLanes;
  values += (size_t)kv * span.blocks * kLanes * d;
  const float* query[kTile];
  int rows[kTile], heads[kTile], low = span.past + span.rows;
  for (int t = 0; t < kTile; t++) {
    const int i = first + std::min(t, count - 1);
    rows[t] = i / group, heads[t] = kv * group + i % group;
    query[t] = q + rows[t] * q_stride + heads[t] * d;
    low = std::min(low, l.window ? std::max(0, span.past + span.depths[rows[t]] - l.window + 1) : 0);
  }
  const int end = span.visible ? span.past + span.rows : span.past + rows[count - 1] + 1;
  const int block = low / kLanes, stop = (end + kLanes - 1) / kLanes, from = block * kLanes, to = stop * kLanes;
  const size_t stride = to - from;
  if (scratch.size() < stride * kTile) scratch.resize(stride * kTile);
  float* scores = scratch.data();
  for (int b = block; b < stop; b++) {
    const float* k = keys + (size_t)b * d * kLanes;
    F16 acc[kTile] = {};
    for (int i = 0; i < d; i++) {
      const F16 v = load(k + i * kLanes);
      for (int t = 0; t < kTile; t++) acc[t] += query[t][i] * v;
    }
    for (int t = 0; t < kTile; t++) store(scores + t * stride + (b - block) * kLanes, acc[t] * l.scale);
  }
  float inverse[kTile];
  for (int t = 0; t < kTile; t++) {
    float* s = scores + t * stride;
    const int place = span.past + span.depths[rows[t]], oldest = l.window ? place - l.window + 1 : 0;
    const float none = -std::numeric_limits<float>::infinity();
    for (int j = from; j < std::min(oldest, span.past); j++) s[j - from] = none;
    for (int j = std::max(from, span.past); j < to; j++) {
      const int other = j - span.past;
      const bool seen = other < span.rows && (span.visible ? span.visible[rows[t] * span.rows + other] : other <= rows[t]);
      if (!seen || span.past + span.depths[other] < oldest) s[j - from] = none;
    }
    F16 top = load(s), sum = {};
    for (size_t j = kLanes; j < stride; j += kLanes) {
      const F16 v = load(s + j);
      top = v > top ? v : top;
    }
    const float high = largest(top);
    // each place adds to the lane of its position: tokens of a tree lie elsewhere than they would in a chain
    const int settled = span.visible ? span.past : to;
    for (size_t j = 0; j < stride; j += kLanes) {
      const F16 v = exponential(load(s + j) - high);
      store(s + j, v);
      if (from + (int)j + kLanes <= settled) sum += v;
      else
        for (int i = 0; from + (int)j + i < settled; i++) sum[i] += v[i];
    }
    for (int j = settled; j < std::min(to, span.past + span.rows); j++)
      sum[(span.past + span.depths[j - span.past]) % kLanes] += s[j - from];
    inverse[t] = 1.0f / total(sum);
  }
  for (int at = 0; at < d;) {
    const int wide = at + 4 * kLanes <= d ? 4 : 1;
    F16 out[kTile][4], narrow[kTile][1];
    if (wide == 4) weigh_values<4>(scores, stride, values, from, to, d, at, out);
    else weigh_values<1>(scores, stride, values, from, to, d, at, narrow);
    for (int t = 0; t < count; t++)
      for (int i = 0; i < wide; i++)
        store(y + ((size_t)rows[t] * l.heads + heads[t]) * d + at + i * kLanes,
              (wide == 4 ? out[t][i] : narrow[t][0]) * inverse[t]);
    at += wide * kLanes;
  }
}

}  // namespace

extern "C" int gossamer_path() {
#if defined(__AVX512BF16__)
  return 3;
#elif defined(__AVX512VNNI__)
  return 2;
#elif defined(__AVX2__)
  return 1;
#else
  return 0;
#endif
}

// y [rows, out] = x [rows, columns] W^T
extern "C" void gossamer_linear(const Matrix* m, const float* x, int rows, float* y, int threads) {
  Rows a;
  a.reserve(rows, m->columns);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), thread = omp_get_thread_num();
    for (int row = thread; row < rows; row += team) prepare(*m, x + (size_t)row * m->columns, row, a);
#pragma omp barrier
    multiply(*m, a, rows, y, thread, team);
  }
}

// x [n, width]: embeddings of the new tokens of all spans; becomes the last layer's output. last [n, width]: that, normed.
// seen: where to copy the hidden states after the embeddings and each layer (null: not wanted), or null.
extern "C" void gossamer_step(const Model* model, const Span* spans, int count, float* x, float* last,
                              float* const* seen, int threads) {
  const int width = model->width;
  size_t n = 0, joined = 0, queries = 0, ups = 0, columns = width;
  std::vector<int> owner, inside;
  for (int s = 0; s < count; s++)
    for (int r = 0; r < spans[s].rows; r++, n++) owner.push_back(s), inside.push_back(r);
  for (int i = 0; i < model->count; i++) {
    const Layer& l = model->layers[i];
    joined = std::max<size_t>(joined, l.qkv.out), queries = std::max<size_t>(queries, l.out.columns);
    ups = std::max<size_t>(ups, l.up.out), columns = std::max<size_t>({columns, queries, (size_t)l.down.columns});
  }
  std::vector<float> qkv(n * joined), mixed(n * queries), h(n * width), up(n * ups), line(n * columns);
  Rows a;
  a.reserve(n, columns);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), thread = omp_get_thread_num();
    const size_t mine = n * thread / team, after = n * (thread + 1) / team;
    std::vector<float> scratch;
    if (seen && seen[0]) std::memcpy(seen[0] + mine * width, x + mine * width, (after - mine) * width * sizeof(float));
    for (int i = 0; i < model->count; i++) {
      const Layer& l = model->layers[i];
      if (l.heads) {
        const int d = l.head_dim, group = l.heads / l.kv_heads, heads = l.heads + 2 * l.kv_heads;
        for (size_t r = mine; r < after; r++) {
          normalise(l.before_attention, x + r * width, &line[r * columns], width);
          prepare(l.qkv, &line[r * columns], r, a);
        }
#pragma omp barrier
        multiply(l.qkv, a, n, qkv.data(), thread, team);
#pragma omp barrier
        for (size_t k = n * heads * thread / team; k < n * heads * (thread + 1) / team; k++) {
          const size_t r = k / heads;
          const Span& span = spans[owner[r]];
          const size_t place = l.rope < 0 ? 0 : (size_t)(span.past + span.depths[inside[r]]) * d;
          place_head(l, span, inside[r], k % heads, &qkv[r * l.qkv.out + (k % heads) * d],
                     l.rope < 0 ? nullptr : model->cosines[l.rope] + place,
                     l.rope < 0 ? nullptr : model->sines[l.rope] + place, span.keys[i], span.values[i]);
        }
#pragma omp barrier
        size_t start = 0, task = 0;
        for (int s = 0; s < count; start += spans[s++].rows) {
          const int all = spans[s].rows * group;
          const int tile = std::min(kTile, std::max(1, (all * l.kv_heads + team - 1) / team));
          for (int kv = 0; kv < l.kv_heads; kv++)
            for (int first = 0; first < all; first += tile, task++)
              if ((int)(task % team) == thread)
                attend(l, spans[s], kv, first, std::min(tile, all - first), &qkv[start * l.qkv.out], l.qkv.out,
                       spans[s].keys[i], spans[s].values[i], &mixed[start * l.heads * d], scratch);
        }
#pragma omp barrier
        for (size_t r = mine; r < after; r++) prepare(l.out, &mixed[r * l.heads * d], r, a);
#pragma omp barrier
        multiply(l.out, a, n, h.data(), thread, team);
#pragma omp barrier
        for (size_t r = mine; r < after; r++) {
          normalise(l.after_attention, &h[r * width], &h[r * width], width);
          for (int k = 0; k < width; k++) x[r * width + k] += h[r * width + k];
        }
      }
      if (l.up.out) {
        for (size_t r = mine; r < after; r++) {
          normalise(l.before_feed, x + r * width, &line[r * columns], width);
          prepare(l.up, &line[r * columns], r, a);
        }
#pragma omp barrier
        multiply(l.up, a, n, up.data(), thread, team);
#pragma omp barrier
        for (size_t r = mine; r < after; r++) {
          activate(l, &up[r * l.up.out], &line[r * columns], l.down.columns);
          prepare(l.down, &line[r * columns], r, a);
        }
#pragma omp barrier
        multiply(l.down, a, n, h.data(), thread, team);
#pragma omp barrier
        for (size_t r = mine; r < after; r++) {
          normalise(l.after_feed, &h[r * width], &h[r * width], width);
          for (int k = 0; k < width; k++) x[r * width + k] += h[r * width + k];
        }
      }
      for (size_t r = mine; r < after; r++)
        if (seen && seen[i + 1]) std::memcpy(seen[i + 1] + r * width, x + r * width, width * sizeof(float));
    }
    for (size_t r = mine; r < after; r++) normalise(model->norm, x + r * width, last + r * width, width);
  }
}
