// The grouped ragged-LoRA operator for CPUs: y[t] += B (A x[t]) for the tokens of many adapters in one call.
//
// Legend: T tokens, D input features, O output features, R rank, S slices, N adapter slots, G groups.
// Vector extensions of GCC and Clang only: the compiler lowers them to AVX-512, AVX2, NEON or SVE.
// Accumulation is in float32 throughout; the output is rounded once.

#include <cstdint>
#include <cstdlib>
#include <cstring>

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
inline void store(vf value, bf16* to) {
    vu bits;
    std::memcpy(&bits, &value, sizeof bits);
    const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    const vu kept = (bits & 0x7fffffffu) > 0x7f800000u ? vu{} + 0x7fc0u : rounded;
    const vh half = __builtin_convertvector(kept, vh);
    std::memcpy(to, &half, sizeof half);
}
inline float sum(vf v) {
    float total = 0;
    for (int i = 0; i < V; i++) total += v[i];
    return total;
}

// h[t][r] = sum_d A[r][d] x[t][d] for TB tokens and RB rows.
template <typename T, int TB, int RB>
void shrink_block(const T* a, const T* const* x, int64_t D, float* h, int64_t ldh) {
    vf acc[TB][RB] = {};
    int64_t d = 0;
    for (; d + V <= D; d += V) {
        vf row[RB];
        for (int r = 0; r < RB; r++) row[r] = load(a + r * D + d);
        for (int t = 0; t < TB; t++) {
            vf token = load(x[t] + d);
            for (int r = 0; r < RB; r++) acc[t][r] += token * row[r];
        }
    }
    for (int t = 0; t < TB; t++)
        for (int r = 0; r < RB; r++) {
            float total = sum(acc[t][r]);
            for (int64_t tail = d; tail < D; tail++) total += widen(x[t][tail]) * widen(a[r * D + tail]);
            h[t * ldh + r] = total;
        }
}

template <typename T, int TB>
void shrink_tokens(const T* a, const T* const* x, int64_t D, int rows, float* h, int64_t ldh) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) shrink_block<T, TB, 4>(a + r * D, x, D, h + r, ldh);
    for (; r < rows; r++) shrink_block<T, TB, 1>(a + r * D, x, D, h + r, ldh);
}

// y[t][c] += sum_r h[t][r] B[r][c] for TB tokens and CV vectors of columns.
template <typename T, int TB, int CV>
void expand_block(const T* b, int64_t O, const float* const* h, int rank, T* const* y, int64_t column) {
    vf acc[TB][CV] = {};
    for (int r = 0; r < rank; r++) {
        vf row[CV];
        for (int c = 0; c < CV; c++) row[c] = load(b + r * O + column + c * V);
        for (int t = 0; t < TB; t++)
            for (int c = 0; c < CV; c++) acc[t][c] += h[t][r] * row[c];
    }
    for (int t = 0; t < TB; t++)
        for (int c = 0; c < CV; c++) {
            T* out = y[t] + column + c * V;
            store(load(out) + acc[t][c], out);
        }
}

template <typename T, int TB, int CV>
void expand_columns(const T* b, int64_t O, const float* const* h, int rank, T* const* y, int64_t first, int64_t end) {
    int64_t column = first;
    for (; column + CV * V <= end; column += CV * V) expand_block<T, TB, CV>(b, O, h, rank, y, column);
    for (; column + V <= end; column += V) expand_block<T, TB, 1>(b, O, h, rank, y, column);
    for (; column < end; column++)
        for (int t = 0; t < TB; t++) {
            float total = widen(y[t][column]);
            for (int r = 0; r < rank; r++) total += h[t][r] * widen(b[r * O + column]);
            store(total, y[t] + column);
        }
}

constexpr int ROWS = 8;        // A rows of one shrink task
constexpr int COLUMNS = 512;   // B columns of one expand task

struct Call {
    const int64_t* table;      // [S][N][3]: offsets of A and B in the arena, rank
    int64_t slices, slots, D;
    const int64_t* bounds;     // [S + 1]: columns of y where each slice starts
    const int32_t *group_slots, *group_starts, *members;
    int64_t groups;
    const int64_t* entry(int64_t slice, int64_t group) const {
        return table + (slice * slots + group_slots[group]) * 3;
    }
};

