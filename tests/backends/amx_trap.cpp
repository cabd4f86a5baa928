// The tile instructions of AMX on a CPU without them: each one is an illegal instruction, which a
// signal handler decodes and does by the emulation of effc_amx.h. So what the compiler made of the
// instructions is run, and what it moved around them shows.
#include <signal.h>
#include <ucontext.h>

#include "effc_amx.h"

namespace {

struct sigaction before;

// Numbers of registers as instructions have them.
constexpr int PLACES[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                            REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

enum Prefix { NONE, P66, F3, F2 };

struct Instruction {
  int prefix, opcode, mod, reg, rm, second, length;
  int64_t address, index;  // of memory: base and displacement; the index register, scaled
};

// VEX with three bytes, as all of them have.
bool decode(const greg_t* r, Instruction* i) {
  const uint8_t* at = reinterpret_cast<const uint8_t*>(r[REG_RIP]);
  const uint8_t* start = at;
  if (at[0] != 0xc4 || (at[1] & 31) != 2) return false;
  const int high_base = at[1] & 0x20 ? 0 : 8, high_index = at[1] & 0x40 ? 0 : 8;
  i->prefix = at[2] & 3;
  i->second = ~(at[2] >> 3) & 15;
  i->opcode = at[3];
  i->mod = at[4] >> 6, i->reg = at[4] >> 3 & 7, i->rm = at[4] & 7;
  at += 5;
  i->address = i->index = 0;
  if (i->mod != 3) {
    int base = i->rm;
    bool relative = i->mod == 0 && base == 5, none = false;
    if (base == 4) {
      const int sib = *at++, index = (sib >> 3 & 7) + high_index;
      base = sib & 7;
      if (index != 4) i->index = r[PLACES[index]] << (sib >> 6);
      none = i->mod == 0 && base == 5;
    }
    int64_t shift = 0;
    if (i->mod == 1) {
      shift = static_cast<int8_t>(*at++);
    } else if (i->mod == 2 || relative || none) {
      int32_t wide;
      memcpy(&wide, at, 4);
      shift = wide;
      at += 4;
    }
    i->address = shift;
    if (relative) {
      i->address += reinterpret_cast<int64_t>(at);
    } else if (!none) {
      i->address += r[PLACES[base + high_base]];
    }
  }
  i->length = static_cast<int>(at - start);
  return true;
}

bool perform(const Instruction& i) {
  using namespace effc;
  void* memory = reinterpret_cast<void*>(i.address);
  if (i.opcode == 0x49 && i.prefix == NONE && i.mod != 3 && i.reg == 0) {
    amx::Config config;
    memcpy(&config, memory, sizeof(config));
    if (config.palette != 1) return false;
    amx::configure(config);
  } else if (i.opcode == 0x49 && i.prefix == NONE && i.mod == 3) {
    amx::configure(amx::Config{});
  } else if (i.opcode == 0x49 && i.prefix == F2 && i.mod == 3) {
    amx::zero(i.reg);
  } else if (i.opcode == 0x4b && i.prefix == F2 && i.rm == 4) {
    amx::load(i.reg, memory, i.index);
  } else if (i.opcode == 0x4b && i.prefix == F3 && i.rm == 4) {
    amx::store(i.reg, memory, i.index);
  } else if (i.opcode == 0x5c && i.prefix == F3 && i.mod == 3) {
    amx::dot(i.reg, i.rm, i.second);
  } else {
    return false;
  }
  return true;
}

int64_t done = 0;

void handle(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction i;
  if (!decode(registers, &i) || !perform(i)) {
    sigaction(SIGILL, &before, nullptr);  // somebody else's: it is met again
    return;
  }
  registers[REG_RIP] += i.length;
  ++done;
}

}  // namespace

EFFC_EXPORT void effc_trap_begin() {
  struct sigaction ours = {};
  ours.sa_sigaction = handle;
  ours.sa_flags = SA_SIGINFO;
  done = 0;
  sigaction(SIGILL, &ours, &before);
}

// Instructions done since then.
EFFC_EXPORT int64_t effc_trap_end() {
  sigaction(SIGILL, &before, nullptr);
  return done;
}
