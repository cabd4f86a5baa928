// Mean and variance of groups, as good as their elements: a block's mean first, then the squares of
// what differs from it while the block is still in the nearest cache. What rounding left in that
// mean is summed beside the squares and taken out again; blocks join in double by Chan's formula.
// So a mean far from zero costs no digits, and one odd element spoils no others.
//
// Blocks depend on sizes only: any number of threads gives the same bits.
#pragma once

namespace effc {

template <class T>
using Real = decltype(load(static_cast<const T*>(nullptr)));

// Of `count` values: the mean, and the sum of squared differences from it.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  EFFC_MEMBER void join(double n, double m, double s) {
    const double delta = m - mean, part = n / (count + n);
    mean += delta * part;
    squares += s + delta * delta * count * part;
    count += n;
  }

  EFFC_MEMBER void join(const Moments& other) { join(other.count, other.mean, other.squares); }
};

// `groups` groups of `width` channels in each image, `pixels` elements in a channel.
struct Groups {
  int64_t images, groups, width, pixels;
  double eps;

  EFFC_MEMBER double scale(double squares) const {
    squares = squares < 0 ? 0 : squares;  // by rounding alone; a NaN stays
    return 1 / ::sqrt(squares / static_cast<double>(width * pixels) + eps);
  }
};

namespace detail {

constexpr int64_t MOMENT_LANES = 32;     // partial sums: enough vectors to not wait for themselves
constexpr int64_t MOMENT_BLOCK = 8192;   // elements that are read twice
constexpr int64_t MOMENT_CHUNK = 65536;  // elements that one thread takes at least
constexpr int64_t MOMENT_CHUNKS = 128;   // of an image or a group at most
constexpr int64_t MOMENT_ROWS = 32;      // pixels that make joining a block worth its while

// Half is converted a block at a time, by instructions that loops over single elements cannot use.
template <class T>
constexpr bool in_blocks = std::is_same_v<T, half>;

// -- elements that lie in a row ------------------------------------------------------------------

template <class T>
EFFC_INLINE void join_block(Moments& all, const T* x, int64_t n) {
  using R = Real<T>;
  const int64_t whole = n / MOMENT_LANES * MOMENT_LANES;
  R sums[MOMENT_LANES] = {}, rests[MOMENT_LANES] = {}, squares[MOMENT_LANES] = {};
  for (int64_t i = 0; i < whole; i += MOMENT_LANES) {
#pragma omp simd
    for (int64_t l = 0; l < MOMENT_LANES; ++l) sums[l] += load(x + i + l);
  }
  for (int64_t i = whole; i < n; ++i) sums[i - whole] += load(x + i);
  double sum = 0, rest = 0, square = 0;
  for (const R s : sums) sum += s;
  const R mean = static_cast<R>(sum / static_cast<double>(n));
  for (int64_t i = 0; i < whole; i += MOMENT_LANES) {
#pragma omp simd
    for (int64_t l = 0; l < MOMENT_LANES; ++l) {
      const R d = load(x + i + l) - mean;
      rests[l] += d;
      squares[l] += d * d;
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    const R d = load(x + i) - mean;
    rests[i - whole] += d;
    squares[i - whole] += d * d;
  }
  for (int64_t l = 0; l < MOMENT_LANES; ++l) rest += rests[l], square += squares[l];
  const double left = rest / static_cast<double>(n);
  all.join(static_cast<double>(n), mean + left, square - rest * left);
}

template <class T>
static inline Moments moments_of(const T* x, int64_t n) {
  Moments all;
  for (int64_t at = 0; at < n; at += MOMENT_BLOCK) {
    const int64_t size = n - at < MOMENT_BLOCK ? n - at : MOMENT_BLOCK;
    if constexpr (in_blocks<T>) {
      float block[MOMENT_BLOCK];
      load_row(x + at, block, size);
      join_block(all, block, size);
    } else {
      join_block(all, x + at, size);
    }
  }
  return all;
}

// -- pixels whose channels lie together ----------------------------------------------------------

// Several pixels at a time: partial sums are read and written once for all of them.
template <int ROWS, class T>
EFFC_INLINE void add_pixels(const T* x, int64_t step, int64_t channels, Real<T>* sums) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    Real<T> sum = sums[c];
    for (int r = 0; r < ROWS; ++r) sum += load(x + r * step + c);
    sums[c] = sum;
  }
}

