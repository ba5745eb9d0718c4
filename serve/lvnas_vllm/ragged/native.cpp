// The grouped ragged-LoRA operator for CPUs: y[t] += B (A x[t]) for the tokens of many adapters in one call.
//
// Legend: T tokens, D input features, O output features, R rank, S slices, N adapter slots, G groups.
// Vector extensions of GCC and Clang: the compiler lowers them to AVX-512, AVX2, NEON or SVE. One intrinsic: the
// bfloat16 dot product, where the processor has it.
// Accumulation is in float32 throughout; the output is rounded once.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int V = 16;
typedef float vf __attribute__((vector_size(V * 4)));
typedef uint32_t vu __attribute__((vector_size(V * 4)));
typedef uint16_t vh __attribute__((vector_size(V * 2)));

struct bf16 { uint16_t bits; };

inline float widen(float value) { return value; }
inline float widen(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
inline void store(float value, float* to) { *to = value; }
inline void store(float value, bf16* to) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    to->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline vf load(const float* from) {
    vf wide;
    std::memcpy(&wide, from, sizeof wide);
    return wide;
}
inline vf load(const bf16* from) {
    vh half;
    std::memcpy(&half, from, sizeof half);
    vu bits = __builtin_convertvector(half, vu) << 16;
    vf wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
inline void store(vf value, float* to) { std::memcpy(to, &value, sizeof value); }
#ifdef __AVX512BF16__
inline void store(vf value, bf16* to) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)value)); }
#else
inline void store(vf value, bf16* to) {
    vu bits;
    std::memcpy(&bits, &value, sizeof bits);
    const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    const vu kept = (bits & 0x7fffffffu) > 0x7f800000u ? vu{} + 0x7fc0u : rounded;
    const vh half = __builtin_convertvector(kept, vh);
    std::memcpy(to, &half, sizeof half);
}
#endif
inline float sum(vf v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < V; i++) total += v[i];
    return total;
#endif
}

// One step of a dot product: WIDTH elements of x and of a row, multiplied and added to 16 float32 sums.
template <typename T>
struct Lane {
    static constexpr int WIDTH = V;
    typedef vf Raw;
    static Raw load(const T* from) { return ::load(from); }
    static vf add(vf sums, Raw x, Raw row) { return sums + x * row; }
};
#ifdef __AVX512BF16__
template <>
struct Lane<bf16> {
    static constexpr int WIDTH = 2 * V;
    typedef __m512bh Raw;
    static Raw load(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
    static vf add(vf sums, Raw x, Raw row) { return (vf)_mm512_dpbf16_ps((__m512)sums, x, row); }
};
#endif

// h[t][r] = sum_d A[r][d] x[t][d] for TB tokens and RB rows. FETCH: A comes from memory, so ask for the rows after
// these; a row is often a page, at whose end the processor's own prefetching stops.
template <typename T, int TB, int RB, bool FETCH>
void shrink_block(const T* a, const T* const* x, int64_t D, float* h, int64_t ldh) {
    typedef Lane<T> L;
    vf acc[TB][RB] = {};
    int64_t d = 0;
    for (; d + L::WIDTH <= D; d += L::WIDTH) {
        typename L::Raw row[RB];
        for (int r = 0; r < RB; r++) {
            if (FETCH) __builtin_prefetch(a + (r + RB) * D + d);
            row[r] = L::load(a + r * D + d);
        }
        for (int t = 0; t < TB; t++) {
            const typename L::Raw token = L::load(x[t] + d);
            for (int r = 0; r < RB; r++) acc[t][r] = L::add(acc[t][r], token, row[r]);
        }
    }
    for (int t = 0; t < TB; t++)
        for (int r = 0; r < RB; r++) {
            float total = sum(acc[t][r]);
            for (int64_t tail = d; tail < D; tail++) total += widen(x[t][tail]) * widen(a[r * D + tail]);
            h[t * ldh + r] = total;
        }
}

template <typename T, int RB>
void shrink_rows(const T* a, const T* const* x, int64_t n, int64_t D, float* h, int64_t ldh) {
    int64_t t = 0;
    if (n >= 4) {
        shrink_block<T, 4, RB, true>(a, x, D, h, ldh);
        for (t = 4; t + 4 <= n; t += 4) shrink_block<T, 4, RB, false>(a, x + t, D, h + t * ldh, ldh);
    } else {
        shrink_block<T, 1, RB, true>(a, x, D, h, ldh);
        t = 1;
    }
    for (; t < n; t++) shrink_block<T, 1, RB, false>(a, x + t, D, h + t * ldh, ldh);
}

template <typename T>
void shrink(const T* a, const T* const* x, int64_t n, int64_t D, int rows, float* h, int64_t ldh) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) shrink_rows<T, 4>(a + r * D, x, n, D, h + r, ldh);
    for (; r < rows; r++) shrink_rows<T, 1>(a + r * D, x, n, D, h + r, ldh);
}

