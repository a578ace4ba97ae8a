// Runs kernels compiled as C++: every thread of a block is a fiber, a barrier goes on to the next one.
//
// Called from src/emulator.rs with the arguments of cuLaunchKernel. Blocks run one after the other. The schedule is the order of the
// threads between two barriers and of the blocks, so that what a missing barrier lets happen happens under one of them. Seen as
// faults: a barrier that some threads never reach, more shared memory than every device has, pairs that are not aligned,
// parameters of another size. Shared memory begins as NaN.

#include <setjmp.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <type_traits>
#include <ucontext.h>
#include <utility>

static const size_t STACK_BYTES = 64 << 10;
// Metal's bound; CUDA's is 48 KiB.
static const size_t SHARED_BYTES = 32 << 10;

typedef void (*Invoke)(void **args);

// A fiber begins as a context; from then on jumps switch, which unlike contexts cost no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool begun, done;
  // Shared memory that this thread has declared so far.
  size_t shared;
};

struct Launch {
  jmp_buf scheduler;
  Fiber *fibers;
  unsigned char *shared;
  Here here;
  u64 random;
  Invoke kernel;
  void **args;
  const char *fault;
};

static thread_local Launch *launch;

static void fault(const char *what) {
  if (!launch->fault) {
    launch->fault = what;
  }
}

static Here emulator_here() { return launch->here; }

static void emulator_barrier() {
  if (!_setjmp(launch->fibers[launch->here.thread_id].place)) {
    _longjmp(launch->scheduler, 1);
  }
}

// All threads declare the same arrays in the same order, so equal distances are equal arrays.
static void *emulator_shared(size_t bytes) {
  Fiber &fiber = launch->fibers[launch->here.thread_id];
  void *const at = launch->shared + fiber.shared;
  fiber.shared += (bytes + 15) / 16 * 16;
  if (fiber.shared > SHARED_BYTES) {
    fault("more shared memory than every device has");
    fiber.shared = 0;
    return launch->shared;
  }
  return at;
}

static void emulator_aligned(const void *p, size_t bytes) {
  if ((uintptr_t)p % bytes != 0) {
    fault("an access to a pair of elements is not aligned");
  }
}

static void enter() {
  launch->kernel(launch->args);
  launch->fibers[launch->here.thread_id].done = true;
  _longjmp(launch->scheduler, 1);
}

// Runs a thread up to its next barrier or its end.
__attribute__((noinline)) static void resume(Fiber &fiber) {
  if (!_setjmp(launch->scheduler)) {
    if (fiber.begun) {
      _longjmp(fiber.place, 1);
    }
    fiber.begun = true;
    setcontext(&fiber.context);
  }
}

// Place `i` of `n` in the order of a schedule: 0 ascending, 1 descending, else some rotation with an odd stride.
static u32 scheduled(u32 schedule, u64 turn, u32 i, u32 n) {
  if (schedule == 0) {
    return i;
  }
  if (schedule == 1) {
    return n - 1 - i;
  }
  u32 a = n, b = (u32)(mixed(turn + schedule) % n) | 1u;
  const u32 stride = b;
  while (b != 0) {
    const u32 rest = a % b;
    a = b;
    b = rest;
  }
  // A stride with a common factor would leave some out.
  return a == 1 ? (u32)(((u64)i * stride + turn) % n) : n - 1 - i;
}

static void start(Fiber &fiber, unsigned char *stack) {
  fiber.begun = fiber.done = false;
  fiber.shared = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = NULL;
  makecontext(&fiber.context, enter, 0);
}

static void run_block(u32 schedule, unsigned char *stacks) {
  const u32 threads = launch->here.threads;
  memset(launch->shared, 0xff, SHARED_BYTES);
  for (u32 i = 0; i < threads; i++) {
    start(launch->fibers[i], stacks + i * STACK_BYTES);
  }
  for (u64 turn = 0;; turn++) {
    u32 done = 0;
    for (u32 i = 0; i < threads; i++) {
      launch->here.thread_id = scheduled(schedule, turn, i, threads);
      Fiber &fiber = launch->fibers[launch->here.thread_id];
      resume(fiber);
      done += fiber.done;
    }
    if (done == threads) {
      return;
    }
    if (done > 0) {
      fault("some threads ended while others wait at a barrier");
      return;
    }
  }
}

// Calls a kernel with its arguments by value, as a driver does.
template <typename... A, size_t... I> static void call(void (*kernel)(A...), void **args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<A> *>(args[I])...);
}
template <typename... A> static void unpack(void (*kernel)(A...), void **args) {
  call(kernel, args, std::index_sequence_for<A...>());
}
template <auto KERNEL_FUNCTION> static void invoke(void **args) { unpack(KERNEL_FUNCTION, args); }

// Number of arguments, and the size of the last one.
struct Signature {
  size_t arguments, params;
};
template <typename... A> static constexpr Signature signature(void (*)(A...)) {
  size_t sizes[] = {sizeof(A)...};
  return {sizeof...(A), sizes[sizeof...(A) - 1]};
}

struct Entry {
  const char *name;
  Invoke invoke;
  Signature signature;
};
#define ENTRY(name, function) {name, invoke<function>, signature(function)}

static const char *emulate(const Entry &entry, u32 blocks, u32 threads, u32 schedule, void **args) {
  Launch here = {};
  here.kernel = entry.invoke;
  here.args = args;
  const size_t bytes = STACK_BYTES * threads;
  void *const stacks = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  here.fibers = (Fiber *)calloc(threads, sizeof(Fiber));
  here.shared = (unsigned char *)aligned_alloc(64, SHARED_BYTES);
  if (stacks == MAP_FAILED || !here.fibers || !here.shared) {
    return "no memory for the emulator";
  }
  launch = &here;
  for (u32 i = 0; i < blocks && !here.fault; i++) {
    here.here.threads = threads;
    here.here.blocks = blocks;
    here.here.block_id = scheduled(schedule, 0, i, blocks);
    run_block(schedule, (unsigned char *)stacks);
  }
  launch = NULL;
  free(here.fibers);
  free(here.shared);
  munmap(stacks, bytes);
  return here.fault;
}
