// What the kernels do with tiles: load them, and multiply them.
//
// A warp's part of a product lies in the registers of its lanes as the tensor cores deal it out.
// `float c[R][C][4]` is 16 R rows by 8 C columns.  With lane = 4 g + t, this lane holds
//
//     c[r][n][0], c[r][n][1]    row 16 r + g,     columns 8 n + 2 t and 8 n + 2 t + 1
//     c[r][n][2], c[r][n][3]    row 16 r + g + 8, the same columns
//
// so a row lies in the four lanes of one g.  fp32, for which there are no tensor cores that would
// be exact, is dealt out in the same way: the kernels are written once.

constexpr int D = HEAD_DIM;  // of q, k, v and out

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define INF __int_as_float(0x7f800000)

// Rows in shared memory are 16 bytes longer than D numbers: eight rows, read at the same column,
// then lie in different banks.
template <class T> constexpr int PITCH = D + 16 / sizeof(T);

// fp16 reaches from 6e-8 to 65504.  Probabilities are at most 1, and are kept times 2^15.
template <class T> constexpr float BOOST = 0;
template <> constexpr float BOOST<half16> = 15;

__device__ __forceinline__ int lane_of() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_of() { return threadIdx.x / 32; }

// Begin to copy a tile of ROWS rows of D numbers; rows from `count` on become 0.
template <int ROWS, int THREADS, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* from, long long pitch, int count) {
    constexpr int WIDTH = 16 / sizeof(T), PER_ROW = D / WIDTH;
    #pragma unroll
    for (int i = threadIdx.x; i < ROWS * PER_ROW; i += THREADS) {
        const int row = i / PER_ROW, column = i % PER_ROW * WIDTH;
        const bool real = row < count;
        copy_16_bytes(tile + row * PITCH<T> + column, real ? from + row * pitch + column : from,
                      real);
    }
}

// c += a b^T: a are this warp's 16 R rows, b has 8 C rows, both of D numbers in shared memory.
template <class T, int R, int C>
__device__ __forceinline__ void multiply_rows(float (&c)[R][C][4], const T* a, const T* b) {
    const int lane = lane_of();
    #pragma unroll
    for (int d = 0; d < D; d += 16) {
        unsigned left[R][4];
        #pragma unroll
        for (int r = 0; r < R; r++)
            load_matrices(left[r], a + (16 * r + lane % 16) * PITCH<T> + d + lane / 16 * 8);
        #pragma unroll
        for (int n = 0; n < C; n += 2) {
            unsigned right[4];
            load_matrices(
                right, b + (8 * n + lane / 16 * 8 + lane % 8) * PITCH<T> + d + lane / 8 % 2 * 8);
            #pragma unroll
            for (int r = 0; r < R; r++) {
                multiply_add(T(), c[r][n], left[r], right[0], right[1]);
                multiply_add(T(), c[r][n + 1], left[r], right[2], right[3]);
            }
        }
    }
}

template <int R, int C>
__device__ __forceinline__ void multiply_rows(float (&c)[R][C][4], const float* a,
                                              const float* b) {
    const int g = lane_of() / 4, t = lane_of() % 4;
    #pragma unroll 1
    for (int d = 0; d < D; d += 4) {
        float4 left[R][2];
        #pragma unroll
        for (int r = 0; r < R; r++)
            #pragma unroll
            for (int h = 0; h < 2; h++)
                left[r][h] = *reinterpret_cast<const float4*>(
                    a + (16 * r + 8 * h + g) * PITCH<float> + d);
        #pragma unroll
        for (int n = 0; n < C; n++)
            #pragma unroll
            for (int e = 0; e < 2; e++) {
                const float4 y = *reinterpret_cast<const float4*>(
                    b + (8 * n + 2 * t + e) * PITCH<float> + d);
                #pragma unroll
                for (int r = 0; r < R; r++)
                    #pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const float4 x = left[r][h];
                        float& sum = c[r][n][2 * h + e];
                        sum = fmaf(x.x, y.x, sum);
                        sum = fmaf(x.y, y.y, sum);
                        sum = fmaf(x.z, y.z, sum);
                        sum = fmaf(x.w, y.w, sum);
                    }
            }
    }
}

