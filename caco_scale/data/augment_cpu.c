/* The augmentation of augment.py on a CPU, an image at a time: its uint8 or uint16 crop in, normalised float32 out.
 *
 * Every row goes through the colours while it is in the nearest cache. Contrast needs the mean of the whole image as it
 * stands there, and blur the rows around: only they make another pass. Plain loops that compilers turn into vector
 * instructions; no Python in here, it is called through ctypes (augment_cpu.py). pyproject.toml builds it.
 *
 * Shapes: n images, h and w pixels, c channels, k size of the blur kernels.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=haswell", "default"))) /* chosen when it is loaded */
#else
#define FOR_EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BRIGHTNESS, CONTRAST, SATURATION, HUE };
enum { LANES = 16, TILE = 32, MOST_THREADS = 256, MOST_RADIUS = 512 };

const char caco_augment_source[] = SOURCE_SHA256; /* of this file: augment_cpu.py refuses what was built of another */

/* As Arguments in augment_cpu.py. Parameters are one an image, as augment() takes them; order NULL: none, images are only
 * normalised. Strides are of the output, in floats. */
typedef struct {
  int64_t n, h, w, c, k, bytes;
  const void *crops;
  const uint8_t *jitter, *grayscale, *blur, *solarize, *flip;
  const double *brightness, *contrast, *saturation, *hue, *solarize_threshold, *blur_kernel;
  const int64_t *order;
  const double *mean, *std;
  float *out;
  int64_t channel_stride, row_stride, column_stride;
} Arguments;

INLINE float clamp(float x) {
  x = x > 0 ? x : 0;
  return x < 1 ? x : 1;
}

INLINE void luma(float *restrict out, float *const *rows, int64_t c, int64_t w) {
  if (c == 3) {
    const float *restrict r = rows[0], *restrict g = rows[1], *restrict b = rows[2];
    for (int64_t x = 0; x < w; x++) out[x] = r[x] * 0.2989f + g[x] * 0.587f + b[x] * 0.114f;
    return;
  }
  memset(out, 0, w * sizeof(float));
  for (int64_t i = 0; i < c; i++)
    for (int64_t x = 0; x < w; x++) out[x] += rows[i][x];
  for (int64_t x = 0; x < w; x++) out[x] /= (float)c;
}

INLINE double sum(const float *row, int64_t w) {
  float lanes[LANES] = {0};
  double total = 0;
  int64_t x = 0;
  for (; x + LANES <= w; x += LANES)
    for (int i = 0; i < LANES; i++) lanes[i] += row[x + i];
  for (; x < w; x++) total += row[x];
  for (int i = 0; i < LANES; i++) total += lanes[i];
  return total;
}

INLINE void blend(float *row, float factor, float target, int64_t w) {
  for (int64_t x = 0; x < w; x++) row[x] = clamp(target + row[x] * factor);
}

INLINE void saturate(float *const *rows, float factor, float to_luma, float *restrict grey, int64_t w) {
  luma(grey, rows, 3, w);
  for (int i = 0; i < 3; i++) {
    float *restrict row = rows[i];
    for (int64_t x = 0; x < w; x++) row[x] = clamp(to_luma * grey[x] + row[x] * factor);
  }
}

INLINE float hue_weight(float turn) {
  float sixth = (turn - (float)(int32_t)turn) * 6 - 3;
  return clamp((sixth < 0 ? -sixth : sixth) - 1);
}

INLINE void rotate_hue(float *const *rows, float shift, int64_t w) {
  float *restrict r = rows[0], *restrict g = rows[1], *restrict b = rows[2];
  for (int64_t x = 0; x < w; x++) {
    float red = r[x], green = g[x], blue = b[x];
    float most = red > green ? red : green, least = red < green ? red : green;
    most = most > blue ? most : blue;
    least = least < blue ? least : blue;
    float chroma = most - least;
    float above = most == red ? green - blue : most == green ? blue - red : red - green;
    float sector = most == red ? 0.0f : most == green ? 2.0f : 4.0f;
    float turn = (above / (chroma == 0 ? 1.0f : chroma) + sector) / 6 + (shift + 2);
    r[x] = least + chroma * hue_weight(turn);
    g[x] = least + chroma * hue_weight(turn + 2.0f / 3);
    b[x] = least + chroma * hue_weight(turn + 1.0f / 3);
  }
}

/* What one image goes through. */
typedef struct {
  int order[4], count, contrast; /* operations of the jitter, how many, the place of contrast among them or count */
  float factor[4], rest[4];      /* of each operation; rest: 1 - factor */
  int grey, blur, solarize, flip, radius;
  float threshold, mean_luma;
  float kernel[MOST_RADIUS + 1]; /* from its centre on */
} Plan;