template <int ROWS, class T>
EFFC_INLINE void add_squares(const T* x, int64_t step, int64_t channels, const Real<T>* means,
                             Real<T>* rests, Real<T>* squares) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    Real<T> rest = rests[c], square = squares[c];
    const Real<T> mean = means[c];
    for (int r = 0; r < ROWS; ++r) {
      const Real<T> d = load(x + r * step + c) - mean;
      rest += d;
      square += d * d;
    }
    rests[c] = rest;
    squares[c] = square;
  }
}

// Memory for the moments of each channel, and for those of a block.
template <class T>
struct ChannelMoments {
  using R = Real<T>;
  int64_t channels;
  double *mean, *squares;
  R *sums, *rests, *block_squares;
  float* converted = nullptr;

  explicit ChannelMoments(int64_t channels) : channels(channels) {
    mean = scratch<double>(2 * channels);
    squares = mean + channels;
    sums = scratch<R>(3 * channels);
    rests = sums + channels;
    block_squares = rests + channels;
    if constexpr (in_blocks<T>) converted = scratch<float>(rows() * channels);
  }

  ~ChannelMoments() {
    release(mean);
    release(sums);
    release(converted);
  }

  ChannelMoments(const ChannelMoments&) = delete;
  ChannelMoments& operator=(const ChannelMoments&) = delete;

  EFFC_MEMBER int64_t rows() const {
    const int64_t fit = MOMENT_BLOCK / channels / 8 * 8;  // add_pixels takes 8
    return fit > MOMENT_ROWS ? fit : MOMENT_ROWS;
  }

  // x[pixel * step + channel]
  void take(const T* x, int64_t step, int64_t pixels) {
    memset(mean, 0, 2 * channels * sizeof(double));
    for (int64_t at = 0; at < pixels; at += rows()) {
      const int64_t size = pixels - at < rows() ? pixels - at : rows();
      if constexpr (in_blocks<T>) {
        for (int64_t r = 0; r < size; ++r) {
          load_row(x + (at + r) * step, converted + r * channels, channels);
        }
        block(converted, channels, size);
      } else {
        block(x + at * step, step, size);
      }
      join(static_cast<double>(at), static_cast<double>(size));
    }
  }

  template <class E>
  EFFC_MEMBER void block(const E* x, int64_t step, int64_t size) {
    memset(sums, 0, 3 * channels * sizeof(R));
    int64_t r = 0;
    for (; r + 8 <= size; r += 8) add_pixels<8>(x + r * step, step, channels, sums);
    for (; r < size; ++r) add_pixels<1>(x + r * step, step, channels, sums);
    const R share = R(1) / static_cast<R>(size);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) sums[c] *= share;
    for (r = 0; r + 8 <= size; r += 8) {
      add_squares<8>(x + r * step, step, channels, sums, rests, block_squares);
    }
    for (; r < size; ++r) add_squares<1>(x + r * step, step, channels, sums, rests, block_squares);
  }

  // What `block` found joins the `before` pixels that are in.
  EFFC_MEMBER void join(double before, double size) {
    const double share = 1 / size, part = size / (before + size), both = before * part;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const double rest = rests[c], left = rest * share;
      const double delta = sums[c] + left - mean[c];
      mean[c] += delta * part;
      squares[c] += block_squares[c] - rest * left + delta * delta * both;
    }
  }

  // The channels from `first` on as one group.
  EFFC_MEMBER Moments group(int64_t first, int64_t width, int64_t pixels) const {
    double total = 0, within = 0, between = 0;
    for (int64_t c = first; c < first + width; ++c) total += mean[c], within += squares[c];
    const double middle = total / static_cast<double>(width);
    for (int64_t c = first; c < first + width; ++c) {
      between += (mean[c] - middle) * (mean[c] - middle);
    }
    const double n = static_cast<double>(pixels);
    return {n * static_cast<double>(width), middle, within + n * between};
  }
};

