"""Kernels of a PTX module, launched on CPU tensors."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from effc.ir.errors import InputError, nearest

from . import runtime
from .faults import Fault, Finding, findings
from .parser import PtxError, parse
from .runtime import CFinding, CLaunch, CRegion
from .syntax import Instruction, Variable
from .syntax import Module as Syntax
from .translate import Unit, translate

Dim = int | Sequence[int]
STACK_RESERVE = 256 << 10  # for what kernels call
LARGEST_FRAME = 128 << 10  # on the caller's stack
MAX_THREADS = 1024


@dataclass(frozen=True)
class Schedule:
    """In what order things happen that a GPU may do in any order.

    order: of warps, and of the lanes of a warp that store: "up", "down" or "shuffled".
    lazy: cp.async copies when it is waited for, else at once.
    without: a barrier or wait that does nothing, as one of `Kernel.barriers`.
    """

    order: str = "up"
    lazy: bool = False
    seed: int = 0
    without: Instruction | None = None

    def __str__(self) -> str:
        order = f"shuffled({self.seed})" if self.order == "shuffled" else self.order
        return f"threads {order}, cp.async {'lazy' if self.lazy else 'eager'}"


class Kernel:
    """An entry of a module. Built when first launched; the build is kept on disk and shared.

    shared: dynamic shared bytes of a launch that names none. block: threads of one that names
    none. scratch: bytes a block of the last parameters, where a launch may leave them out.
    names: of the first parameters, as findings call them.
    """

    def __init__(
        self,
        module: Syntax,
        name: str,
        *,
        shared: int = 0,
        block: Dim | None = None,
        scratch: Sequence[int] = (),
        names: Sequence[str] = (),
    ) -> None:
        self.module, self.name, self.names = module, name, tuple(names)
        self.function = module.functions[name]
        self.shared, self.scratch = shared, tuple(scratch)
        self.block = _dim(block, "block") if block is not None else self.function.required
        self._unit: Unit | None = None
        self._built: dict[bool, Any] = {}
        self._mutex = threading.Lock()

    @property
    def params(self) -> tuple[Variable, ...]:
        return self.function.params

    @property
    def unit(self) -> Unit:
        """The translation. Raises PtxError for what is not known."""
        with self._mutex:
            if self._unit is None:
                self._unit = translate(self.module, self.name)
            return self._unit

    @property
    def source(self) -> str:
        """The C++ text, on effc_simt.h."""
        return self.unit.source

    @property
    def barriers(self) -> tuple[Instruction, ...]:
        """What puts accesses in order: barriers of a block and of a warp, waits for cp.async."""
        return tuple(i for i in self.unit.places if _orders(i))

    def build(self, *, check: bool = False) -> runtime.Library:
        """Translate and compile. Raises PtxError or BuildError."""
        unit = self.unit
        with self._mutex:
            if check not in self._built:
                self._built[check] = runtime.build_kernel(unit.source, self.name, check=check)
            return self._built[check]

    def launch(
        self,
        grid: Dim,
        args: Sequence[Any],
        *,
        block: Dim | None = None,
        shared: int | None = None,
        threads: int | None = None,
        check: bool = False,
        schedule: Schedule | None = None,
    ) -> None:
        """Run the grid to its end on the memory of `args`.

        args: CPU tensors and arrays (by address), None, integers, floats, bytes, one a parameter.
        threads: CPU threads over the blocks; one where blocks may exchange data.
        check: look at every access. Raises Fault for what is found, and in any mode for traps,
        failed asserts and deadlocks; InputError for arguments that do not fit.
        """
        found, _ = self.run(
            grid, args, block=block, shared=shared, threads=threads, check=check, schedule=schedule
        )
        if found:
            raise Fault.of(self.name, found)

    def run(
        self,
        grid: Dim,
        args: Sequence[Any],
        *,
        block: Dim | None = None,
        shared: int | None = None,
        threads: int | None = None,
        check: bool = False,
        schedule: Schedule | None = None,
        portable: bool = False,
        events: np.ndarray | None = None,
    ) -> tuple[list[Finding], bool]:
        """Like `launch`, with the findings as a value, and whether the grid came to its end.

        events: of runtime.EVENT; gets, in a checked run, what happened to shared memory. Raises
        InputError where that is more than it has room for.
        """
        unit, library = self.unit, self.build(check=check)
        schedule = schedule or Schedule()
        grid, block = _dim(grid, "grid"), self._block(block)
        blocks = grid[0] * grid[1] * grid[2]
        held: dict[int, Any] = {}
        params = self._pack(args, blocks, held)
        if not blocks:
            return [], True
        regions = _regions(unit, library, held) if check else []
        shared = self.shared if shared is None else shared
        launch = CLaunch()
        launch.kernel = ctypes.cast(library.cdll[unit.symbol], ctypes.c_void_p).value
        launch.params = params
        launch.grid[:], launch.block[:] = grid, block
        launch.shared_bytes = unit.shared + shared
        launch.barriers = unit.fibers or unit.frame > LARGEST_FRAME
        launch.local_bytes = unit.local
        launch.stack_bytes = pages(unit.frame * 2 + STACK_RESERVE)
        launch.threads = 1 if unit.alone else max(1, threads or torch.get_num_threads())
        launch.check, launch.lazy, launch.seed = check, schedule.lazy, schedule.seed
        launch.order = ("up", "down", "shuffled").index(schedule.order)
        table = (CRegion * max(1, len(regions)))(*regions)
        launch.regions, launch.regions_count = table, len(regions)
        room = (CFinding * runtime.FINDINGS)()
        launch.findings, launch.findings_room = room, runtime.FINDINGS
        launch.across_blocks = not unit.fenced
        if schedule.without is not None:
            if schedule.without not in self.barriers:
                raise InputError(
                    f"kernel {self.name} has no barrier {schedule.without}",
                    fix="pass one of kernel.barriers",
                )
            launch.left_out = 1 + unit.places.index(schedule.without)
        if events is not None:
            launch.events, launch.events_room = events.ctypes.data, len(events)
        failed = runtime.scheduler(portable)(ctypes.byref(launch))
        if events is not None and launch.events_count > len(events):
            raise InputError(
                f"kernel {self.name}: {launch.events_count} events, there is room for {len(events)}"
            )
        found = findings(room[: launch.findings_count], unit, block, held, self.names)
        return found, not failed

    def _block(self, block: Dim | None) -> tuple[int, int, int]:
        chosen = self.block if block is None else _dim(block, "block")
        if chosen is None:
            raise InputError(f"kernel {self.name}: no block size", fix="pass block=...")
        required = self.function.required
        if required and chosen != required:
            raise InputError(
                f"kernel {self.name}: block {chosen}", why=f"it was compiled for {required}"
            )
        threads = chosen[0] * chosen[1] * chosen[2]
        if not 1 <= threads <= MAX_THREADS:
            raise InputError(
                f"kernel {self.name}: block {chosen} has {threads} threads",
                why=f"a block has 1 to {MAX_THREADS}",
            )
        return chosen

    def _pack(self, args: Sequence[Any], blocks: int, held: dict[int, Any]) -> bytes:
        """The parameters as the kernel reads them; `held` gets what must stay alive."""
        params = self.params
        missing = len(params) - len(args)
        if 0 < missing <= len(self.scratch):
            for size in self.scratch[-missing:]:
                args = [*args, torch.empty(size * blocks, dtype=torch.uint8) if size else None]
        if len(args) != len(params):
            names = ", ".join(f".{p.type} {p.name}" for p in params)
            raise InputError(
                f"kernel {self.name} takes {len(params)} arguments, {len(args)} were given",
                why=f"its parameters are {names}",
            )
        data = bytearray()
        for i, (param, value) in enumerate(zip(params, args)):
            data += b"\0" * (-len(data) % param.align)
            data += self._one(i, param, value, held)
        return bytes(data) + b"\0" * 16

    def _one(self, i: int, param: Variable, value: Any, held: dict[int, Any]) -> bytes:
        size = param.size
        where = f"kernel {self.name}: argument {i} ({param.name})"
        if isinstance(value, torch.Tensor | np.ndarray):
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                raise InputError(f"{where} is on {value.device}", fix="pass a CPU tensor")
            if size != 8:
                raise InputError(
                    f"{where} is a tensor, the parameter has {size} bytes", fix="pass a number"
                )
            held[i] = value
            address = value.data_ptr() if isinstance(value, torch.Tensor) else value.ctypes.data
            return struct.pack("<Q", address)
        if value is None:
            return b"\0" * size
        if isinstance(value, bytes | bytearray):
            if len(value) != size:
                raise InputError(f"{where} has {len(value)} bytes, the parameter has {size}")
            return bytes(value)
        if isinstance(value, float | np.floating) or param.type in ("f16", "f32", "f64"):
            code = {2: "<e", 4: "<f", 8: "<d"}.get(size)
            if code and isinstance(value, int | float | np.number):
                if param.type == "bf16":
                    return struct.pack("<f", value)[2:]
                return struct.pack(code, float(value))
        if isinstance(value, int | np.integer) and size <= 8:
            value = int(value)
            if not -(1 << (8 * size - 1)) <= value < 1 << 8 * size:
                raise InputError(f"{where}: {value} does not fit {8 * size} bits")
            return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        raise InputError(
            f"{where} is a {type(value).__name__}",
            why=f"the parameter is .{param.type}, {size} bytes",
            fix="pass a CPU tensor, an array, None, an int, a float or bytes",
        )

    def __repr__(self) -> str:
        return f"Kernel({self.name!r}, {len(self.params)} parameters)"


@dataclass
class Module(Mapping[str, Kernel]):
    """A parsed module: its entries by name."""

    syntax: Syntax
    _kernels: dict[str, Kernel] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Kernel:
        if name not in self.syntax.entries:
            raise InputError(
                f"the module has no entry {name!r}", fix=nearest(name, self.syntax.entries)
            )
        return self._kernels.setdefault(name, Kernel(self.syntax, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.syntax.entries)

    def __len__(self) -> int:
        return len(self.syntax.entries)

    def only(self) -> Kernel:
        """The module's one entry."""
        if len(self) != 1:
            raise InputError(f"the module has {len(self)} entries: {', '.join(self)}")
        return self[next(iter(self))]


