// Stands in for mpi_impl/kernels/ptx.cuh and for CUDA itself: runs a grid on the CPU, block after
// block, every thread of a block as a fiber.
//
// A fiber runs until it must wait for others, for its warp at a shuffle, a matrix load or a product,
// for the block at __syncthreads.  Warps run as far ahead of one another as they may, in the order
// that `launch` is told, and copies to shared memory happen as early or as late as they may: what a
// kernel forgets to wait for, it sees.  Shared memory starts as NaN.

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static struct { int x, y, z; } threadIdx, blockIdx, gridDim;

struct half16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

static int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
static float __int_as_float(int i) { float x; memcpy(&x, &i, 4); return x; }

// ----------------------------------------------------------------------- 16-bit numbers

static float widen(bfloat16, unsigned bits) { return __int_as_float(int(bits << 16)); }

static float widen(half16, unsigned bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float x = exponent == 0 ? std::ldexp(float(fraction), -24)
              : exponent < 31 ? __int_as_float((exponent + 112) << 23 | fraction << 13)
              : fraction ? NAN : INFINITY;
    return bits >> 15 ? -x : x;
}

static unsigned narrow(bfloat16, float x) {
    const unsigned bits = __float_as_int(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static unsigned narrow(half16, float x) {
    const unsigned sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (x != x) return 0x7fff;
    if (x >= 65520) return sign | 0x7c00;
    if (x < 0x1p-14f) return sign | unsigned(std::nearbyint(x * 0x1p24f));
    const unsigned bits = __float_as_int(x) - (112u << 23);
    return sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13;
}

template <class T> static unsigned round_pair(T kind, float low, float high) {
    return narrow(kind, low) | narrow(kind, high) << 16;
}

template <class T> static float2 widen_pair(T kind, unsigned pair) {
    return {widen(kind, pair & 0xffff), widen(kind, pair >> 16)};
}

// ------------------------------------------------------------------------------- fibers

constexpr int MOST_THREADS = 1024, STACK = 1 << 17, GUARD = 4096;

struct Copy { char* to; const char* from; bool real; int group; };
struct Barrier { int arrived = 0, generation = 0; };
union Slot { float x[12]; const void* row; };

struct Fiber {
    jmp_buf here;
    ucontext_t first;
    bool started, done;
    Barrier* waits;
    int generation, calls, group;
    std::vector<Copy> copies;
};

static Fiber fibers[MOST_THREADS];
static Barrier block_barrier, warp_barriers[MOST_THREADS / 32];
static Slot slots[2][MOST_THREADS];  // two: a warp's next exchange begins before all have read
static std::vector<char> memory;
static char* stacks;
static jmp_buf scheduler;
static int threads, running;
static bool eager;
static void (*body)();

[[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "block %d %d %d, thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
            threadIdx.x, what);
    abort();
}

static void arrive(Barrier& barrier, int size) {
    Fiber& me = fibers[running];
    if (++barrier.arrived == size) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    me.waits = &barrier;
    me.generation = barrier.generation;
    if (!_setjmp(me.here)) _longjmp(scheduler, 1);
}

static void __syncthreads() {
    for (int i = 0; i < threads; i++)
        if (fibers[i].done) fail("waits for a thread that has ended");
    arrive(block_barrier, threads);
}

// Give this lane's part to its warp, and return those of all 32.
static const Slot* exchange(const Slot& mine) {
    const int parity = fibers[running].calls++ % 2;
    slots[parity][running] = mine;
    arrive(warp_barriers[running / 32], 32);
    return slots[parity] + running / 32 * 32;
}

static void enter() {
    body();
    fibers[running].done = true;
    _longjmp(scheduler, 1);
}

static void resume(int i) {
    Fiber& fiber = fibers[i];
    running = i;
    threadIdx.x = i;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.first);
}

static void run_block(bool last_warp_first) {
    std::fill(memory.begin(), memory.end(), char(0xff));
    block_barrier = Barrier();
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.started = fiber.done = false;
        fiber.waits = nullptr;
        fiber.calls = fiber.group = 0;
        fiber.copies.clear();
        warp_barriers[i / 32] = Barrier();
        getcontext(&fiber.first);
        fiber.first.uc_stack.ss_sp = stacks + size_t(i) * STACK;
        fiber.first.uc_stack.ss_size = STACK;
        fiber.first.uc_link = nullptr;
        makecontext(&fiber.first, enter, 0);
    }
    const int warps = threads / 32;
    for (bool moved = true; moved;) {
        moved = false;
        for (int w = 0; w < warps && !moved; w++) {
            const int first = 32 * (last_warp_first ? warps - 1 - w : w);
            for (int i = first; i < first + 32; i++) {
                const Fiber& fiber = fibers[i];
                if (fiber.done || (fiber.waits && fiber.waits->generation == fiber.generation))
                    continue;
                fibers[i].waits = nullptr;
                resume(i);
                moved = true;
            }
        }
    }
    for (int i = 0; i < threads; i++)
        if (!fibers[i].done) fail("some threads of a warp or a block never came to a barrier");
    for (size_t i = memory.size() - GUARD; i < memory.size(); i++)
        if (memory[i] != char(0xff)) fail("wrote past its shared memory");
}