// How much of `elements` one task takes, in whole units of `unit` elements.
EFFC_INLINE int64_t chunk_of(int64_t elements, int64_t unit) {
  const int64_t least = MOMENT_CHUNK / unit, even = (elements / unit) / MOMENT_CHUNKS + 1;
  const int64_t chunk = least > even ? least : even;
  return chunk > 0 ? chunk : 1;
}

// The moments of parts, `chunks` of them for each image, become mean and scale of each group.
EFFC_INLINE void join_parts(const Groups& of, const Moments* parts, int64_t chunks, double* mean,
                            double* scale) {
  for (int64_t image = 0; image < of.images; ++image, parts += chunks * of.groups) {
    for (int64_t g = 0; g < of.groups; ++g) {
      Moments all;
      for (int64_t i = 0; i < chunks; ++i) all.join(parts[i * of.groups + g]);
      *mean++ = all.mean;
      *scale++ = of.scale(all.squares);
    }
  }
}

}  // namespace detail

// mean and 1 / sqrt(variance + eps) of each group of each image. Channels lie together; `image` and
// `pixel` are the elements from one to the next.
template <class T>
static inline void pixel_moments(const Groups& of, const T* x, int64_t image, int64_t pixel,
                                 int64_t threads, double* mean, double* scale) {
  const int64_t channels = of.groups * of.width;
  const int64_t chunk = detail::chunk_of(of.pixels * channels, channels);
  const int64_t chunks = (of.pixels + chunk - 1) / chunk;
  Moments* parts = scratch<Moments>(of.images * chunks * of.groups);
  parallel_for(of.images * chunks, 1, threads, [=](int64_t begin, int64_t end) {
    detail::ChannelMoments<T> found(channels);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t first = at % chunks * chunk;
      const int64_t size = of.pixels - first < chunk ? of.pixels - first : chunk;
      found.take(x + at / chunks * image + first * pixel, pixel, size);
      for (int64_t g = 0; g < of.groups; ++g) {
        parts[at * of.groups + g] = found.group(g * of.width, of.width, size);
      }
    }
  });
  detail::join_parts(of, parts, chunks, mean, scale);
  release(parts);
}

// The same for one group, whose elements lie in a row.
template <class T>
static inline void run_moments(const Groups& of, const T* x, double* mean, double* scale) {
  const int64_t run = of.width * of.pixels, chunk = detail::chunk_of(run, 1);
  Moments all;
  for (int64_t at = 0; at < run; at += chunk) {
    all.join(detail::moments_of(x + at, run - at < chunk ? run - at : chunk));
  }
  *mean = all.mean;
  *scale = of.scale(all.squares);
}

// The same for all groups, a group split among threads.
template <class T>
static inline void run_moments(const Groups& of, const T* x, int64_t image, int64_t threads,
                               double* mean, double* scale) {
  const int64_t run = of.width * of.pixels, chunk = detail::chunk_of(run, 1);
  const int64_t chunks = (run + chunk - 1) / chunk, each = chunks * of.groups;
  const int64_t grain = 1 + detail::MOMENT_CHUNK / run;
  Moments* parts = scratch<Moments>(of.images * each);
  parallel_for(of.images * each, grain, threads, [=](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t first = at % each / of.groups * chunk, g = at % of.groups;
      const int64_t size = run - first < chunk ? run - first : chunk;
      parts[at] = detail::moments_of(x + at / each * image + g * run + first, size);
    }
  });
  detail::join_parts(of, parts, chunks, mean, scale);
  release(parts);
}

}  // namespace effc