def load(text: str) -> Module:
    """The kernels of PTX text. Raises PtxError where it cannot be read."""
    return Module(parse(text))


def from_triton(compiled: Any) -> Kernel:
    """The kernel in what `triton.compile` returned for a CUDA target, ready to launch.

    Shared memory, threads and the two scratch parameters are taken from its metadata.
    """
    text = compiled.asm.get("ptx")
    if text is None:
        raise PtxError(
            f"{getattr(compiled, 'name', 'the kernel')} has no PTX",
            why=f"it was compiled to {', '.join(compiled.asm)}",
            fix='compile with target=GPUTarget("cuda", 80, 32)',
        )
    m = compiled.metadata
    syntax = parse(text)
    if m.name not in syntax.entries:
        raise PtxError(f"the PTX has no entry {m.name}", why=f"it has {', '.join(syntax.entries)}")
    scratch = (getattr(m, "global_scratch_size", 0), getattr(m, "profile_scratch_size", 0))
    block = syntax.functions[m.name].required or m.num_warps * 32
    return Kernel(syntax, m.name, shared=m.shared, block=block, scratch=scratch)


def _orders(i: Instruction) -> bool:
    if i.name == "cp":
        return not {"wait_group", "wait_all"}.isdisjoint(i.parts)
    return i.name in ("bar", "barrier") and "red" not in i.parts