template <typename T>
void run(const Call& call, const T* x, int64_t ldx, T* y, int64_t ldy, const T* arena, float* h, int threads) {
    // h: per group a block [tokens of the group][rank of all slices]; slices' A rows are adjacent, so one shrink.
    const int64_t G = call.groups;
    int64_t* at = static_cast<int64_t*>(std::malloc(sizeof(int64_t) * (3 * G + 3)));
    int64_t *h_start = at, *width = at + G + 1, *task_start = at + 2 * G + 1;
    h_start[0] = task_start[0] = 0;
    int64_t column_tasks = 0;
    for (int64_t g = 0; g < G; g++) {
        width[g] = 0;
        for (int64_t s = 0; s < call.slices; s++) width[g] += call.entry(s, g)[2];
        h_start[g + 1] = h_start[g] + width[g] * (call.group_starts[g + 1] - call.group_starts[g]);
        task_start[g + 1] = task_start[g] + (width[g] + ROWS - 1) / ROWS;
    }
    const int64_t chunks = (call.bounds[call.slices] + COLUMNS - 1) / COLUMNS;
    column_tasks = G * chunks;

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < task_start[G]; task++) {
            int64_t g = 0;
            while (task_start[g + 1] <= task) g++;
            const int64_t row = (task - task_start[g]) * ROWS;
            const int rows = int(width[g] - row < ROWS ? width[g] - row : ROWS);
            int64_t first = 0;
            while (!call.entry(first, g)[2]) first++;
            const T* a = arena + call.entry(first, g)[0] + row * call.D;
            const int32_t* member = call.members + call.group_starts[g];
            const int64_t n = call.group_starts[g + 1] - call.group_starts[g];
            float* out = h + h_start[g] + row;
            const T* rows_x[4];
            int64_t t = 0;
            for (; t + 4 <= n; t += 4) {
                for (int i = 0; i < 4; i++) rows_x[i] = x + member[t + i] * ldx;
                shrink_tokens<T, 4>(a, rows_x, call.D, rows, out + t * width[g], width[g]);
            }
            for (; t < n; t++) {
                rows_x[0] = x + member[t] * ldx;
                shrink_tokens<T, 1>(a, rows_x, call.D, rows, out + t * width[g], width[g]);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < column_tasks; task++) {
            const int64_t g = task / chunks, from = task % chunks * COLUMNS;
            const int32_t* member = call.members + call.group_starts[g];
            const int64_t n = call.group_starts[g + 1] - call.group_starts[g];
            int64_t h_column = 0;
            for (int64_t s = 0; s < call.slices; s++) {
                const int64_t* entry = call.entry(s, g);
                const int rank = int(entry[2]);
                const int64_t low = call.bounds[s], O = call.bounds[s + 1] - low;
                const int64_t first = (from > low ? from : low) - low;
                const int64_t end = (from + COLUMNS < low + O ? from + COLUMNS : low + O) - low;
                if (rank && first < end) {
                    const float* base = h + h_start[g] + h_column;
                    const float* rows_h[4];
                    T* rows_y[4];
                    int64_t t = 0;
                    for (; t + 4 <= n; t += 4) {
                        for (int i = 0; i < 4; i++) {
                            rows_h[i] = base + (t + i) * width[g];
                            rows_y[i] = y + member[t + i] * ldy + low;
                        }
                        expand_columns<T, 4, 4>(arena + entry[1], O, rows_h, rank, rows_y, first, end);
                    }
                    for (; t < n; t++) {
                        rows_h[0] = base + t * width[g];
                        rows_y[0] = y + member[t] * ldy + low;
                        expand_columns<T, 1, 16>(arena + entry[1], O, rows_h, rank, rows_y, first, end);
                    }
                }
                h_column += rank;
            }
        }
    }
    std::free(at);
}

}  // namespace

// dtype: 0 float32, 1 bfloat16. h: scratch of (tokens of all groups) x (largest sum of a slot's ranks) floats.
extern "C" void lvnas_ragged(
    int32_t dtype, const void* x, int64_t ldx, void* y, int64_t ldy, const void* arena, const int64_t* table,
    int64_t slices, int64_t slots, int64_t D, const int64_t* bounds, const int32_t* group_slots,
    const int32_t* group_starts, const int32_t* members, int64_t groups, float* h, int32_t threads) {
    Call call{table, slices, slots, D, bounds, group_slots, group_starts, members, groups};
    if (dtype == 0)
        run(call, static_cast<const float*>(x), ldx, static_cast<float*>(y), ldy, static_cast<const float*>(arena), h,
            threads);
    else
        run(call, static_cast<const bf16*>(x), ldx, static_cast<bf16*>(y), ldy, static_cast<const bf16*>(arena), h,
            threads);
}
