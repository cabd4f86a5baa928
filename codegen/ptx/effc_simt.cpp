// Runs a grid of translated PTX: blocks one after another, the warps of a block as fibers.
//
// A warp runs until a barrier makes it wait; then another goes on. A block whose warps only spin,
// waiting for another block, gets company: the next block of the grid is taken in as well, so that
// grid-wide barriers and locks come to an end. With `check`, every access is looked at: bounds and
// alignment, whether shared memory was written before, and whether another thread touched the same
// bytes without a barrier in between.
#include <effc.h>

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#include <ucontext.h>
#define SIMT_PORTABLE
#endif

// ------------------------------------------------------------------ fibers

#ifdef SIMT_PORTABLE
struct Context {
  ucontext_t u;
};
static void switch_to(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
static void prepare(Context& c, char* stack, size_t size, void (*entry)()) {
  getcontext(&c.u);
  c.u.uc_stack.ss_sp = stack;
  c.u.uc_stack.ss_size = size;
  c.u.uc_link = nullptr;
  makecontext(&c.u, entry, 0);
}
#else
struct Context {
  void* sp;
};
// Saves what the System V ABI says a call keeps; the caller has saved the rest.
extern "C" void effc_simt_switch(void** from, void* to);
asm(R"(
.text
.type effc_simt_switch,@function
effc_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size effc_simt_switch,.-effc_simt_switch
)");
static void switch_to(Context& from, Context& to) { effc_simt_switch(&from.sp, to.sp); }
static void prepare(Context& c, char* stack, size_t size, void (*entry)()) {
  void** s = reinterpret_cast<void**>(stack + size);
  *--s = nullptr;  // the stack is 16-byte aligned before a call's return address
  *--s = nullptr;
  *--s = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--s = nullptr;
  c.sp = s;
}
#endif

namespace {

using namespace simt;

enum Found : int {
  DIVERGED = DIVERGED_BARRIER, STUCK = STUCK_WARP, TRAPPED = TRAP, ASSERTED = ASSERT, CALL = BAD_CALL,
  DEADLOCK = 10, SPINNING, BOUNDS, MISALIGNED, UNWRITTEN, RACE, PENDING_ASYNC, NO_STACK,
};

enum Order { ASCENDING, DESCENDING, SHUFFLED };

struct Random {  // SplitMix64 (Steele, Lea and Flood, 2014)
  uint64_t s;
  uint64_t next() {
    uint64_t z = s += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
};
template <class T>
void shuffle_order(T* p, int n, Random& r) {
  for (int i = n - 1; i > 0; i--) std::swap(p[i], p[r.next() % uint64_t(i + 1)]);
}

// Who touched some bytes last. Clocks count a warp's synchronisations, from 1; 0 is nobody.
struct Cell {
  struct Access {
    uint32_t clock = 0, block = 0;
    uint16_t thread = 0, atomic = 0;
    int32_t pc = -1;
  } write, read[2];
  uint8_t written = 0, pending = 0;
};

struct Copy {
  uint32_t to, size, valid, lane, group;
  uint64_t from;
  int pc;
};

struct Block;
struct Worker;

enum State { READY, WAITING, DONE, BROKEN };

struct Fiber {
  Warp warp;
  Context context;
  Block* block;
  char* stack = nullptr;
  State state;
  int waits_at, waits_for;
  uint32_t reduced;
  uint32_t known[32];  // clocks of the other warps that happened before
  std::vector<Copy> copies;
  uint32_t committed[32];
  uint8_t order[32];
};

struct Barrier {
  uint32_t arrived = 0, threads = 0, count = 0, all = 1, any = 0;
  uint32_t clocks[32] = {};
};

struct Block {
  std::vector<Fiber*> warps;
  std::vector<int> order;
  Barrier barriers[16];
  char* shared = nullptr;
  char* local = nullptr;
  uint32_t alive, linear;
  std::vector<Cell> cells;
};

struct Stacks {  // kept by a thread from launch to launch
  std::vector<char*> free;
  size_t size = 0;
  ~Stacks() { clear(); }
  void clear() {
    for (char* p : free) munmap(p, size);
    free.clear();
  }
  char* take(size_t bytes) {
    if (bytes > size) clear(), size = bytes;
    if (!free.empty()) {
      char* p = free.back();
      free.pop_back();
      return p;
    }
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    mprotect(p, 4096, PROT_NONE);  // an overrun is a fault, not a wrong number
    return static_cast<char*>(p);
  }
};
thread_local Stacks stacks;

struct Shared {  // by all workers of a launch
  Launch* launch;
  std::vector<std::vector<Cell>> cells;  // of each region
  std::mutex mutex;  // of the findings
  std::atomic<bool> failed{false};
};

struct Worker {
  Launch* launch;
  Shared* common;
  Context context;
  Fiber* current = nullptr;
  std::vector<Block*> resident, spare;
  uint64_t yields = 0;
  Random random;
  Lanes<uint32_t> lanes;
  uint32_t threads, nwarp;
  int64_t next, end;

  void run(int64_t begin, int64_t stop);
  void admit();
  void round(Block& b);
  Block* make();
  void free_block(Block* b);
  void direct(int64_t begin, int64_t stop);
  void place(Block& b, int64_t linear);
  Finding* report(int kind, const Fiber& f, int lane, int pc);
};
thread_local Worker* worker = nullptr;

Fiber& fiber_of(Warp* w) { return *reinterpret_cast<Fiber*>(reinterpret_cast<char*>(w) - offsetof(Fiber, warp)); }

// The same mistake at the same place is counted, not listed again.
Finding* Worker::report(int kind, const Fiber& f, int lane, int pc) {
  static Finding scratch;
  const std::lock_guard<std::mutex> hold(common->mutex);
  for (uint32_t i = 0; i < launch->findings_count; i++) {
    Finding& x = launch->findings[i];
    if (x.kind == kind && x.pc == pc) {
      x.count++;
      return &scratch;
    }
  }
  if (launch->findings_count >= launch->findings_room) return &scratch;
  Finding& x = launch->findings[launch->findings_count++];
  x = Finding{};
  x.kind = kind, x.pc = pc, x.other_pc = -1, x.count = 1;
  memcpy(x.block, f.warp.ctaid, sizeof x.block);
  x.thread = f.warp.index * 32 + uint32_t(lane);
  return &x;
}

void to_scheduler(Fiber& f) { switch_to(f.context, worker->context); }

[[noreturn]] void give_up(Fiber& f) {
  f.state = BROKEN;
  worker->common->failed = true;
  to_scheduler(f);
  abort();
}

// ------------------------------------------------------------------ barriers

// Warps in whole count, as PTX has it for bar: a thread that exited no longer takes part.
void release_if_complete(Block& b, uint32_t id) {
  Barrier& bar = b.barriers[id];
  const uint32_t wanted = bar.threads ? (bar.threads + 31) / 32 : b.alive;
  if (!bar.arrived || bar.arrived < wanted) return;
  for (Fiber* f : b.warps) {
    if (f->state != WAITING || f->waits_for != int(id)) continue;
    f->state = READY;
    f->reduced = bar.count | bar.all << 16 | bar.any << 17;
    for (uint32_t k = 0; k < 32; k++) f->known[k] = std::max(f->known[k], bar.clocks[k]);
  }
  bar = Barrier();
}

void arrive(Fiber& f, uint32_t id, uint32_t threads, int wait, int pc) {
  Block& b = *f.block;
  Barrier& bar = b.barriers[id];
  bar.arrived++;
  bar.threads = threads;
  const uint32_t me = f.warp.index;
  f.known[me] = uint32_t(f.warp.clock);
  for (uint32_t k = 0; k < 32; k++) bar.clocks[k] = std::max(bar.clocks[k], f.known[k]);
  f.warp.clock++;
  f.waits_at = pc;
  if (wait) {
    f.state = WAITING;
    f.waits_for = int(id);
  }
  release_if_complete(b, id);
  if (wait && f.state == WAITING) to_scheduler(f);
}

bool left_out(int pc) { return pc + 1 == worker->launch->left_out; }

void note(const Fiber& f, int kind, int lane, uint64_t address, uint32_t size, int pc) {
  Launch& l = *worker->launch;
  if (!l.events) return;
  if (l.events_count < l.events_room)
    l.events[l.events_count] = {kind, pc, f.block->linear, f.warp.index * 32 + uint32_t(lane), uint32_t(address), size};
  l.events_count++;
}

void hook_barrier(Warp* w, Mask, uint32_t id, uint32_t threads, int wait, int pc) {
  if (left_out(pc)) return;
  note(fiber_of(w), BARRIER, 0, id, w->live, pc);
  arrive(fiber_of(w), id & 15, threads, wait, pc);
}

uint32_t hook_barrier_reduce(Warp* w, Mask m, uint32_t id, uint32_t threads, int op, Mask p, int pc) {
  Fiber& f = fiber_of(w);
  Barrier& bar = f.block->barriers[id & 15];
  bar.count += uint32_t(__builtin_popcount(m & p));
  bar.all &= (m & ~p) == 0;
  bar.any |= (m & p) != 0;
  arrive(f, id & 15, threads, 1, pc);
  return op == 0 ? f.reduced & 0xffff : op == 1 ? f.reduced >> 16 & 1 : f.reduced >> 17 & 1;
}

void hook_yield(Warp* w, int pc) {
  Fiber& f = fiber_of(w);
  f.waits_at = pc;
  worker->yields++;
  to_scheduler(f);
}

void hook_fail(Warp* w, int kind, Mask lanes, uint64_t a, uint64_t b, int pc) {
  Fiber& f = fiber_of(w);
  Finding* x = worker->report(kind, f, lanes ? __builtin_ctz(lanes) : 0, pc);
  x->address = a;
  x->other_thread = uint32_t(b);
  x->size = lanes;
  give_up(f);
}

// ------------------------------------------------------------------ checks

bool before(const Cell::Access& a, const Fiber& f, uint32_t thread) {
  if (a.block != f.block->linear) return false;
  if (a.thread == thread) return true;
  const uint32_t warp = a.thread / 32;
  return warp == f.warp.index ? a.clock < f.warp.clock : a.clock <= f.known[warp];
}

Finding* conflict(Fiber& f, int lane, int pc, int kind, const Cell::Access& with, int with_kind, uint64_t address, uint32_t size, int space) {
  Finding* x = worker->report(RACE, f, lane, pc);
  x->other_pc = with.pc;
  x->other_thread = with.thread;
  x->access = uint32_t(kind);
  x->other_access = uint32_t(with_kind);
  x->address = address;
  x->size = size;
  x->space = space;
  return x;
}

// Looks at one cell; true where this access may race. Records the access.
void touch(Cell& c, Fiber& f, int lane, int kind, uint64_t address, uint32_t size, int space, bool same, bool across, int pc) {
  const uint32_t thread = f.warp.index * 32 + uint32_t(lane);
  const bool atomic = kind == ATOMIC, writes = kind != READ;
  auto races = [&](const Cell::Access& a) {
    if (!a.clock || (atomic && a.atomic) || before(a, f, thread)) return false;
    return across || a.block == f.block->linear;
  };
  // Two writes of one value are as good as one.
  if (!same && races(c.write)) conflict(f, lane, pc, kind, c.write, c.write.atomic ? ATOMIC : WRITE, address, size, space);
  else if (writes)
    for (const auto& r : c.read)
      if (races(r)) {
        conflict(f, lane, pc, kind, r, READ, address, size, space);
        break;
      }
  const Cell::Access now{uint32_t(f.warp.clock), f.block->linear, uint16_t(thread), uint16_t(atomic), pc};
  if (writes) {
    c.write = now;
    c.written = 1;
  } else {
    auto& r = c.read;
    if (!r[0].clock || before(r[0], f, thread)) r[0] = now;
    else r[1] = now;
  }
}

const char* region_of(uint64_t a, uint32_t size, uint32_t& index) {
  const Launch& l = *worker->launch;
  for (uint32_t i = 0; i < l.regions_count; i++) {
    const Region& r = l.regions[i];
    if (a >= r.base && a + size <= r.base + r.bytes) {
      index = i;
      return "";
    }
  }
  return nullptr;
}

bool wrong(int found, Fiber& f, int lane, int space, int kind, uint64_t address, uint32_t size, int pc) {
  Finding* x = worker->report(found, f, lane, pc);
  x->space = space;
  x->access = uint32_t(kind);
  x->address = address;
  x->size = size;
  return false;
}

bool check_shared(Fiber& f, int lane, uint64_t address, uint32_t size, int kind, const void* value, int pc) {
  Block& b = *f.block;
  if (address + size > f.warp.shared_bytes) return wrong(BOUNDS, f, lane, SHARED, kind, address, size, pc);
  if (address % size) return wrong(MISALIGNED, f, lane, SHARED, kind, address, size, pc);
  const bool same = value && !memcmp(b.shared + address, value, size);
  note(f, kind, lane, address, size, pc);
  for (uint32_t i = 0; i < size; i++) {
    Cell& c = b.cells[address + i];
    if (c.pending) {  // copies that are under way keep no order among themselves either
      Finding* x = worker->report(PENDING_ASYNC, f, lane, pc);
      x->space = SHARED, x->access = uint32_t(kind), x->address = address, x->size = size;
      x->other_pc = c.write.pc, x->other_thread = c.write.thread;
    }
    if (kind == READ && !c.written && !c.pending) wrong(UNWRITTEN, f, lane, SHARED, kind, address, size, pc);
    touch(c, f, lane, kind, address, size, SHARED, same, false, pc);
    if (kind == READ && !c.written) c.written = 1;  // told once
  }
  return true;
}

bool hook_access(Warp* w, int lane, int space, int kind, uint64_t address, uint32_t size, const void* value, int pc) {
  Fiber& f = fiber_of(w);
  if (space == PARAM) return true;
  if (space == SHARED) return check_shared(f, lane, uint32_t(address), size, kind, value, pc);
  if (space == LOCAL) {
    if (uint32_t(address) + size > w->local_bytes) return wrong(BOUNDS, f, lane, LOCAL, kind, address, size, pc);
    return true;
  }
  // A generic address may lie in this block's shared or this thread's local memory.
  const uint64_t shared = reinterpret_cast<uint64_t>(w->shared), local = reinterpret_cast<uint64_t>(w->local);
  if (address >= shared && address < shared + w->shared_bytes) return check_shared(f, lane, address - shared, size, kind, value, pc);
  if (address >= local && address < local + w->local_bytes * 32) return true;
  uint32_t index = 0;
  if (!region_of(address, size, index)) return wrong(BOUNDS, f, lane, GLOBAL, kind, address, size, pc);
  const Region& r = worker->launch->regions[index];
  if (address % size) return wrong(MISALIGNED, f, lane, GLOBAL, kind, address, size, pc);
  if (kind != READ && !r.writable) return wrong(BOUNDS, f, lane, GLOBAL, kind, address, size, pc);
  auto& cells = worker->common->cells[index];
  if (!cells.empty()) {
    const bool same = value && !memcmp(reinterpret_cast<const void*>(address), value, size);
    const uint64_t first = (address - r.base) / r.granule, last = (address + size - 1 - r.base) / r.granule;
    for (uint64_t i = first; i <= last; i++)
      touch(cells[i], f, lane, kind, address, size, GLOBAL, same, worker->launch->across_blocks, pc);
  }
  return true;
}

void hook_warp_sync(Warp* w, Mask lanes, int pc) {
  if (lanes != w->live || left_out(pc)) return;
  note(fiber_of(w), WARP_BARRIER, 0, 0, lanes, pc);
  w->clock++;
}

void perform(Fiber& f, const Copy& c) {
  char* p = f.block->shared + c.to;
  memcpy(p, reinterpret_cast<const char*>(c.from), c.valid);
  memset(p + c.valid, 0, c.size - c.valid);
}

void hook_async_copy(Warp* w, int lane, uint32_t to, uint64_t from, uint32_t size, uint32_t valid, int pc) {
  Fiber& f = fiber_of(w);
  if (valid && !hook_access(w, lane, GLOBAL, READ, from, valid == size ? size : 1, nullptr, pc)) return;
  if (!check_shared(f, lane, to, size, ASYNC, nullptr, pc)) return;
  for (uint32_t i = 0; i < size; i++) f.block->cells[to + i].pending = 1;
  const Copy c{to, size, valid, uint32_t(lane), f.committed[lane], from, pc};
  if (!worker->launch->lazy) perform(f, c);
  f.copies.push_back(c);
}

void hook_async_commit(Warp* w, Mask lanes) {
  Fiber& f = fiber_of(w);
  note(f, COMMIT, 0, 0, lanes, -1);
  for (Mask k = lanes; k; k &= k - 1) f.committed[__builtin_ctz(k)]++;
}

// Completes the copies of all groups but the `keep` newest. keep = ~0: those not committed as well.
void hook_async_wait(Warp* w, Mask lanes, uint32_t keep, int pc) {
  if (left_out(pc)) return;
  Fiber& f = fiber_of(w);
  note(f, WAIT, 0, keep, lanes, pc);
  auto done = [&](const Copy& c) {
    if (!(lanes >> c.lane & 1)) return false;
    if (keep != ~0u && c.group + keep >= f.committed[c.lane]) return false;
    if (worker->launch->lazy) perform(f, c);
    for (uint32_t i = 0; i < c.size; i++) {
      Cell& x = f.block->cells[c.to + i];
      x.pending = 0;
      x.written = 1;
      x.write = {uint32_t(w->clock), f.block->linear, uint16_t(w->index * 32 + c.lane), 0, c.pc};
    }
    return true;
  };
  f.copies.erase(std::remove_if(f.copies.begin(), f.copies.end(), done), f.copies.end());
}

const Hooks hooks = {hook_barrier, hook_barrier_reduce, hook_yield, hook_fail, hook_access,
                     hook_warp_sync, hook_async_copy, hook_async_commit, hook_async_wait};

// ------------------------------------------------------------------ scheduling

void entry() {
  Fiber& f = *worker->current;
  worker->launch->kernel(f.warp, worker->launch->params);
  f.state = DONE;
  f.block->alive--;
  for (uint32_t id = 0; id < 16; id++)
    if (f.block->barriers[id].arrived && !f.block->barriers[id].threads) release_if_complete(*f.block, id);
  to_scheduler(f);
  abort();
}

Block* Worker::make() {
  if (!spare.empty()) {
    Block* b = spare.back();
    spare.pop_back();
    return b;
  }
  Block* b = new Block;
  b->shared = effc::scratch<char>(launch->shared_bytes + 1024);
  b->local = effc::scratch<char>(int64_t(launch->local_bytes) * 32 * nwarp);
  for (uint32_t i = 0; i < nwarp; i++) {
    Fiber* f = new (std::align_val_t(64)) Fiber;
    Warp& w = f->warp;
    f->block = b;
    w.hooks = &hooks;
    w.shared = b->shared;
    w.local = b->local + launch->local_bytes * 32 * i;
    w.local_bytes = launch->local_bytes;
    w.shared_bytes = launch->shared_bytes;
    w.ntid = launch->block, w.nctaid = launch->grid;
    w.index = i, w.nwarp = nwarp;
    const uint32_t *n = launch->block;
    for (uint32_t l = 0; l < 32; l++) {
      const uint32_t t = i * 32 + l;
      w.lane.x[l] = l;
      w.tid[0].x[l] = t % n[0], w.tid[1].x[l] = t / n[0] % n[1], w.tid[2].x[l] = t / (n[0] * n[1]);
    }
    b->warps.push_back(f);
    b->order.push_back(int(i));
  }
  if (launch->check) b->cells.resize(launch->shared_bytes);
  return b;
}

void Worker::free_block(Block* b) {
  for (Fiber* f : b->warps) {
    if (f->stack) stacks.free.push_back(f->stack);
    f->~Fiber();
    ::operator delete(f, std::align_val_t(64));
  }
  effc::release(b->shared);
  effc::release(b->local);
  delete b;
}

void Worker::place(Block& b, int64_t linear) {
  b.linear = uint32_t(linear);
  b.alive = nwarp;
  for (auto& bar : b.barriers) bar = Barrier();
  memset(b.shared, 0xff, launch->shared_bytes);  // NaN, -1: reading what nobody wrote shows
  if (launch->check) std::fill(b.cells.begin(), b.cells.end(), Cell());
  for (uint32_t i = 0; i < nwarp; i++) {
    Fiber& f = *b.warps[i];
    Warp& w = f.warp;
    w.ctaid[0] = uint32_t(linear % launch->grid[0]);
    w.ctaid[1] = uint32_t(linear / launch->grid[0] % launch->grid[1]);
    w.ctaid[2] = uint32_t(linear / (int64_t(launch->grid[0]) * launch->grid[1]));
    const uint32_t left = threads - 32 * i;
    w.live = left >= 32 ? ALL : (1u << left) - 1;
    w.pc = -1, w.spins = 0, w.clock = 1;
    w.order = nullptr;
    f.state = READY;
    f.waits_at = -1;
    if (launch->check) {
      memset(f.known, 0, sizeof f.known);
      memset(f.committed, 0, sizeof f.committed);
      f.copies.clear();
      if (launch->order != ASCENDING) {
        for (int l = 0; l < 32; l++) f.order[l] = uint8_t(launch->order == DESCENDING ? 31 - l : l);
        if (launch->order == SHUFFLED) shuffle_order(f.order, 32, random);
        w.order = f.order;
      }
    }
  }
}

void Worker::admit() {
  Block* b = make();
  place(*b, next++);
  for (Fiber* f : b->warps) {
    if (!f->stack) f->stack = stacks.take(launch->stack_bytes);
    if (!f->stack) {
      report(NO_STACK, *f, 0, -1)->size = uint32_t(launch->stack_bytes >> 10);
      common->failed = true;
      break;
    }
    prepare(f->context, f->stack, launch->stack_bytes, entry);
  }
  resident.push_back(b);
  yields = 0;
}

void Worker::round(Block& b) {
  if (launch->order == DESCENDING) std::reverse(b.order.begin(), b.order.end());
  bool any = false;
  if (launch->order == SHUFFLED) shuffle_order(b.order.data(), int(nwarp), random);
  for (int i : b.order) {
    Fiber& f = *b.warps[uint32_t(i)];
    if (f.state != READY) continue;
    any = true;
    current = &f;
    switch_to(context, f.context);
    if (common->failed) return;
  }
  if (launch->order == DESCENDING) std::reverse(b.order.begin(), b.order.end());
  if (any || !b.alive) return;
  for (Fiber* f : b.warps)  // all that still live wait at barriers that never fill
    if (f->state == WAITING) {
      Finding* x = report(DEADLOCK, *f, __builtin_ctz(f->warp.live | 1u << 31), f->waits_at);
      x->size = uint32_t(f->waits_for);
      x->other_thread = b.alive;
    }
  common->failed = true;
}

// Without barriers and waiting a warp is a call.
void Worker::direct(int64_t begin, int64_t stop) {
  Block* b = make();
  for (int64_t i = begin; i < stop; i++) {
    place(*b, i);
    for (Fiber* f : b->warps) launch->kernel(f->warp, launch->params);
  }
  free_block(b);
}

constexpr uint64_t COMPANY = 64, HOPELESS = 200000;

void Worker::run(int64_t begin, int64_t stop) {
  Worker* outer = worker;
  worker = this;
  if (!launch->barriers) {
    direct(begin, stop);
    worker = outer;
    return;
  }
  next = begin, end = stop;
  while ((next < end || !resident.empty()) && !common->failed) {
    if (resident.empty() || (yields > COMPANY * nwarp * resident.size() && next < end)) admit();
    for (size_t i = 0; i < resident.size() && !common->failed;) {
      Block* b = resident[i];
      round(*b);
      if (b->alive) {
        i++;
      } else {
        resident.erase(resident.begin() + long(i));
        spare.push_back(b);
        yields = 0;
      }
    }
    if (next >= end && !resident.empty() && yields > HOPELESS * nwarp * resident.size()) {
      const Fiber& f = *resident[0]->warps[0];
      report(SPINNING, f, 0, f.waits_at);
      common->failed = true;
    }
  }
  for (Block* b : resident) free_block(b);
  for (Block* b : spare) free_block(b);
  worker = outer;
}

}  // namespace

// 0, or 1 where the launch gave up. `findings` says why.
extern "C" __attribute__((visibility("default"))) int effc_simt_launch(Launch* l) {
  const int64_t blocks = int64_t(l->grid[0]) * l->grid[1] * l->grid[2];
  Shared common;
  common.launch = l;
  if (l->check) {
    l->threads = 1;
    l->barriers = 1;
    for (uint32_t i = 0; i < l->regions_count; i++)
      common.cells.emplace_back(l->regions[i].granule ? l->regions[i].bytes / l->regions[i].granule + 1 : 0);
  }
  effc::parallel_for(blocks, 1, l->threads, [&](int64_t begin, int64_t end) {
    Worker w;
    w.launch = l;
    w.common = &common;
    w.random.s = l->seed;
    w.threads = l->block[0] * l->block[1] * l->block[2];
    w.nwarp = (w.threads + 31) / 32;
    w.run(begin, end);
  });
  return common.failed;
}