def _dim(value: Dim, what: str) -> tuple[int, int, int]:
    sizes = (value,) if isinstance(value, int | np.integer) else tuple(value)
    if not 1 <= len(sizes) <= 3 or any(int(s) < 0 for s in sizes):
        raise InputError(f"{what} {value!r}", fix="pass one to three sizes")
    x, y, z = (*(int(s) for s in sizes), 1, 1)[:3]
    return x, y, z


def pages(n: int) -> int:
    """Bytes of whole pages."""
    return -(-n // 4096) * 4096


def _regions(unit: Unit, library: runtime.Library, held: Mapping[int, Any]) -> list[CRegion]:
    """Memory that the kernel may touch: storages of the arguments, the module's variables."""
    found: dict[tuple[int, int], CRegion] = {}
    for value in held.values():
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            base, size, item = storage.data_ptr(), storage.nbytes(), value.element_size()
        else:
            owner = value
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            base, size, item = owner.ctypes.data, owner.nbytes, owner.itemsize
        known = found.get((base, size))
        found[base, size] = CRegion(base, size, min(item, known.granule if known else item), 1)
    if unit.variables:
        out = (ctypes.c_uint64 * (2 * len(unit.variables)))()
        library.function(f"{unit.symbol}_variables", ctypes.c_void_p)(out)
        for i in range(len(unit.variables)):
            found[out[2 * i], out[2 * i + 1]] = CRegion(out[2 * i], out[2 * i + 1], 1, 1)
    return list(found.values())


__all__ = ["Kernel", "Module", "Schedule", "from_triton", "load"]
