// Runs CUDA kernels on the host. Every thread of a block is a fiber, so a kernel's source compiles
// as C++ and runs under sanitizers:
// - ThreadSanitizer sees each fiber as a thread. Only __syncthreads and __syncwarp order memory;
//   switches between fibers and shuffles do not. Races are therefore reported whatever order the
//   fibers ran in. Nothing orders two blocks.
// - AddressSanitizer sees the bounds of each array in shared memory.
// Shared memory starts as NaN. A barrier that some threads never reach ends the program.
//
// One-dimensional grids and blocks, full warps, full masks. Blocks run one after another.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// The fibers share this file's state without synchronisation. That is not a race of the kernel.
#define HIMO_SCHEDULER __attribute__((no_sanitize("thread"), noinline)) inline

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, size_t) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace himo::emulate {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kRedZone = 128;               // bytes after each array of shared memory
constexpr size_t kLargestShared = 227 * 1024;  // bytes of a block of sm_90

struct Barrier {
  unsigned arrived = 0, round = 0;
  char order[2];  // addresses for ThreadSanitizer's acquire and release, one per parity: see arrive
};

struct Warp {
  uint64_t slots[2][kLanes];  // words exchanged by lanes, one row per parity of the barrier's round
  Barrier barrier;
  unsigned live = kLanes;
};

struct Block;

struct Fiber {
  unsigned index = 0;
  Block* block = nullptr;
  Barrier* waits_for = nullptr;
  unsigned round = 0;  // the barrier's, when this fiber arrived
  bool done = false;
#if defined(__x86_64__)
  void* context = nullptr;  // stack pointer
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  void* tsan = nullptr;
  void* asan = nullptr;
};

struct Block {
  unsigned index, live;
  Barrier barrier;
  Fiber* fibers;
  Warp* warps;
  char *stacks, *shared;
  size_t requested, reserved;  // bytes of shared memory: as launched, and with red zones
  const std::function<void()>* body;
};

inline Fiber* current = nullptr;  // nullptr while the host runs
inline Fiber host;
inline unsigned block_size = 0, grid_size = 0;
inline unsigned order_seed = 1;  // of the order in which fibers run
inline char launch_end;
#if defined(__SANITIZE_ADDRESS__)
inline const void* host_stack = nullptr;
inline size_t host_stack_bytes = 0;
#endif

[[noreturn]] inline void fail(const char* message, unsigned long number) {
  std::fprintf(stderr, message, number);
  std::abort();
}

#if defined(__x86_64__)
// Saves the registers that a call preserves on this stack, and continues on the other.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

// Continues with a fiber, or with the host.
HIMO_SCHEDULER void switch_to(Fiber* next) {
  Fiber* last = current ? current : &host;
  current = next == &host ? nullptr : next;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(next->tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = next == &host ? host_stack : next->stack;
  __sanitizer_start_switch_fiber(last->done ? nullptr : &last->asan, stack,
                                 next == &host ? host_stack_bytes : kStackBytes);
#endif
#if defined(__x86_64__)
  switch_stacks(&last->context, next->context);
#else
  swapcontext(&last->context, &next->context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  // A fiber's first switch does not return here, but to `enter`.
  if (last == &host) {
    __sanitizer_finish_switch_fiber(last->asan, nullptr, nullptr);
  } else {
    __sanitizer_finish_switch_fiber(last->asan, &host_stack, &host_stack_bytes);
  }
#endif
}

HIMO_SCHEDULER void release_if_complete(Barrier& barrier, unsigned members) {
  if (barrier.arrived < members || members == 0) return;
  barrier.arrived = 0;
  ++barrier.round;
}

// Waits until all members have arrived. A fiber that runs ahead arrives at the next round before
// others have left this one, so each parity of rounds has its own order.
HIMO_SCHEDULER void arrive(Barrier& barrier, unsigned members,
                           [[maybe_unused]] bool orders_memory) {
  Fiber* fiber = current;
  const unsigned round = barrier.round;
#if defined(__SANITIZE_THREAD__)
  if (orders_memory) __tsan_release(&barrier.order[round % 2]);
#endif
  ++barrier.arrived;
  release_if_complete(barrier, members);
  if (barrier.round == round) {
    fiber->waits_for = &barrier;
    fiber->round = round;
    switch_to(&host);
    fiber->waits_for = nullptr;
  }
#if defined(__SANITIZE_THREAD__)
  if (orders_memory) __tsan_acquire(&barrier.order[round % 2]);
#endif
}

HIMO_SCHEDULER Warp& warp() { return current->block->warps[current->index / kLanes]; }
HIMO_SCHEDULER unsigned lane() { return current->index % kLanes; }

// The first function of every fiber.
HIMO_SCHEDULER void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  Fiber* fiber = current;
  Block* block = fiber->block;
  (*block->body)();
  fiber->done = true;
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&launch_end);
#endif
  release_if_complete(block->barrier, --block->live);
  release_if_complete(warp().barrier, --warp().live);
  switch_to(&host);
  std::abort();  // a fiber that is done is not continued
}

HIMO_SCHEDULER char* allocate(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("cuda_on_host: out of memory for %lu bytes\n", bytes);
  return static_cast<char*>(memory);
}

HIMO_SCHEDULER void prepare(Fiber& fiber) {
#if defined(__x86_64__)
  // `ret` of switch_stacks enters `enter` as a call would: the stack is 8 bytes off 16.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(&enter);
  fiber.context = top - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
#endif
#if defined(__SANITIZE_THREAD__)
  fiber.tsan = __tsan_create_fiber(0);
#endif
}

// Runs a block to its end. Its fibers run in another order for each seed and each round.
HIMO_SCHEDULER void run(Block& block) {
  block.stacks = allocate(block_size * kStackBytes);
  for (unsigned i = 0; i < block_size; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.index = i;
    fiber.block = &block;
    fiber.stack = block.stacks + i * kStackBytes;
    prepare(fiber);
  }
  while (block.live > 0) {
    order_seed = order_seed * 1664525u + 1013904223u;  // Numerical Recipes' generator
    bool moved = false;
    for (unsigned i = 0; i < block_size; ++i) {
      Fiber& fiber = block.fibers[(order_seed >> 8) % block_size ^ i];
      if (fiber.done || (fiber.waits_for && fiber.waits_for->round == fiber.round)) continue;
      switch_to(&fiber);
      moved = true;
    }
    if (!moved) fail("cuda_on_host: deadlock, %lu threads wait at a barrier\n", block.live);
  }
  munmap(block.stacks, block_size * kStackBytes);
}

// An array of shared memory: every thread of a block asks for the same arrays in the same order.
class SharedMemory {
 public:
  template <class T>
  T* array(size_t count) {
    return reinterpret_cast<T*>(bytes(count * sizeof(T)));
  }

 private:
  HIMO_SCHEDULER static char* at(size_t start, size_t used, size_t size) {
    Block& block = *current->block;
    if (used > block.requested || start + size + kRedZone > block.reserved)
      fail("cuda_on_host: more shared memory than the %lu bytes launched\n", block.requested);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(block.shared + start, size);
#endif
    return block.shared + start;
  }

  char* bytes(size_t size) {
    used_ += (size + 15) / 16 * 16;
    char* start = at(next_, used_, size);
    next_ += (size + kRedZone - 1) / kRedZone * kRedZone + kRedZone;
    return start;
  }

  size_t used_ = 0, next_ = 0;
};

// Runs body once for each thread of `blocks` blocks. threads is a power of two and whole warps.
HIMO_SCHEDULER void launch(unsigned blocks, unsigned threads, size_t shared, cudaStream_t,
                           const std::function<void()>& body) {
  if (threads % kLanes || threads & (threads - 1) || threads > 1024)
    fail("cuda_on_host: expected threads to be a power of two from 32 to 1024, got %lu\n", threads);
  if (shared > kLargestShared)
    fail("cuda_on_host: %lu bytes of shared memory do not fit a block\n", shared);
  block_size = threads;
  grid_size = blocks;
#if defined(__SANITIZE_THREAD__)
  host.tsan = __tsan_get_current_fiber();
#endif
  // All blocks live to the end of the launch, because ThreadSanitizer orders a new fiber after one
  // that was destroyed before.
  std::vector<Block> running(blocks);
  std::vector<std::unique_ptr<Fiber[]>> fibers;
  std::vector<std::unique_ptr<Warp[]>> warps;
  const size_t reserved = 2 * shared + 64 * kRedZone;
  for (unsigned b = 0; b < blocks; ++b) {
    fibers.emplace_back(new Fiber[threads]);
    warps.emplace_back(new Warp[threads / kLanes]);
    Block& block = running[b];
    block = {b,       threads, {},     fibers[b].get(), warps[b].get(),
             nullptr, nullptr, shared, reserved,        &body};
    block.shared = allocate(reserved);
    std::memset(block.shared, 0xFF, reserved);  // NaN
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(block.shared, reserved);
#endif
    run(block);
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&launch_end);
  for (auto& of_block : fibers) {
    for (unsigned i = 0; i < threads; ++i) __tsan_destroy_fiber(of_block[i].tsan);
  }
#endif
  for (Block& block : running) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(block.shared, reserved);
#endif
    munmap(block.shared, reserved);
  }
}

