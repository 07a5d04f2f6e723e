// Attention of a block of queries over one rank's keys, and its gradients.  The head of tile.cuh
// comes first: it says which lane holds which numbers of `p[r][n][i]`.
//
//     s = scale q k^T      p = exp(s - rowmax s)      out = p v / rowsum p
//     p = exp(s - lse)     dv = p^T dout
//     ds = p (dout v^T - delta)      dq = scale ds k      dk = scale ds^T q
//
// delta = rowsum(dout out) - dlse and, for the backward, lse over all keys of all ranks are given.
//
// A block of threads keeps a tile of rows in shared memory and lets tiles of columns pass by; the
// next one is on its way while this one is worked on.  Each step closes a group of copies, be it
// empty, as the last one's is: so "all groups but the latest" is this step's tile in every step.
//
//     kernel          rows              columns        sums             then
//     forward         queries           keys           out, max, sum    merge_splits
//     backward_q      queries           keys           dq               sum_splits
//     backward_kv     keys              queries        dk, dv           added to what is there
//
// Few queries make few tiles of rows.  So `forward` and `backward_q` cut the keys into `splits`,
// which are worked on at the same time and joined in their order.  No sum is made by several blocks
// at once: the same call gives the same bits.
//
// The query heads that share a key-value head lie one under the other in memory: its `rows` are
// G s_q, and keys are read once for all of them.  `pair` counts batch entries and key-value heads.
//
// Names: R tiles of 16 rows are a warp's, r is one of them, and h its upper or lower eight rows (no
// head); C tiles of 8 columns are a step's, n is one of them, and e one of a lane's two columns.
//
// Scores and lse are taken in powers of 2, whose exponential the device has.  fp16 reaches from
// 6e-8 to 65504: p, at most 1, is kept times 2^BOOST; ds may be of any size, so that `fit_rows`
// brings each row into range by a power of two of its own.
//
// What would make it faster on newer devices: sm_90's warpgroup products and bulk copies, for which
// `multiply_rows`, `multiply_sums` and `load_tile` of tile.cuh are the places; and a backward that
// makes the scores once, where here both of its kernels make them: seven products instead of five,
// for sums that are always made in one order.
//
// Built by build.py, which puts ptx.cuh and tile.cuh before it and defines SCALAR, the type of q, k,
// v and dout; HEAD_DIM; and for each kernel its WARPS, ROW_TILES (of 16 rows, for each warp) and
// COLS.

using T = SCALAR;  // `T()`, as an argument, chooses among functions of one name

// ---------------------------------------------------------------------------------- forward

