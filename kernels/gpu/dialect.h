// The common subset of CUDA C++ (NVRTC, no headers), Metal Shading Language and C++ in which the kernels are written.
//
// A module is this file, `#define T f32` (or bf16, f16), then the kernels. Every kernel works for any number of blocks and of
// threads a block up to MOST_THREADS, widens what it reads to f32, computes in f32 and rounds once when it stores.
// Compile without contraction of a*b + c (NVRTC: --fmad=false): fused multiply-adds are written FMA, so that all three targets
// and the CPU engine round alike. A barrier orders shared memory only: no thread reads global memory that another one wrote.

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
// Bound of a block; also of the scratch memory that reductions use.
#define MOST_THREADS 1024

#if defined(__METAL_VERSION__)
// ---- Metal ----
#include <metal_stdlib>
using namespace metal;
#pragma METAL fp contract(off)
#pragma METAL fp math_mode(safe)
typedef uchar u8;
typedef char i8;
typedef ushort u16;
typedef uint u32;
typedef ulong u64;
#define U64(x) x##ul
#define DEVICE static inline
#define GLOBAL device
#define SHARED threadgroup
#define CONSTANT constant
#define SHARED_ARRAY(type, name, n) threadgroup type name[n]
#define KERNEL(name) kernel void JOIN(name, T)
#define BUFFER(i, type, name) device type *name [[buffer(i)]]
// Parameters come last: behind them the place of the thread.
#define PARAMS(i, type, name)                                                                                                  \
  constant type &name [[buffer(i)]], uint kto_thread [[thread_position_in_threadgroup]],                                       \
      uint kto_threads [[threads_per_threadgroup]], uint kto_block [[threadgroup_position_in_grid]],                           \
      uint kto_blocks [[threadgroups_per_grid]]
#define HERE const Here here = {kto_thread, kto_threads, kto_block, kto_blocks}
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define FMA(a, b, c) fma(a, b, c)
#define SQRT(x) precise::sqrt(x)
#define LOG(x) precise::log(x)
#define BITS(x) as_type<uint>(x)
#define FLOAT(x) as_type<float>(x)
#define ALIGNED(p, bytes)

#elif defined(__CUDACC__)
// ---- CUDA ----
typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define U64(x) x##ull
#define DEVICE static __device__ __forceinline__
#define GLOBAL
#define SHARED
#define CONSTANT const
#define SHARED_ARRAY(type, name, n) __shared__ type name[n]
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(MOST_THREADS) JOIN(name, T)
#define BUFFER(i, type, name) type *name
#define PARAMS(i, type, name) const type name
#define HERE const Here here = {threadIdx.x, blockDim.x, blockIdx.x, gridDim.x}
#define BARRIER __syncthreads()
#define FMA(a, b, c) fmaf(a, b, c)
#define SQRT(x) sqrtf(x)
#define LOG(x) logf(x)
#define BITS(x) __float_as_uint(x)
#define FLOAT(x) __uint_as_float(x)
#define ALIGNED(p, bytes)

#else
// ---- C++ on the host: the emulator of kto-kernel-checks ----
#include <stddef.h>
#include <stdint.h>
#include <string.h>
typedef uint8_t u8;
typedef int8_t i8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
#define U64(x) x##ull
#define DEVICE static inline
#define GLOBAL
#define SHARED
#define CONSTANT const
#define SHARED_ARRAY(type, name, n) type *const name = (type *)emulator_shared(sizeof(type) * (n))
#define KERNEL(name) static void JOIN(name, T)
#define BUFFER(i, type, name) type *name
#define PARAMS(i, type, name) const type name
#define HERE const Here here = emulator_here()
#define BARRIER emulator_barrier()
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#define SQRT(x) __builtin_sqrtf(x)
#define LOG(x) __builtin_logf(x)
#define BITS(x) emulator_bits(x)
#define FLOAT(x) emulator_float(x)
#define ALIGNED(p, bytes) emulator_aligned(p, bytes)
struct Here;
static Here emulator_here();
static void emulator_barrier();
static void *emulator_shared(size_t bytes);
static void emulator_aligned(const void *p, size_t bytes);
static inline u32 emulator_bits(float v) {
  u32 bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}