// Exchanges a word with the lane `from` of the warp. As on the device, this orders no memory.
HIMO_SCHEDULER uint64_t exchange(uint64_t word, unsigned from) {
  Warp& w = warp();
  uint64_t* slots = w.slots[w.barrier.round % 2];
  slots[lane()] = word;
  arrive(w.barrier, w.live, false);
  return slots[from % kLanes];
}

template <class T>
T exchanged(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  union {
    uint64_t word;
    T value;
  } bits;
  bits.word = 0;
  bits.value = value;
  bits.word = exchange(bits.word, from);
  return bits.value;
}

HIMO_SCHEDULER unsigned ballot(bool set) {
  Warp& w = warp();
  uint64_t* slots = w.slots[w.barrier.round % 2];
  slots[lane()] = set;
  arrive(w.barrier, w.live, false);
  unsigned bits = 0;
  for (unsigned i = 0; i < kLanes; ++i) bits |= static_cast<unsigned>(slots[i] != 0) << i;
  return bits;
}

struct Index {
  unsigned x;
};
HIMO_SCHEDULER Index thread_index() { return {current->index}; }
HIMO_SCHEDULER Index block_index() { return {current->block->index}; }
HIMO_SCHEDULER void sync_block() { arrive(current->block->barrier, current->block->live, true); }
HIMO_SCHEDULER void sync_warp() { arrive(warp().barrier, warp().live, true); }

}  // namespace himo::emulate

#define threadIdx (himo::emulate::thread_index())
#define blockIdx (himo::emulate::block_index())

inline void __syncthreads() { himo::emulate::sync_block(); }
inline void __syncwarp(unsigned = ~0u) { himo::emulate::sync_warp(); }
inline unsigned __ballot_sync(unsigned, bool set) { return himo::emulate::ballot(set); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <class T>
T __shfl_sync(unsigned, T value, unsigned from) {
  return himo::emulate::exchanged(value, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return himo::emulate::exchanged(value, himo::emulate::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = himo::emulate::lane();
  return himo::emulate::exchanged(value, lane < distance ? lane : lane - distance);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = himo::emulate::lane();
  return himo::emulate::exchanged(value,
                                  lane + distance < himo::emulate::kLanes ? lane + distance : lane);
}