INLINE Plan plan_of(const Arguments *a, int64_t image) {
  Plan p = {0};
  if (!a->order) return p; /* only normalised */
  const double *factors[4] = {a->brightness, a->contrast, a->saturation, a->hue};
  for (int i = 0; i < 4 && a->jitter[image]; i++) {
    int operation = (int)a->order[4 * image + i] & 3;
    if (a->c == 3 || operation <= CONTRAST) p.order[p.count++] = operation;
    p.factor[operation] = (float)factors[operation][image];
    p.rest[operation] = (float)(1 - factors[operation][image]);
  }
  while (p.contrast < p.count && p.order[p.contrast] != CONTRAST) p.contrast++;
  p.grey = a->c == 3 && a->grayscale[image];
  p.solarize = a->solarize[image];
  p.flip = a->flip[image];
  p.threshold = (float)a->solarize_threshold[image];
  p.blur = a->blur[image];
  p.radius = (int)(a->k / 2);
  for (int i = 0; i <= p.radius; i++) p.kernel[i] = (float)a->blur_kernel[image * a->k + a->k / 2 + i];
  while (p.radius && p.kernel[p.radius] < 1e-9f) p.radius--; /* of a small sigma: below a float's last bit */
  return p;
}

/* Operations [first, last) of the jitter on the rows of an image's channels. spare: a row. */
INLINE void colour(float *const *rows, const Plan *p, int first, int last, float *spare, int64_t c, int64_t w) {
  for (int i = first; i < last; i++) {
    float factor = p->factor[p->order[i]], rest = p->rest[p->order[i]];
    if (p->order[i] == SATURATION) saturate(rows, factor, rest, spare, w);
    else if (p->order[i] == HUE) rotate_hue(rows, factor, w);
    else
      for (int64_t j = 0; j < c; j++)
        blend(rows[j], factor, p->order[i] == CONTRAST ? rest * p->mean_luma : 0, w);
  }
}

INLINE int64_t mirrored(int64_t y, int64_t h) { return y < 0 ? -y : y >= h ? 2 * (h - 1) - y : y; }

/* out[x] = the sum over i of kernel[i] (ups[i][x] + downs[i][x]), and kernel[0] ups[0][x]: as many x at a time as
 * registers hold. */
INLINE void weigh(float *restrict out, const float *const *ups, const float *const *downs, const Plan *p, int64_t w) {
  for (int64_t start = 0; start < w; start += TILE) {
    float sums[TILE];
    int64_t x = start + TILE <= w || w < TILE ? start : w - TILE; /* the last tile overlaps the one before it */
    int64_t wide = w < TILE ? w : TILE;
    const float *centre = ups[0] + x;
    float weight = p->kernel[0];
    if (wide == TILE) {
      for (int j = 0; j < TILE; j++) sums[j] = centre[j] * weight;
      for (int i = 1; i <= p->radius; i++) {
        const float *up = ups[i] + x, *down = downs[i] + x;
        weight = p->kernel[i];
        for (int j = 0; j < TILE; j++) sums[j] += (up[j] + down[j]) * weight;
      }
      memcpy(out + x, sums, sizeof(sums));
    } else
      for (int64_t j = 0; j < wide; j++) {
        float total = centre[j] * weight;
        for (int i = 1; i <= p->radius; i++) total += (ups[i][x + j] + downs[i][x + j]) * p->kernel[i];
        out[x + j] = total;
      }
  }
}

/* One row of a plane (h, w), blurred, into out; padded: a row with radius more at either end. */
INLINE void blur_row(const float *plane, const Plan *p, int64_t y, float *padded, float *out, const float **ups,
                     const float **downs, int64_t h, int64_t w) {
  float *middle = padded + p->radius;
  for (int i = 0; i <= p->radius; i++) {
    ups[i] = plane + mirrored(y - i, h) * w;
    downs[i] = plane + mirrored(y + i, h) * w;
  }
  weigh(middle, ups, downs, p, w);
  for (int i = 1; i <= p->radius; i++) {
    middle[-i] = middle[i];
    middle[w - 1 + i] = middle[w - 1 - i];
  }
  for (int i = 0; i <= p->radius; i++) {
    ups[i] = middle - i;
    downs[i] = middle + i;
  }
  weigh(out, ups, downs, p, w);
}

/* Solarize, flip and normalise a row of channel i into the output. spare: a row. */
INLINE void finish_row(const float *restrict row, const Arguments *a, const Plan *p, float *out, float *restrict spare,
                       int64_t i, int64_t y) {
  float mean = (float)a->mean[i], std = (float)a->std[i];
  int64_t w = a->w, stride = a->column_stride;
  float *restrict target = out + i * a->channel_stride + y * a->row_stride;
  float threshold = p->solarize ? p->threshold : 2;
  for (int64_t x = 0; x < w; x++) spare[x] = ((row[x] >= threshold ? 1 - row[x] : row[x]) - mean) / std;
  if (stride > 1)
    for (int64_t x = 0; x < w; x++) target[x * stride] = spare[p->flip ? w - 1 - x : x];
  else if (p->flip)
    for (int64_t x = 0; x < w; x++) target[x] = spare[w - 1 - x];
  else memcpy(target, spare, w * sizeof(float));
}