static inline float emulator_float(u32 bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
#endif

// ---- The same for all ----

// Place of the thread in its block, threads of a block, place of the block, number of blocks.
struct Here {
  u32 thread_id, threads, block_id, blocks;
};

// All elements i below n, shared out over all threads of the grid.
#define FOR_ELEMENTS(i, n)                                                                                                     \
  for (u64 i = (u64)here.block_id * here.threads + here.thread_id; i < (n); i += (u64)here.blocks * here.threads)
// All rows below n, a block each in turn.
#define FOR_ROWS(i, n) for (u64 i = here.block_id; i < (n); i += here.blocks)
// All columns below n of the block's row.
#define FOR_COLUMNS(j, n) for (u64 j = here.thread_id; j < (n); j += here.threads)

#define MINUS_INFINITY FLOAT(0xff800000u)

typedef float f32;
struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

DEVICE float widen(f32 v) { return v; }
DEVICE float widen(bf16 v) { return FLOAT((u32)v.bits << 16); }

// Rounds to the nearest, ties to even; a NaN stays one.
DEVICE bf16 to_bf16(float v) {
  const u32 bits = BITS(v);
  const u32 nan = (bits >> 16) | 0x40u;
  const u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bf16 out = {(u16)((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
  return out;
}

#if defined(__METAL_VERSION__)
DEVICE float widen(f16 v) { return float(as_type<half>(v.bits)); }
DEVICE f16 to_f16(float v) {
  const f16 out = {as_type<ushort>(half(v))};
  return out;
}
#elif defined(__CUDACC__)
DEVICE float widen(f16 v) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
}
DEVICE f16 to_f16(float v) {
  f16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
  return out;
}
#else
DEVICE float widen(f16 v) {
  const u32 sign = (u32)(v.bits & 0x8000u) << 16, exponent = v.bits >> 10 & 31u, fraction = v.bits & 1023u;
  if (exponent == 0) {
    const float magnitude = (float)fraction * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return FLOAT(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | fraction << 13);
}
DEVICE f16 to_f16(float v) {
  const u32 sign = BITS(v) >> 16 & 0x8000u, bits = BITS(v) & 0x7fffffffu;
  u32 out;
  if (bits > 0x7f800000u) {
    out = 0x7e00u;
  } else if (bits >= 0x477ff000u) {
    out = 0x7c00u; // 65520 and above round to infinity
  } else if (bits < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the subnormal's bits at the low end, rounded.
    out = BITS(FLOAT(bits) + 0.5f) - BITS(0.5f);
  } else {
    out = (bits + 0xfffu + (bits >> 13 & 1u) - (112u << 23)) >> 13;
  }
  const f16 result = {(u16)(sign | out)};
  return result;
}
#endif

DEVICE float load(GLOBAL const f32 *p, u64 i) { return p[i]; }
DEVICE float load(GLOBAL const bf16 *p, u64 i) { return widen(p[i]); }
DEVICE float load(GLOBAL const f16 *p, u64 i) { return widen(p[i]); }
DEVICE void store(GLOBAL f32 *p, u64 i, float v) { p[i] = v; }
DEVICE void store(GLOBAL bf16 *p, u64 i, float v) { p[i] = to_bf16(v); }
DEVICE void store(GLOBAL f16 *p, u64 i, float v) { p[i] = to_f16(v); }

// Two neighbours in one access; `i` is even and `p` aligned to two elements.
DEVICE void store_pair(GLOBAL f32 *p, u64 i, float a, float b) {
  p[i] = a;
  p[i + 1] = b;
}
DEVICE void store_pair(GLOBAL bf16 *p, u64 i, float a, float b) {
  ALIGNED(p + i, 4);
  *(GLOBAL u32 *)(p + i) = (u32)to_bf16(a).bits | (u32)to_bf16(b).bits << 16;
}
DEVICE void store_pair(GLOBAL f16 *p, u64 i, float a, float b) {
  ALIGNED(p + i, 4);
  *(GLOBAL u32 *)(p + i) = (u32)to_f16(a).bits | (u32)to_f16(b).bits << 16;
}

// Types of floats in files, as kto_kernels::gpu::float_code numbers them.
#define FILE_F32 0u
#define FILE_F16 1u
#define FILE_BF16 2u

// Element `i` of floats of a file's type; `bytes` is aligned to that type.
DEVICE float load_as(u32 type, GLOBAL const u8 *bytes, u64 i) {
  if (type == FILE_F32) {
    return load((GLOBAL const f32 *)bytes, i);
  }
  return type == FILE_F16 ? load((GLOBAL const f16 *)bytes, i) : load((GLOBAL const bf16 *)bytes, i);
}

// Rounds to a file's type and widens again.
DEVICE float rounded_as(u32 type, float v) {
  if (type == FILE_F32) {
    return v;
  }
  return type == FILE_F16 ? widen(to_f16(v)) : widen(to_bf16(v));
}

// e^x as kernels/src/exp.rs computes it with fused multiply-adds, bit for bit; its comments say why.
DEVICE float exponential(float v) {
  const float magic = 12582912.0f;
  const float x = v > 88.0f ? 88.0f : v;
  const float shifted = FMA(x, 1.44269504f, magic);
  const float n = shifted - magic;
  const float r = FMA(n, 2.1219444e-4f, FMA(n, -0.693359375f, x));
  const float r2 = r * r;
  const float low = FMA(1.66666655e-1f, r, 5.0000001e-1f);
  const float middle = FMA(8.3334519e-3f, r, 4.1665796e-2f);
  const float high = FMA(1.98756915e-4f, r, 1.39819995e-3f);
  const float y = FMA(FMA(FMA(high, r2, middle), r2, low), r2, r) + 1.0f;
  const float power = FLOAT((BITS(shifted) - BITS(magic) + 127u) << 23);
  return x < -87.3f ? 0.0f : y * power;
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// tanh by the exponential, as kernels/src/attention/softmax.rs.
DEVICE float hyperbolic_tangent(float x) { return 1.0f - 2.0f / (exponential(x * 2.0f) + 1.0f); }

// The finalizer of SplitMix64, as kernels/src/random.rs.
DEVICE u64 mixed(u64 v) {
  u64 x = v + U64(0x9e3779b97f4a7c15);
  x = (x ^ (x >> 30)) * U64(0xbf58476d1ce4e5b9);
  x = (x ^ (x >> 27)) * U64(0x94d049bb133111eb);
  return x ^ (x >> 31);
}

// Reductions over the threads of a block, whose result all of them get. `scratch` has MOST_THREADS elements. The tree depends on
// the number of threads alone, so a launch gives the same bits every time. The last barrier frees `scratch` for the next use.
#define REDUCE(type, scratch, value, combine)                                                                                  \
  scratch[here.thread_id] = value;                                                                                                \
  BARRIER;                                                                                                                     \
  for (u32 width = here.threads; width > 1;) {                                                                                 \
    const u32 half_width = (width + 1) / 2;                                                                                    \
    if (here.thread_id + half_width < width) {                                                                                    \
      const type a = scratch[here.thread_id], b = scratch[here.thread_id + half_width];                                              \
      scratch[here.thread_id] = combine;                                                                                          \
    }                                                                                                                          \
    BARRIER;                                                                                                                   \
    width = half_width;                                                                                                        \
  }                                                                                                                            \
  const type result = scratch[0];                                                                                              \
  BARRIER;                                                                                                                     \
  return result

DEVICE float block_sum(Here here, SHARED float *scratch, float v) { REDUCE(float, scratch, v, a + b); }
DEVICE float block_max(Here here, SHARED float *scratch, float v) { REDUCE(float, scratch, v, b > a ? b : a); }
