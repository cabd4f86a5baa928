// The threads of a CUDA kernel on a CPU, and the instructions that they execute together: what the
// host bodies of effc_cuda.h stand on. For values, not for speed.
//
// Each thread of a block is a fiber that runs until it waits for others: at a barrier, or in an
// instruction of its warp, which the last lane to arrive computes for all of them. Blocks run one
// after another. Asynchronous copies happen when they are waited for, and shared memory begins as
// NaN, so that a wait or a barrier too few shows in the values. Matrix instructions are those of
// effc_simt.h, the runtime of translated PTX.
#pragma once

#include <stdio.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#include "effc_simt.h"

#define __global__
#define __launch_bounds__(...)

struct GpuIndex {
  uint32_t x, y, z;
};
static thread_local GpuIndex threadIdx, blockIdx, blockDim, gridDim;

namespace effc {
namespace gpu {

constexpr size_t kStack = 128 * 1024;  // bytes of a fiber: fragments and what they are gathered in

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Warp {
  uint32_t live = 0, arrived = 0;
  uint64_t round = 0;  // instructions of the warp that are done
  void* lanes[32];
};

struct Thread {
  ucontext_t context;
  char* stack;
  Warp* warp;
  uint32_t lane;
  bool done;
  const uint64_t* waits_for;  // goes on when this is not `seen` any more
  uint64_t seen;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // copies in each group that is committed and not waited for
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> memory;
  ucontext_t scheduler;
  Thread* running = nullptr;
  unsigned char* shared = nullptr;
  uint32_t live = 0, arrived = 0;
  uint64_t round = 0;  // barriers that are passed
  const std::function<void()>* kernel = nullptr;
};

static thread_local Block* block;

EFFC_INLINE unsigned char* shared() { return block->shared; }

static inline void wait_for(const uint64_t& round) {
  Thread& self = *block->running;
  self.waits_for = &round;
  self.seen = round;
  swapcontext(&self.context, &block->scheduler);
}

static inline void block_barrier() {
  Block& b = *block;
  if (++b.arrived == b.live) {
    b.arrived = 0;
    ++b.round;
  } else {
    wait_for(b.round);
  }
}

// `last` gets what every lane of the warp brought, once all 32 are here.
template <class F>
static void together(void* mine, F last) {
  Thread& self = *block->running;
  Warp& w = *self.warp;
  w.lanes[self.lane] = mine;
  w.arrived |= 1u << self.lane;
  if (w.arrived == ~0u) {
    last(w.lanes);
    w.arrived = 0;
    ++w.round;
  } else {
    wait_for(w.round);
  }
}

static inline void warp_barrier() {
  together(nullptr, [](void**) {});
}

// -- running a grid -------------------------------------------------------------------------------

static void begin() {
  (*block->kernel)();
  Thread& self = *block->running;
  self.done = true;
  self.warp->live &= ~(1u << self.lane);
  --block->live;
  swapcontext(&self.context, &block->scheduler);
}

[[noreturn]] static inline void stuck() {
  fprintf(stderr, "effc: block (%u, %u, %u) stands still: %u threads wait, %u of them at a barrier\n",
          blockIdx.x, blockIdx.y, blockIdx.z, block->live, block->arrived);
  abort();
}

static void run_block() {
  Block& b = *block;
  for (uint32_t i = 0; i < blockDim.x; ++i) {
    Thread& t = b.threads[i];
    t.warp = &b.warps[i / 32];
    t.lane = i % 32;
    t.done = false;
    t.waits_for = nullptr;
    t.copies.clear();
    t.groups.clear();
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, begin, 0);
  }
  while (b.live) {
    bool moved = false;
    for (uint32_t i = 0; i < blockDim.x; ++i) {
      Thread& t = b.threads[i];
      if (t.done || (t.waits_for && *t.waits_for == t.seen)) continue;
      t.waits_for = nullptr;
      b.running = &t;
      threadIdx = {i, 0, 0};
      swapcontext(&b.scheduler, &t.context);
      moved = true;
    }
    if (!moved) stuck();
  }
}

static void launch(GpuIndex grid, uint32_t threads, size_t bytes, const std::function<void()>& kernel) {
  Block b;
  block = &b;
  b.kernel = &kernel;
  b.threads.resize(threads);
  b.memory.resize(bytes + 128);
  b.shared = b.memory.data() + (128 - reinterpret_cast<uintptr_t>(b.memory.data()) % 128);
  std::vector<char> stacks(threads * kStack);
  for (uint32_t i = 0; i < threads; ++i) b.threads[i].stack = stacks.data() + i * kStack;
  gridDim = grid;
  blockDim = {threads, 1, 1};
  for (uint32_t z = 0; z < grid.z; ++z) {
    for (uint32_t y = 0; y < grid.y; ++y) {
      for (uint32_t x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        b.warps.assign((threads + 31) / 32, Warp());
        b.live = threads;
        b.arrived = 0;
        memset(b.shared, 0xff, bytes);
        run_block();
      }
    }
  }
  block = nullptr;
}

// -- copies ---------------------------------------------------------------------------------------

EFFC_INLINE void cp_async(void* to, const void* from, int bytes, int valid) {
  block->running->copies.push_back({to, from, bytes, valid});
}

static inline void cp_async_commit() {
  Thread& self = *block->running;
  size_t before = 0;
  for (size_t n : self.groups) before += n;
  self.groups.push_back(self.copies.size() - before);
}

static inline void cp_async_wait(size_t keep) {
  Thread& self = *block->running;
  while (self.groups.size() > keep) {
    const size_t count = self.groups.front();
    for (size_t i = 0; i < count; ++i) {
      const Copy& c = self.copies[i];
      memcpy(c.to, c.from, c.valid);
      memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + count);
    self.groups.erase(self.groups.begin());
  }
}

// -- instructions of a warp -----------------------------------------------------------------------

struct Exchange {
  uint32_t value, by, result;
};

// from(lane, by): whose value the lane gets.
template <class F>
static uint32_t exchange(uint32_t value, uint32_t by, F from) {
  Exchange mine = {value, by, 0};
  together(&mine, [&](void** lanes) {
    for (int l = 0; l < 32; ++l) {
      Exchange& e = *static_cast<Exchange*>(lanes[l]);
      e.result = static_cast<Exchange*>(lanes[from(l, static_cast<int>(e.by))])->value;
    }
  });
  return mine.result;
}

static inline uint32_t shuffle_xor(uint32_t v, uint32_t by) {
  return exchange(v, by, [](int l, int n) { return l ^ (n & 31); });
}
static inline uint32_t shuffle_down(uint32_t v, uint32_t by) {
  return exchange(v, by, [](int l, int n) { return l + (n & 31) < 32 ? l + (n & 31) : l; });
}
static inline uint32_t shuffle_up(uint32_t v, uint32_t by) {
  return exchange(v, by, [](int l, int n) { return l - (n & 31) >= 0 ? l - (n & 31) : l; });
}
static inline uint32_t shuffle_from(uint32_t v, uint32_t by) {
  return exchange(v, by, [](int, int n) { return n & 31; });
}

static inline uint32_t ballot(bool yes) {
  struct Vote {
    bool yes;
    uint32_t all;
  } mine = {yes, 0};
  together(&mine, [](void** lanes) {
    uint32_t all = 0;
    for (int l = 0; l < 32; ++l) all |= uint32_t(static_cast<Vote*>(lanes[l])->yes) << l;
    for (int l = 0; l < 32; ++l) static_cast<Vote*>(lanes[l])->all = all;
  });
  return mine.all;
}

static inline void ldmatrix(uint32_t* to, int count, bool turned, const void* row) {
  struct Lane {
    uint32_t* to;
    const uint16_t* row;
  } mine = {to, static_cast<const uint16_t*>(row)};
  together(&mine, [&](void** lanes) {
    const auto at = [&](int l) { return *static_cast<Lane*>(lanes[l]); };
    for (int m = 0; m < count; ++m) {
      for (int l = 0; l < 32; ++l) {
        const int g = l / 4, t = l % 4;
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          pair[i] = turned ? at(8 * m + 2 * t + i).row[g] : at(8 * m + g).row[2 * t + i];
        }
        at(l).to[m] = static_cast<uint32_t>(pair[1]) << 16 | pair[0];
      }
    }
  });
}