// out (splits, pairs, rows, D), lse (splits, pairs, rows): softmax over each split's keys alone.
extern "C" __global__ void __launch_bounds__(32 * FORWARD_WARPS)
forward(float* out, float* lse, const T* q, const T* k, const T* v,
        long long k_batch, long long k_head, long long k_row,
        long long v_batch, long long v_head, long long v_row,
        int H_KV, int rows, int s_kv, int split_keys, float scale) {
    constexpr int WARPS = FORWARD_WARPS, R = FORWARD_ROW_TILES, COLS = FORWARD_COLS;
    constexpr int ROWS = 16 * R * WARPS, THREADS = 32 * WARPS, C = COLS / 8, TILE = COLS * PITCH<T>;
    T* q_tile = reinterpret_cast<T*>(block_memory());
    T* k_tile = q_tile + ROWS * PITCH<T>;  // two of them, one for the next step
    T* v_tile = k_tile + 2 * TILE;

    const int pair = blockIdx.z, pairs = gridDim.z, first_row = blockIdx.x * ROWS;
    const int begin = blockIdx.y * split_keys, end = min(begin + split_keys, s_kv);
    k += pair / H_KV * k_batch + pair % H_KV * k_head;
    v += pair / H_KV * v_batch + pair % H_KV * v_head;
    q += (static_cast<long long>(pair) * rows + first_row) * D;

    const float to_log2 = scale * LOG2E;
    // Of each row: sums of p v, the highest score so far, and the sum of p in this lane's columns.
    float sums[R][D / 8][4] = {}, top[R][2], total[R][2] = {};
    #pragma unroll
    for (int r = 0; r < R; r++) top[r][0] = top[r][1] = -INF;

    load_tile<ROWS, THREADS>(q_tile, q, D, rows - first_row);
    load_tile<COLS, THREADS>(k_tile, k + begin * k_row, k_row, end - begin);
    load_tile<COLS, THREADS>(v_tile, v + begin * v_row, v_row, end - begin);
    close_copies();
    #pragma unroll 1
    for (int key = begin, now = 0; key < end; key += COLS, now ^= 1) {
        // 1. Begin to load the next keys, and wait for these.
        const int next = key + COLS;
        if (next < end) {
            load_tile<COLS, THREADS>(k_tile + (now ^ 1) * TILE, k + next * k_row, k_row, end - next);
            load_tile<COLS, THREADS>(v_tile + (now ^ 1) * TILE, v + next * v_row, v_row, end - next);
        }
        close_copies();
        wait_for_copies<1>();
        __syncthreads();

        // 2. Scores, in powers of 2; -inf past the last key.
        float p[R][C][4] = {}, highest[R][2], shrink[R][2];
        multiply_rows(p, q_tile + warp_of() * 16 * R * PITCH<T>, k_tile + now * TILE);
        #pragma unroll
        for (int r = 0; r < R; r++)
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                highest[r][h] = top[r][h];
                #pragma unroll
                for (int n = 0; n < C; n++)
                    #pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float& s = p[r][n][2 * h + e];
                        s = key + 8 * n + 2 * (lane_of() % 4) + e < end ? s * to_log2 : -INF;
                        highest[r][h] = fmaxf(highest[r][h], s);
                    }
                highest[r][h] = row_max(highest[r][h]);
            }
        // 3. Softmax as it runs: what was summed shrinks when a higher score comes.
        bool higher = false;
        #pragma unroll
        for (int r = 0; r < R; r++)
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                const float base = highest[r][h] == -INF ? 0 : highest[r][h];  // not -inf - -inf
                shrink[r][h] = exp2f(top[r][h] - base);
                top[r][h] = highest[r][h];
                total[r][h] *= shrink[r][h];
                higher |= shrink[r][h] != 1;
                #pragma unroll
                for (int n = 0; n < C; n++)
                    #pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float& s = p[r][n][2 * h + e];
                        s = exp2f(s - base + BOOST<T>);
                        total[r][h] += s;
                    }
            }
        if (__any_sync(~0u, higher)) {  // seldom: high scores are met early
            #pragma unroll
            for (int r = 0; r < R; r++)
                #pragma unroll
                for (int n = 0; n < D / 8; n++)
                    #pragma unroll
                    for (int i = 0; i < 4; i++) sums[r][n][i] *= shrink[r][i / 2];
        }
        multiply_sums(sums, p, v_tile + now * TILE);
        __syncthreads();  // all have read this tile: the next step overwrites it
    }

    // 4. Divide, and store the rows that there are.
    #pragma unroll
    for (int r = 0; r < R; r++)
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const float sum = row_sum(total[r][h]);
            const int row = first_row + (warp_of() * R + r) * 16 + 8 * h + lane_of() / 4;
            if (row >= rows) continue;
            const long long line = (static_cast<long long>(blockIdx.y) * pairs + pair) * rows + row;
            const float weight = sum == 0 ? 0 : 1 / sum;
            #pragma unroll
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<float2*>(out + line * D + 8 * n + 2 * (lane_of() % 4)) =
                    make_float2(sums[r][n][2 * h] * weight, sums[r][n][2 * h + 1] * weight);
            if (lane_of() % 4 == 0)
                lse[line] = sum == 0 ? -INF : top[r][h] * LN2 + logf(sum * exp2f(-BOOST<T>));
        }
}