// c += p b: p (16 R, 8 K) is in registers, b has 8 K rows of D numbers in shared memory.
template <class T, int R, int K>
__device__ __forceinline__ void multiply_sums(float (&c)[R][D / 8][4], const float (&p)[R][K][4],
                                              const T* b) {
    const int lane = lane_of();
    #pragma unroll
    for (int k = 0; k < K; k += 2) {
        unsigned left[R][4];  // two neighbours of p are dealt out as one a
        #pragma unroll
        for (int r = 0; r < R; r++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const float (&from)[4] = p[r][k + i / 2];
                left[r][i] = round_pair(T(), from[i % 2 * 2], from[i % 2 * 2 + 1]);
            }
        #pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            unsigned right[4];
            load_matrices_transposed(
                right, b + (8 * k + lane % 16) * PITCH<T> + 8 * n + lane / 16 * 8);
            #pragma unroll
            for (int r = 0; r < R; r++) {
                multiply_add(T(), c[r][n], left[r], right[0], right[1]);
                multiply_add(T(), c[r][n + 1], left[r], right[2], right[3]);
            }
        }
    }
}

template <int R, int K>
__device__ __forceinline__ void multiply_sums(float (&c)[R][D / 8][4], const float (&p)[R][K][4],
                                              const float* b) {
    const int lane = lane_of(), t = lane % 4;
    #pragma unroll
    for (int k = 0; k < K; k++)
        #pragma unroll 1
        for (int j = 0; j < 8; j += 2)
            #pragma unroll
            for (int e = 0; e < 2; e++) {
                float x[R][2];  // column 8 k + j + e of p, from the lane that holds it
                #pragma unroll
                for (int r = 0; r < R; r++)
                    #pragma unroll
                    for (int h = 0; h < 2; h++)
                        x[r][h] = __shfl_sync(~0u, p[r][k][2 * h + e], lane - t + j / 2);
                #pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    const float2 y = *reinterpret_cast<const float2*>(
                        b + (8 * k + j + e) * PITCH<float> + 8 * n + 2 * t);
                    #pragma unroll
                    for (int r = 0; r < R; r++)
                        #pragma unroll
                        for (int h = 0; h < 2; h++) {
                            c[r][n][2 * h] = fmaf(x[r][h], y.x, c[r][n][2 * h]);
                            c[r][n][2 * h + 1] = fmaf(x[r][h], y.y, c[r][n][2 * h + 1]);
                        }
                }
            }
}

// Over the four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Bring rows of x into the range of T: multiply each by a power of two, its unit, so that its
// largest number is about 1.  The sums c so far follow when a unit shrinks, as a softmax's sums
// follow its maximum.  Only fp16 has so few exponents that gradients need that.
constexpr float LARGEST_UNIT = 0x1p100f;

template <class T, int R, int K>
__device__ __forceinline__ void fit_rows(float (&)[R][K][4], float (&)[R][2], float (&)[R][D / 8][4],
                                         T) {}

template <int R, int K>
__device__ __forceinline__ void fit_rows(float (&x)[R][K][4], float (&unit)[R][2],
                                         float (&c)[R][D / 8][4], half16) {
    #pragma unroll
    for (int r = 0; r < R; r++)
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = 0;
            #pragma unroll
            for (int k = 0; k < K; k++)
                top = fmaxf(top, fmaxf(fabsf(x[r][k][2 * h]), fabsf(x[r][k][2 * h + 1])));
            const int exponent = min(max(__float_as_int(row_max(top)) >> 23, 27), 253);
            const float fits = fminf(unit[r][h], __int_as_float((254 - exponent) << 23));
            const float follow = fits / unit[r][h];
            unit[r][h] = fits;
            #pragma unroll
            for (int k = 0; k < K; k++) {
                x[r][k][2 * h] *= fits;
                x[r][k][2 * h + 1] *= fits;
            }
            #pragma unroll
            for (int n = 0; n < D / 8; n++) {
                c[r][n][2 * h] *= follow;
                c[r][n][2 * h + 1] *= follow;
            }
        }
}

// The factor that takes a sum of fitted rows back to plain numbers, times `scale`.
template <class T>
__device__ __forceinline__ float in_units(float scale, float unit) {
    return BOOST<T> == 0 ? scale : scale * exp2f(-BOOST<T>) / unit;
}
