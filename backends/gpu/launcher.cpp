// Launches a list of GPU kernels on a stream, one after the other or as one CUDA graph. `d` holds one
// call after another, as the CPU's runner (codegen/cpp/runner.cpp) reads them:
//   function, pointers, numbers, (index into r, byte offset) per pointer, the numbers
// where the first three numbers are the grid. The driver's functions are given by address, so nothing
// of CUDA is needed to build this.
#include <vector>

#include "effc.h"

struct Function {
  void* handle;
  int64_t threads, shared;  // of a block
};

constexpr int64_t MOST = 160;  // arguments of a kernel
constexpr int TOO_MANY = -1;

// One call of the list; `d` moves on to the next.
struct Call {
  const Function* f;
  int64_t pointers, numbers;
  const int64_t *where, *grid, *n;

  explicit Call(const int64_t*& d)
      : f(reinterpret_cast<const Function*>(d[0])), pointers(d[1]), numbers(d[2] - 3), where(d + 3),
        grid(where + 2 * pointers), n(grid + 3) {
    d = n + numbers;
  }

  bool empty() const { return !grid[0] || !grid[1] || !grid[2]; }
  bool fits() const { return pointers + numbers + 2 <= MOST; }
  int64_t pointer(char* const* r, int64_t i) const {
    return reinterpret_cast<int64_t>(r[where[2 * i]]) + where[2 * i + 1];
  }
  void arguments(char* const* r, int64_t* values) const {
    for (int64_t i = 0; i < pointers; ++i) values[i] = pointer(r, i);
    for (int64_t i = 0; i < numbers; ++i) values[pointers + i] = n[i];
    // Triton's kernels end with two addresses of scratch memory, which ours do without; CUDA's end
    // before, and the driver reads no more than a kernel has.
    values[pointers + numbers] = values[pointers + numbers + 1] = 0;
  }
};

struct Arguments {
  int64_t values[MOST];
  void* addresses[MOST];
  Arguments() {
    for (int64_t i = 0; i < MOST; ++i) addresses[i] = values + i;
  }
};

// cuLaunchKernel, or hipModuleLaunchKernel, which takes the same.
typedef int (*Launch)(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                      unsigned bz, unsigned shared, void* stream, void** arguments, void** more);

EFFC_EXPORT int64_t effc_launch(const int64_t* d, int64_t calls, char* const* r, Launch launch,
                                void* stream) {
  Arguments given;
  for (int64_t i = 0; i < calls; ++i) {
    const Call call(d);
    if (!call.fits()) return TOO_MANY;
    if (call.empty()) continue;
    call.arguments(r, given.values);
    const int64_t* g = call.grid;
    const int status = launch(call.f->handle, unsigned(g[0]), unsigned(g[1]), unsigned(g[2]),
                              unsigned(call.f->threads), 1, 1, unsigned(call.f->shared), stream,
                              given.addresses, nullptr);
    if (status) return status;
  }
  return 0;
}

// ------------------------------------------------------------------ graphs

struct Node {  // CUDA_KERNEL_NODE_PARAMS_v2
  void* function;
  unsigned gx, gy, gz, bx, by, bz, shared;
  void** arguments;
  void** more;
  void* kernel;
  void* context;  // null: the current one
};

// cuGraphCreate, cuGraphAddKernelNode_v2, cuGraphInstantiateWithFlags,
// cuGraphExecKernelNodeSetParams_v2, cuGraphLaunch, cuGraphExecDestroy, cuGraphDestroy
struct Graphs {
  int (*create)(void** graph, unsigned flags);
  int (*add)(void** node, void* graph, void* const* before, size_t count, const Node* node_of);
  int (*instantiate)(void** instance, void* graph, unsigned long long flags);
  int (*update)(void* instance, void* node, const Node* node_of);
  int (*launch)(void* instance, void* stream);
  int (*free_instance)(void* instance);
  int (*free_graph)(void* graph);
};

// A list of calls as an instance of a graph, and the addresses it was last run with. The list must
// stay where it is.
struct Recorded {
  struct Step {
    Call call;
    void* node;
    std::vector<int64_t> pointers;
  };
  const Graphs* api;
  void *graph = nullptr, *instance = nullptr;
  std::vector<Step> steps;

  explicit Recorded(const Graphs* api) : api(api) {}
  ~Recorded() {
    if (instance) api->free_instance(instance);
    if (graph) api->free_graph(graph);
  }
  static Node node(const Call& call, Arguments& given) {
    const int64_t* g = call.grid;
    return {call.f->handle, unsigned(g[0]), unsigned(g[1]), unsigned(g[2]), unsigned(call.f->threads),
            1, 1, unsigned(call.f->shared), given.addresses, nullptr, nullptr, nullptr};
  }

  int record(const int64_t* d, int64_t calls, char* const* r) {
    Arguments given;
    if (const int status = api->create(&graph, 0)) return status;
    for (int64_t i = 0; i < calls; ++i) {
      Call call(d);
      if (!call.fits()) return TOO_MANY;
      if (call.empty()) continue;
      call.arguments(r, given.values);
      const Node made = node(call, given);
      void* added = nullptr;
      void* const* before = steps.empty() ? nullptr : &steps.back().node;
      if (const int status = api->add(&added, graph, before, before ? 1 : 0, &made)) return status;
      steps.push_back({call, added, std::vector<int64_t>(given.values, given.values + call.pointers)});
    }
    return steps.empty() ? 0 : api->instantiate(&instance, graph, 0);
  }

  // Kernels whose operands have moved, inputs and results of the call, are told where to. What runs
  // already keeps what it was launched with.
  int run(char* const* r, void* stream) {
    Arguments given;
    for (Step& step : steps) {
      bool moved = false;
      for (int64_t i = 0; i < step.call.pointers; ++i) {
        const int64_t at = step.call.pointer(r, i);
        moved |= at != step.pointers[i];
        step.pointers[i] = at;
      }
      if (!moved) continue;
      step.call.arguments(r, given.values);
      const Node changed = node(step.call, given);
      if (const int status = api->update(instance, step.node, &changed)) return status;
    }
    return instance ? api->launch(instance, stream) : 0;
  }
};

EFFC_EXPORT int64_t effc_graph_record(const int64_t* d, int64_t calls, char* const* r,
                                      const Graphs* api, Recorded** made) {
  Recorded* found = new Recorded(api);
  const int status = found->record(d, calls, r);
  if (status) {
    delete found;
  } else {
    *made = found;
  }
  return status;
}

EFFC_EXPORT int64_t effc_graph_run(Recorded* recorded, char* const* r, void* stream) {
  return recorded->run(r, stream);
}

EFFC_EXPORT void effc_graph_free(Recorded* recorded) { delete recorded; }