INLINE void load_row(float *const *rows, const Arguments *a, const float *levels, int64_t pixel) {
  for (int64_t i = 0; i < a->c; i++) {
    const uint8_t *bytes = (const uint8_t *)a->crops + pixel * a->c + i;
    const uint16_t *words = (const uint16_t *)a->crops + pixel * a->c + i;
    float *restrict row = rows[i];
    if (a->bytes == 1)
      for (int64_t x = 0; x < a->w; x++) row[x] = levels[bytes[x * a->c]];
    else
      for (int64_t x = 0; x < a->w; x++) row[x] = (float)words[x * a->c] / 65535;
  }
}

/* After the colours of row y: greyscale, and all that follows if no blur does. */
INLINE void end_colours(float *const *rows, const Arguments *a, const Plan *p, float *out, float *spare, int64_t y) {
  if (p->grey) {
    luma(spare, rows, 3, a->w);
    memcpy(rows[0], spare, a->w * sizeof(float));
  }
  for (int64_t i = 0; i < a->c && !p->blur; i++) finish_row(rows[p->grey ? 0 : i], a, p, out, spare, i, y);
}

/* One image. planes: (c, h, w); spare: three rows with k more; rows: c pointers. */
FOR_EACH_CPU void caco_augment_image(const Arguments *a, int64_t image, const float *levels, float *planes,
                                     float *spare, float **rows) {
  int64_t h = a->h, w = a->w, c = a->c;
  Plan p = plan_of(a, image);
  int needs_mean = p.contrast < p.count, keeps = needs_mean || p.blur;
  float *out = a->out + image * c * h * w;
  double total = 0;
  for (int64_t y = 0; y < h; y++) {
    for (int64_t i = 0; i < c; i++) rows[i] = planes + (keeps ? i * h + y : i) * w;
    load_row(rows, a, levels, (image * h + y) * w);
    colour(rows, &p, 0, p.contrast, spare, c, w);
    if (needs_mean) {
      luma(spare, rows, c, w);
      total += sum(spare, w);
    } else end_colours(rows, a, &p, out, spare, y);
  }
  p.mean_luma = (float)(total / (double)(h * w));
  for (int64_t y = 0; y < h && needs_mean; y++) {
    for (int64_t i = 0; i < c; i++) rows[i] = planes + (i * h + y) * w;
    colour(rows, &p, p.contrast, p.count, spare, c, w);
    end_colours(rows, a, &p, out, spare, y);
  }
  float *blurred = spare + w, *padded = blurred + w;
  const float *ups[MOST_RADIUS + 1], *downs[MOST_RADIUS + 1];
  for (int64_t y = 0; y < h && p.blur; y++)
    for (int64_t i = 0; i < c; i++) {
      if (i == 0 || !p.grey) blur_row(planes + i * h * w, &p, y, padded, blurred, ups, downs, h, w);
      finish_row(blurred, a, &p, out, spare, i, y);
    }
}

typedef struct {
  const Arguments *arguments;
  atomic_llong next, failed;
} Work;

static void *work_on(void *pointer) {
  Work *work = pointer;
  const Arguments *a = work->arguments;
  float levels[256];
  for (int i = 0; i < 256; i++) levels[i] = (float)i / 255;
  float *planes = malloc((a->c * a->h * a->w + 3 * (a->w + a->k)) * sizeof(float));
  float **rows = malloc(a->c * sizeof(float *));
  if (!planes || !rows) atomic_store(&work->failed, 1);
  else
    for (int64_t image; (image = atomic_fetch_add(&work->next, 1)) < a->n;)
      caco_augment_image(a, image, levels, planes, planes + a->c * a->h * a->w, rows);
  free(planes);
  free(rows);
  return NULL;
}

/* All images, by so many threads, of which the caller is one. 0, or 1 where there is no memory. */
int caco_augment(const Arguments *arguments, int threads) {
  Work work = {.arguments = arguments};
  pthread_t others[MOST_THREADS];
  int started = 0;
  if (threads > arguments->n) threads = (int)arguments->n;
  while (started < threads - 1 && started < MOST_THREADS)
    if (pthread_create(&others[started], NULL, work_on, &work)) break;
    else started++;
  work_on(&work);
  while (started) pthread_join(others[--started], NULL);
  return (int)atomic_load(&work.failed);
}