template <class A, class B, class S, int K>
struct Multiply {
  static void of(simt::Outs<4> d, simt::Regs<4> a, simt::Regs<2> b, simt::Regs<4> c) {
    simt::mma<A, B, S, S, 16, K, false>(d, a, b, c);
  }
};
using F16 = Multiply<simt::f16, simt::f16, float, 16>;
using BF16 = Multiply<simt::bf16, simt::bf16, float, 16>;
using TF32 = Multiply<simt::tf32, simt::tf32, float, 8>;
using S8 = Multiply<simt::s8, simt::s8, int32_t, 32>;
using U8 = Multiply<simt::u8, simt::u8, int32_t, 32>;
using U8S8 = Multiply<simt::u8, simt::s8, int32_t, 32>;
using S4 = Multiply<simt::s4, simt::s4, int32_t, 64>;
using U4 = Multiply<simt::u4, simt::u4, int32_t, 64>;

template <bool XOR>
struct MultiplyBits {
  static void of(simt::Outs<4> d, simt::Regs<4> a, simt::Regs<2> b, simt::Regs<4> c) {
    simt::mma_b1<XOR, 16>(d, a, b, c);
  }
};
using B1And = MultiplyBits<false>;
using B1Xor = MultiplyBits<true>;

template <class How, class S>
static void mma(S* d, const uint32_t* a, const uint32_t* b) {
  struct Lane {
    S* d;
    const uint32_t *a, *b;
  } mine = {d, a, b};
  together(&mine, [](void** lanes) {
    alignas(64) uint32_t r[10][32];  // d, a, b as a register of the warp is: an array over lanes
    for (int l = 0; l < 32; ++l) {
      const Lane& x = *static_cast<Lane*>(lanes[l]);
      for (int i = 0; i < 4; ++i) r[i][l] = bit_cast<uint32_t>(x.d[i]);
      for (int i = 0; i < 4; ++i) r[4 + i][l] = x.a[i];
      for (int i = 0; i < 2; ++i) r[8 + i][l] = x.b[i];
    }
    How::of({r[0], r[1], r[2], r[3]}, {r[4], r[5], r[6], r[7]}, {r[8], r[9]}, {r[0], r[1], r[2], r[3]});
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) static_cast<Lane*>(lanes[l])->d[i] = bit_cast<S>(r[i][l]);
    }
  });
}

EFFC_INLINE uint32_t to_tf32(float x) { return bit_cast<uint32_t>(simt::to_tf32(x, simt::RNA)); }

}  // namespace gpu
}  // namespace effc
