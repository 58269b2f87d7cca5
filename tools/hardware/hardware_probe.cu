// One instruction at a time, for record_hardware.py: the two special functions and the tensor-core step.
#include <cstdint>
#include <cuda_runtime.h>

__global__ void special(int which, uint32_t first, uint32_t count, float *out) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float x = __uint_as_float(first + i), y;
    if (which == 0)
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    else
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    out[i] = y;
}

// One warp a block: D [16, 8] = C + A [16, 16] B [8, 16]^T, bf16 in, float32 out.
__global__ void step(const uint32_t *a, const uint32_t *b, const float *c, float *d) {
    int lane = threadIdx.x, row = lane / 4, pair = lane % 4;
    a += blockIdx.x * 16 * 8;  // 8 words of two bf16 a row
    b += blockIdx.x * 8 * 8;
    c += blockIdx.x * 16 * 8;
    d += blockIdx.x * 16 * 8;
    uint32_t a0 = a[row * 8 + pair], a1 = a[(row + 8) * 8 + pair];
    uint32_t a2 = a[row * 8 + pair + 4], a3 = a[(row + 8) * 8 + pair + 4];
    uint32_t b0 = b[row * 8 + pair], b1 = b[row * 8 + pair + 4];
    int top = row * 8 + 2 * pair, bottom = top + 64;
    float d0, d1, d2, d3;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[top]), "f"(c[top + 1]), "f"(c[bottom]),
          "f"(c[bottom + 1]));
    d[top] = d0, d[top + 1] = d1, d[bottom] = d2, d[bottom + 1] = d3;
}

extern "C" int run_special(int which, uint32_t first, uint32_t count, float *out) {
    special<<<(count + 255) / 256, 256>>>(which, first, count, out);
    return cudaDeviceSynchronize();
}

extern "C" int run_step(int blocks, const uint32_t *a, const uint32_t *b, const float *c, float *d) {
    step<<<blocks, 32>>>(a, b, c, d);
    return cudaDeviceSynchronize();
}
