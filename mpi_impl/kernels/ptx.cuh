// The instructions that CUDA C++ has no word for, each in a function of its own.
//
// 16-bit numbers are bits to everything but the tensor cores and the functions at the end, which
// round to them and widen them.  So no header of CUDA's is needed, and tests/cuda_emulation.h can
// stand in for this file where there is no GPU.

struct half16 { unsigned short bits; };    // fp16
struct bfloat16 { unsigned short bits; };  // bf16

// The block's dynamic shared memory.
__device__ __forceinline__ char* block_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Begin to copy 16 bytes to shared memory, or, if not `real`, to write 16 zero bytes there.
__device__ __forceinline__ void copy_16_bytes(void* to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(real ? 16 : 0) : "memory");
}

// Close the group of copies begun since the last call.
__device__ __forceinline__ void close_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait for this thread's copies but for those of the `LATEST` groups closed last.
template <int LATEST>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LATEST) : "memory");
}

// Load four 8 x 8 matrices of 16-bit numbers.  Lane i gives the address of row i % 8 of matrix
// i / 8, and gets, of each matrix, row lane / 4, columns 2 (lane % 4) and the one after.
template <class T>
__device__ __forceinline__ void load_matrices(unsigned (&m)[4], const T* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row)) : "memory");
}

// The same of the transposed matrices.
template <class T>
__device__ __forceinline__ void load_matrices_transposed(unsigned (&m)[4], const T* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row)) : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8) on a tensor core, sums in fp32.  PTX ISA, m16n8k16, says which
// lane holds what.
__device__ __forceinline__ void multiply_add(half16, float (&c)[4], const unsigned (&a)[4],
                                             unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_add(bfloat16, float (&c)[4], const unsigned (&a)[4],
                                             unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Round two numbers to 16 bits; the first lies in the lower half.
__device__ __forceinline__ unsigned round_pair(half16, float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ unsigned round_pair(bfloat16, float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// What `round_pair` gave, as numbers in fp32.
__device__ __forceinline__ float2 widen_pair(half16, unsigned pair) {
    float2 x;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(x.x), "=f"(x.y) : "r"(pair));
    return x;
}

__device__ __forceinline__ float2 widen_pair(bfloat16, unsigned pair) {
    return make_float2(__int_as_float(pair << 16), __int_as_float(pair & 0xffff0000u));
}