// The merge of splits: a warp takes a row.
//
//     total = sum exp(lse_i - top)      out = sum exp(lse_i - top) / total out_i
//     lse = top + log total             top = max lse_i
extern "C" __global__ void __launch_bounds__(32 * JOIN_WARPS)
merge_splits(float* out, float* lse, const float* out_parts, const float* lse_parts,
             int splits, long long lines) {
    const long long line = static_cast<long long>(blockIdx.x) * JOIN_WARPS + warp_of();
    if (line >= lines) return;
    float top = -INF, total = 0;
    for (int i = 0; i < splits; i++) top = fmaxf(top, lse_parts[i * lines + line]);
    top = top == -INF ? 0 : top;
    for (int i = 0; i < splits; i++) total += expf(lse_parts[i * lines + line] - top);
    const float share = total == 0 ? 0 : 1 / total;
    float sums[D / 32] = {};
    for (int i = 0; i < splits; i++) {
        const float weight = share * expf(lse_parts[i * lines + line] - top);
        #pragma unroll
        for (int n = 0; n < D / 32; n++)
            sums[n] += weight * out_parts[(i * lines + line) * D + 32 * n + lane_of()];
    }
    #pragma unroll
    for (int n = 0; n < D / 32; n++) out[line * D + 32 * n + lane_of()] = sums[n];
    if (lane_of() == 0) lse[line] = total == 0 ? -INF : top + logf(total);
}

// --------------------------------------------------------------------------------- backward

// What exp2 takes from a score: lse in powers of 2.  A row that sees nothing, or is none, has p = 0.
__device__ __forceinline__ float shift_of(const float* lse, int row, int rows) {
    const float x = row < rows ? lse[row] : -INF;
    return x == -INF ? INF : x * LOG2E - BOOST<T>;
}

// dq (splits, pairs, rows, D): the share of each split's keys.
extern "C" __global__ void __launch_bounds__(32 * BACKWARD_Q_WARPS)
backward_q(float* dq, const T* dout, const T* q, const T* k, const T* v, const float* lse,
           const float* delta,
           long long k_batch, long long k_head, long long k_row,
           long long v_batch, long long v_head, long long v_row,
           int H_KV, int rows, int s_kv, int split_keys, float scale) {
    constexpr int WARPS = BACKWARD_Q_WARPS, R = BACKWARD_Q_ROW_TILES, COLS = BACKWARD_Q_COLS;
    constexpr int ROWS = 16 * R * WARPS, THREADS = 32 * WARPS, C = COLS / 8, TILE = COLS * PITCH<T>;
    T* q_tile = reinterpret_cast<T*>(block_memory());
    T* dout_tile = q_tile + ROWS * PITCH<T>;
    T* k_tile = dout_tile + ROWS * PITCH<T>;
    T* v_tile = k_tile + 2 * TILE;

    const int pair = blockIdx.z, pairs = gridDim.z, first_row = blockIdx.x * ROWS;
    const int begin = blockIdx.y * split_keys, end = min(begin + split_keys, s_kv);
    const long long first_line = static_cast<long long>(pair) * rows;
    k += pair / H_KV * k_batch + pair % H_KV * k_head;
    v += pair / H_KV * v_batch + pair % H_KV * v_head;
    lse += first_line;
    delta += first_line;

    const int warp_row = warp_of() * 16 * R;
    const float to_log2 = scale * LOG2E;
    // Of each row: sums of ds k in units of `fit_rows`, the unit, lse as exp2 takes it, and delta.
    float sums[R][D / 8][4] = {}, unit[R][2], shift[R][2], minus[R][2];
    #pragma unroll
    for (int r = 0; r < R; r++)
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first_row + warp_row + 16 * r + 8 * h + lane_of() / 4;
            unit[r][h] = LARGEST_UNIT;
            shift[r][h] = shift_of(lse, row, rows);
            minus[r][h] = row < rows ? delta[row] : 0;
        }

    load_tile<ROWS, THREADS>(q_tile, q + (first_line + first_row) * D, D, rows - first_row);
    load_tile<ROWS, THREADS>(dout_tile, dout + (first_line + first_row) * D, D, rows - first_row);
    load_tile<COLS, THREADS>(k_tile, k + begin * k_row, k_row, end - begin);
    load_tile<COLS, THREADS>(v_tile, v + begin * v_row, v_row, end - begin);
    close_copies();
    #pragma unroll 1
    for (int key = begin, now = 0; key < end; key += COLS, now ^= 1) {
        // 1. Begin to load the next keys, and wait for these.
        const int next = key + COLS;
        if (next < end) {
            load_tile<COLS, THREADS>(k_tile + (now ^ 1) * TILE, k + next * k_row, k_row, end - next);
            load_tile<COLS, THREADS>(v_tile + (now ^ 1) * TILE, v + next * v_row, v_row, end - next);
        }
        close_copies();
        wait_for_copies<1>();
        __syncthreads();

        // 2. The gradients of the scores; 0 past the last key.
        float p[R][C][4] = {}, ds[R][C][4] = {};
        multiply_rows(p, q_tile + warp_row * PITCH<T>, k_tile + now * TILE);
        multiply_rows(ds, dout_tile + warp_row * PITCH<T>, v_tile + now * TILE);
        #pragma unroll
        for (int r = 0; r < R; r++)
            #pragma unroll
            for (int n = 0; n < C; n++)
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float x = exp2f(p[r][n][i] * to_log2 - shift[r][i / 2]);
                    const bool real = key + 8 * n + 2 * (lane_of() % 4) + i % 2 < end;
                    ds[r][n][i] = real ? x * (ds[r][n][i] - minus[r][i / 2]) : 0;
                }
        // 3. A sum over keys, its rows and those before in one unit.
        fit_rows(ds, unit, sums, T());
        multiply_sums(sums, ds, k_tile + now * TILE);
        __syncthreads();  // all have read this tile: the next step overwrites it
    }

    #pragma unroll
    for (int r = 0; r < R; r++)
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first_row + warp_row + 16 * r + 8 * h + lane_of() / 4;
            if (row >= rows) continue;
            const long long line = (static_cast<long long>(blockIdx.y) * pairs + pair) * rows + row;
            const float weight = in_units<T>(scale, unit[r][h]);
            #pragma unroll
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<float2*>(dq + line * D + 8 * n + 2 * (lane_of() % 4)) =
                    make_float2(sums[r][n][2 * h] * weight, sums[r][n][2 * h + 1] * weight);
        }
}