// y[t][c] += sum_r h[t][r] B[r][c] for TB tokens and CV vectors of columns.
template <typename T, int TB, int CV>
void expand_block(const T* b, int64_t O, const float* h, int64_t ldh, int rank, T* const* y, int64_t column) {
    vf acc[TB][CV] = {};
    for (int r = 0; r < rank; r++) {
        vf row[CV];
        for (int c = 0; c < CV; c++) row[c] = load(b + r * O + column + c * V);
        for (int t = 0; t < TB; t++)
            for (int c = 0; c < CV; c++) acc[t][c] += h[t * ldh + r] * row[c];
    }
    for (int t = 0; t < TB; t++)
        for (int c = 0; c < CV; c++) {
            T* out = y[t] + column + c * V;
            store(load(out) + acc[t][c], out);
        }
}

template <typename T, int CV>
void expand_column(const T* b, int64_t O, const float* h, int64_t ldh, int rank, T* const* y, int64_t n, int64_t at) {
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) expand_block<T, 4, CV>(b, O, h + t * ldh, ldh, rank, y + t, at);
    for (; t < n; t++) expand_block<T, 1, CV>(b, O, h + t * ldh, ldh, rank, y + t, at);
}

#ifdef __AVX512BF16__
// The same for 64 columns of a packed panel and bfloat16 h: TB tokens' sums stay in registers.
template <int TB>
void expand_pairs(const __m512i* panel, int pairs, const bf16* h, int64_t ldh, bf16* const* y, int64_t column) {
    __m512 acc[TB][4] = {};
    for (int p = 0; p < pairs; p++)
        for (int t = 0; t < TB; t++) {
            int32_t both;
            std::memcpy(&both, h + t * ldh + 2 * p, sizeof both);
            const __m512bh factor = (__m512bh)_mm512_set1_epi32(both);
            for (int c = 0; c < 4; c++) acc[t][c] = _mm512_dpbf16_ps(acc[t][c], factor, (__m512bh)panel[4 * p + c]);
        }
    for (int t = 0; t < TB; t++)
        for (int c = 0; c < 4; c++) {
            bf16* out = y[t] + column + c * V;
            store(load(out) + (vf)acc[t][c], out);
        }
}

// Columns from `column` on, 64 at a time, for n tokens; returns the first column left to do. B is packed first, two rows
// interleaved: its rows are read as long as they are, since B comes from memory, and a panel's own rows would share
// few cache sets where O is a multiple of 2048.
int64_t expand_tile(const bf16* b, int64_t O, const float* h, int64_t ldh, int rank, bf16* const* y, int64_t n,
                    int64_t column, int64_t end) {
    const int pairs = (rank + 1) / 2;
    const int64_t panels = (end - column) / 64, width = (rank + V - 1) / V * V;
    static thread_local std::vector<__m512i> packed;
    static thread_local std::vector<bf16> rounded;
    if (packed.size() < size_t(panels * pairs * 4)) packed.resize(panels * pairs * 4);
    if (rounded.size() < size_t(n * width)) rounded.resize(n * width);
    for (int64_t t = 0; t < n; t++)
        for (int r = 0; r < rank; r += V) {
            const __mmask16 valid = rank - r < V ? (1u << (rank - r)) - 1 : 0xffffu;
            store((vf)_mm512_maskz_loadu_ps(valid, h + t * ldh + r), &rounded[t * width + r]);
        }
    alignas(64) uint16_t order[2][32];  // of two rows' elements, those of 16 columns
    for (int i = 0; i < 32; i++) order[0][i] = uint16_t(i / 2 + i % 2 * 32), order[1][i] = uint16_t(order[0][i] + 16);
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int p = 0; p < pairs; p++) {
        const bf16* row = b + 2 * p * O + column;
        const bool two = 2 * p + 1 < rank;
        for (int64_t c = 0; c < panels * 2; c++) {
            __builtin_prefetch(row + 2 * O + c * 32);
            __builtin_prefetch(row + 3 * O + c * 32);
            const __m512i first = _mm512_loadu_si512(row + c * 32);
            const __m512i second = two ? _mm512_loadu_si512(row + O + c * 32) : _mm512_setzero_si512();
            __m512i* to = &packed[(c / 2 * pairs + p) * 4 + c % 2 * 2];
            to[0] = _mm512_permutex2var_epi16(first, low, second);
            to[1] = _mm512_permutex2var_epi16(first, high, second);
        }
    }
    for (int64_t panel = 0; panel < panels; panel++, column += 64) {
        const __m512i* from = &packed[panel * pairs * 4];
        int64_t t = 0;
        for (; t + 4 <= n; t += 4) expand_pairs<4>(from, pairs, &rounded[t * width], width, y + t, column);
        for (; t < n; t++) expand_pairs<1>(from, pairs, &rounded[t * width], width, y + t, column);
    }
    return column;
}
#endif
template <typename T>
int64_t expand_tile(const T*, int64_t, const float*, int64_t, int, T* const*, int64_t, int64_t column, int64_t) {
    return column;
}