// ------------------------------------------------------------------- what ptx.cuh offers

static char* block_memory() {
    char* p = memory.data();
    return p + (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16;
}

static void aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16) fail("an address that is no multiple of 16 bytes");
}

static void perform(const Copy& copy) {
    if (copy.real) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
}

static void copy_16_bytes(void* to, const void* from, bool real) {
    aligned(to);
    aligned(from);
    Fiber& me = fibers[running];
    const Copy copy{static_cast<char*>(to), static_cast<const char*>(from), real, me.group};
    if (eager) perform(copy);
    else me.copies.push_back(copy);
}

static void close_copies() { fibers[running].group++; }

template <int LATEST> static void wait_for_copies() {
    Fiber& me = fibers[running];
    size_t i = 0;
    for (; i < me.copies.size() && me.copies[i].group < me.group - LATEST; i++)
        perform(me.copies[i]);
    me.copies.erase(me.copies.begin(), me.copies.begin() + i);
}

template <class T> static void load(unsigned (&m)[4], const T* row, bool transposed) {
    aligned(row);
    Slot mine;
    mine.row = row;
    const Slot* all = exchange(mine);
    const int lane = running % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        const auto at = [&](int r, int c) {
            return unsigned(static_cast<const unsigned short*>(all[8 * i + r].row)[c]);
        };
        m[i] = transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16
                          : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
}

template <class T> static void load_matrices(unsigned (&m)[4], const T* row) {
    load(m, row, false);
}

template <class T> static void load_matrices_transposed(unsigned (&m)[4], const T* row) {
    load(m, row, true);
}

template <class T> static void multiply_add(T kind, float (&c)[4], const unsigned (&a)[4],
                                            unsigned b0, unsigned b1) {
    const unsigned pairs[6] = {a[0], a[1], a[2], a[3], b0, b1};
    Slot mine;
    for (int i = 0; i < 12; i++)
        mine.x[i] = widen(kind, pairs[i / 2] >> (i % 2 * 16) & 0xffff);
    const Slot* all = exchange(mine);
    const int lane = running % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++)  // row g + 8 (i / 2), column 2 t + i % 2
        for (int k = 0; k < 4; k++)
            for (int j = 0; j < 4; j++) {  // a: columns 2 k + j % 2 + 8 (j / 2)
                const float* left = all[4 * g + k].x + 2 * (i / 2);
                const float* right = all[4 * (2 * t + i % 2) + k].x + 8;
                c[i] += left[4 * (j / 2) + j % 2] * right[2 * (j / 2) + j % 2];
            }
}

static float __shfl_sync(unsigned, float x, int lane) {
    Slot mine;
    mine.x[0] = x;
    return exchange(mine)[lane % 32].x[0];
}

static float __shfl_xor_sync(unsigned all, float x, int bits) {
    return __shfl_sync(all, x, running % 32 ^ bits);
}

static int __any_sync(unsigned, int mine) {
    Slot slot;
    slot.x[0] = mine;
    const Slot* all = exchange(slot);
    int any = 0;
    for (int lane = 0; lane < 32; lane++) any |= all[lane].x[0] != 0;
    return any;
}

// ------------------------------------------------------------------------------- launch

// How a block runs: bits of `how`.
constexpr int LAST_WARP_FIRST = 1, EAGER_COPIES = 2;

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(args[I])...);
}

static void (*entry)(void**);
static void** arguments;

template <class... A>
static void launch(void (*kernel)(A...), void (*unpack)(void**), const int* grid, int block,
                   int shared_bytes, void** args, int how) {
    (void)kernel;
    entry = unpack;
    arguments = args;
    body = [] { entry(arguments); };
    threads = block;
    eager = how & EAGER_COPIES;
    memory.assign(shared_bytes + 16 + GUARD, 0);
    if (!stacks) stacks = static_cast<char*>(malloc(size_t(MOST_THREADS) * STACK));
    gridDim = {grid[0], grid[1], grid[2]};
    for (int z = 0; z < grid[2]; z++)
        for (int y = 0; y < grid[1]; y++)
            for (int x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                run_block(how & LAST_WARP_FIRST);
            }
}

template <class... A> static constexpr auto indices(void (*)(A...)) {
    return std::index_sequence_for<A...>();
}

// Exports `kernel` as `launch_kernel`.
#define LAUNCHER(kernel)                                                                       \
    extern "C" void launch_##kernel(const int* grid, int block, int shared_bytes, void** args, \
                                    int how) {                                                 \
        launch(                                                                                \
            kernel, [](void** a) { call(kernel, a, indices(kernel)); }, grid, block,           \
            shared_bytes, args, how);                                                          \
    }