// The sum of splits, in their order: a thread takes a number.
extern "C" __global__ void __launch_bounds__(32 * JOIN_WARPS)
sum_splits(float* dq, const float* parts, int splits, long long size) {
    const long long i = static_cast<long long>(blockIdx.x) * 32 * JOIN_WARPS + threadIdx.x;
    if (i >= size) return;
    float sum = 0;
    for (int split = 0; split < splits; split++) sum += parts[split * size + i];
    dq[i] = sum;
}

// Add two neighbours to what is there.
__device__ __forceinline__ void add_pair(float* there, float x, float y) {
    float2* pair = reinterpret_cast<float2*>(there);
    *pair = make_float2(pair->x + x, pair->y + y);
}

template <class S> __device__ __forceinline__ void add_pair(S* there, float x, float y) {
    unsigned* pair = reinterpret_cast<unsigned*>(there);
    const float2 before = widen_pair(S(), *pair);
    *pair = round_pair(S(), before.x + x, before.y + y);
}

// dk, dv: added to in place.  They are fp32 if `wide`, else T.
extern "C" __global__ void __launch_bounds__(32 * BACKWARD_KV_WARPS)
backward_kv(void* dk, void* dv, const T* dout, const T* q, const T* k, const T* v,
            const float* lse, const float* delta,
            long long k_batch, long long k_head, long long k_row,
            long long v_batch, long long v_head, long long v_row,
            long long dk_batch, long long dk_head, long long dk_row,
            long long dv_batch, long long dv_head, long long dv_row,
            int H_KV, int rows, int s_kv, int wide, float scale) {
    constexpr int WARPS = BACKWARD_KV_WARPS, R = BACKWARD_KV_ROW_TILES, COLS = BACKWARD_KV_COLS;
    constexpr int ROWS = 16 * R * WARPS, THREADS = 32 * WARPS, C = COLS / 8, TILE = COLS * PITCH<T>;
    T* k_tile = reinterpret_cast<T*>(block_memory());
    T* v_tile = k_tile + ROWS * PITCH<T>;
    T* q_tile = v_tile + ROWS * PITCH<T>;
    T* dout_tile = q_tile + 2 * TILE;
    float* shift = reinterpret_cast<float*>(dout_tile + 2 * TILE);  // of each query, and its delta
    float* minus = shift + 2 * COLS;

    const int pair = blockIdx.z, batch = pair / H_KV, head = pair % H_KV;
    const int first_key = blockIdx.x * ROWS, warp_key = warp_of() * 16 * R;
    k += batch * k_batch + head * k_head + first_key * k_row;
    v += batch * v_batch + head * v_head + first_key * v_row;
    q += static_cast<long long>(pair) * rows * D;
    dout += static_cast<long long>(pair) * rows * D;
    lse += static_cast<long long>(pair) * rows;
    delta += static_cast<long long>(pair) * rows;

    const float to_log2 = scale * LOG2E;
    // Of each key: sums of ds q in units of `fit_rows`, sums of p dout, and the unit.
    float dk_sums[R][D / 8][4] = {}, dv_sums[R][D / 8][4] = {}, unit[R][2];
    #pragma unroll
    for (int r = 0; r < R; r++) unit[r][0] = unit[r][1] = LARGEST_UNIT;

    const auto load_queries = [&](int first, int where) {
        const long long at = static_cast<long long>(first) * D;
        load_tile<COLS, THREADS>(q_tile + where * TILE, q + at, D, rows - first);
        load_tile<COLS, THREADS>(dout_tile + where * TILE, dout + at, D, rows - first);
        for (int i = threadIdx.x; i < COLS; i += THREADS) {
            shift[where * COLS + i] = shift_of(lse, first + i, rows);
            minus[where * COLS + i] = first + i < rows ? delta[first + i] : 0;
        }
    };
    load_tile<ROWS, THREADS>(k_tile, k, k_row, s_kv - first_key);
    load_tile<ROWS, THREADS>(v_tile, v, v_row, s_kv - first_key);
    load_queries(0, 0);
    close_copies();
    #pragma unroll 1
    for (int query = 0, now = 0; query < rows; query += COLS, now ^= 1) {
        // 1. Begin to load the next queries, and wait for these.
        if (query + COLS < rows) load_queries(query + COLS, now ^ 1);
        close_copies();
        wait_for_copies<1>();
        __syncthreads();

        // 2. Probabilities and the gradients of the scores, keys down, queries across.
        float p[R][C][4] = {}, ds[R][C][4] = {};
        multiply_rows(p, k_tile + warp_key * PITCH<T>, q_tile + now * TILE);
        multiply_rows(ds, v_tile + warp_key * PITCH<T>, dout_tile + now * TILE);
        #pragma unroll
        for (int n = 0; n < C; n++)
            #pragma unroll
            for (int e = 0; e < 2; e++) {
                const int column = now * COLS + 8 * n + 2 * (lane_of() % 4) + e;
                const float from_score = shift[column], from_gradient = minus[column];
                #pragma unroll
                for (int r = 0; r < R; r++)
                    #pragma unroll
                    for (int i = e; i < 4; i += 2) {
                        p[r][n][i] = exp2f(p[r][n][i] * to_log2 - from_score);
                        ds[r][n][i] = p[r][n][i] * (ds[r][n][i] - from_gradient);
                    }
            }
        // 3. Sums over queries, those of all heads of the group; dk's in units of `fit_rows`.
        multiply_sums(dv_sums, p, dout_tile + now * TILE);
        fit_rows(ds, unit, dk_sums, T());
        multiply_sums(dk_sums, ds, q_tile + now * TILE);
        __syncthreads();  // all have read this tile: the next step overwrites it
    }

    const auto add = [&](void* sums, long long at, float x, float y) {
        if (wide) add_pair(static_cast<float*>(sums) + at, x, y);
        else add_pair(static_cast<T*>(sums) + at, x, y);
    };
    const long long dk_first = batch * dk_batch + head * dk_head;
    const long long dv_first = batch * dv_batch + head * dv_head;
    #pragma unroll
    for (int r = 0; r < R; r++)
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const int key = first_key + warp_key + 16 * r + 8 * h + lane_of() / 4;
            if (key >= s_kv) continue;
            const float dk_weight = in_units<T>(scale, unit[r][h]);
            const float dv_weight = exp2f(-BOOST<T>);
            #pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const int column = 8 * n + 2 * (lane_of() % 4);
                const float* x = dk_sums[r][n] + 2 * h;
                const float* y = dv_sums[r][n] + 2 * h;
                add(dk, dk_first + key * dk_row + column, x[0] * dk_weight, x[1] * dk_weight);
                add(dv, dv_first + key * dv_row + column, y[0] * dv_weight, y[1] * dv_weight);
            }
        }
}