// sums[c] += sum_i h[i] B[i][first + c] for RB rows of B, read as long as they are: B comes from memory.
template <typename T, int RB>
void stream_rows(const T* b, int64_t O, const float* h, float* sums, int64_t columns) {
    for (int64_t c = 0; c + V <= columns; c += V) {
        vf total = load(sums + c);
        for (int r = 0; r < RB; r++) {
            __builtin_prefetch(b + (r + RB) * O + c);
            total += h[r] * load(b + r * O + c);
        }
        store(total, sums + c);
    }
}

constexpr int ROWS = 16;       // A rows of one shrink task
constexpr int COLUMNS = 1024;  // B columns of one expand task
constexpr int TILE = 64;       // tokens of one task

// The columns [first, end) of a slice for n tokens of one adapter.
template <typename T>
void expand(const T* b, int64_t O, const float* h, int64_t ldh, int rank, T* const* y, int64_t n, int64_t first,
            int64_t end) {
    int64_t column = first;
    if (n < 4)
        for (int64_t t = 0; t < n; t++) {
            alignas(64) float sums[COLUMNS] = {};
            const int64_t whole = (end - first) / V * V;
            int r = 0;
            for (; r + 4 <= rank; r += 4) stream_rows<T, 4>(b + r * O + first, O, h + t * ldh + r, sums, whole);
            for (; r < rank; r++) stream_rows<T, 1>(b + r * O + first, O, h + t * ldh + r, sums, whole);
            T* out = y[t] + first;
            for (int64_t c = 0; c < whole; c += V) store(load(out + c) + load(sums + c), out + c);
            column = first + whole;
        }
    else
        column = expand_tile(b, O, h, ldh, rank, y, n, first, end);
    for (; column + 4 * V <= end; column += 4 * V) expand_column<T, 4>(b, O, h, ldh, rank, y, n, column);
    for (; column + V <= end; column += V) expand_column<T, 1>(b, O, h, ldh, rank, y, n, column);
    for (; column < end; column++)
        for (int64_t t = 0; t < n; t++) {
            float total = widen(y[t][column]);
            for (int r = 0; r < rank; r++) total += h[t * ldh + r] * widen(b[r * O + column]);
            store(total, y[t] + column);
        }
}

struct Call {
    const int64_t* table;      // [S][N][3]: offsets of A and B in the arena, rank
    int64_t slices, slots, D;
    const int64_t* bounds;     // [S + 1]: columns of y where each slice starts
    const int32_t *group_slots, *group_starts, *members;
    int64_t groups;
    const int64_t* entry(int64_t slice, int64_t group) const {
        return table + (slice * slots + group_slots[group]) * 3;
    }
    int64_t tokens(int64_t group) const { return group_starts[group + 1] - group_starts[group]; }
};

// Pointers to the rows of up to TILE tokens, from the tile's first.
template <typename T>
int64_t rows_of(const Call& call, int64_t group, int64_t tile, T* matrix, int64_t stride, T** rows) {
    const int64_t from = tile * TILE, n = std::min<int64_t>(call.tokens(group) - from, TILE);
    for (int64_t i = 0; i < n; i++) rows[i] = matrix + call.members[call.group_starts[group] + from + i] * stride;
    return n;
}

template <typename T>
void run(const Call& call, const T* x, int64_t ldx, T* y, int64_t ldy, const T* arena, int threads) {
    const int64_t G = call.groups, chunks = (call.bounds[call.slices] + COLUMNS - 1) / COLUMNS;
    std::vector<int64_t> h_start(G + 1), width(G), shrinks(G + 1), expands(G + 1);  // the last two: tasks before a group
    for (int64_t g = 0; g < G; g++) {
        for (int64_t s = 0; s < call.slices; s++) width[g] += call.entry(s, g)[2];
        const int64_t tiles = (call.tokens(g) + TILE - 1) / TILE;
        h_start[g + 1] = h_start[g] + width[g] * call.tokens(g);
        shrinks[g + 1] = shrinks[g] + tiles * ((width[g] + ROWS - 1) / ROWS);
        expands[g + 1] = expands[g] + (width[g] ? tiles * chunks : 0);
    }
    // Per group a block [tokens of the group][rank of all slices]; slices' A rows are adjacent, so one shrink.
    static thread_local std::vector<float> scratch;
    if (scratch.size() < size_t(h_start[G])) scratch.resize(h_start[G]);
    float* const h = scratch.data();
    const auto group_of = [](const std::vector<int64_t>& before, int64_t task) {
        return std::upper_bound(before.begin(), before.end(), task) - before.begin() - 1;
    };

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(guided)
        for (int64_t task = 0; task < shrinks[G]; task++) {
            const int64_t g = group_of(shrinks, task), blocks = (width[g] + ROWS - 1) / ROWS;
            const int64_t tile = (task - shrinks[g]) / blocks, row = (task - shrinks[g]) % blocks * ROWS;
            int64_t first = 0;
            while (!call.entry(first, g)[2]) first++;
            const T* tokens[TILE];
            const int64_t n = rows_of(call, g, tile, x, ldx, tokens);
            shrink(arena + call.entry(first, g)[0] + row * call.D, tokens, n, call.D,
                   int(std::min<int64_t>(width[g] - row, ROWS)), h + h_start[g] + tile * TILE * width[g] + row, width[g]);
        }
#pragma omp for schedule(guided)
        for (int64_t task = 0; task < expands[G]; task++) {
            const int64_t g = group_of(expands, task), tile = (task - expands[g]) / chunks;
            const int64_t from = (task - expands[g]) % chunks * COLUMNS;
            const float* rows_h = h + h_start[g] + tile * TILE * width[g];
            T* tokens[TILE];
            const int64_t n = rows_of(call, g, tile, y, ldy, tokens);
            for (int64_t s = 0; s < call.slices; s++) {
                const int64_t* entry = call.entry(s, g);
                const int rank = int(entry[2]);
                const int64_t low = call.bounds[s], O = call.bounds[s + 1] - low;
                const int64_t first = std::max(from, low) - low, end = std::min(from + COLUMNS, low + O) - low;
                if (rank && first < end) {
                    T* slice[TILE];
                    for (int64_t i = 0; i < n; i++) slice[i] = tokens[i] + low;
                    expand(arena + entry[1], O, rows_h, width[g], rank, slice, n, first, end);
                }
                rows_h += rank;
            }
        }
    }
}

}  // namespace

// dtype: 0 float32, 1 bfloat16.
extern "C" void lvnas_ragged(
    int32_t dtype, const void* x, int64_t ldx, void* y, int64_t ldy, const void* arena, const int64_t* table,
    int64_t slices, int64_t slots, int64_t D, const int64_t* bounds, const int32_t* group_slots,
    const int32_t* group_starts, const int32_t* members, int64_t groups, int32_t threads) {
    Call call{table, slices, slots, D, bounds, group_slots, group_starts, members, groups};
    if (dtype == 0)
        run(call, static_cast<const float*>(x), ldx, static_cast<float*>(y), ldy, static_cast<const float*>(arena),
            threads);
    else
        run(call, static_cast<const bf16*>(x), ldx, static_cast<bf16*>(y), ldy, static_cast<const bf16*>(arena),
            threads);
}
