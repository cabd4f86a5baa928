"""Small PTX written by hand: many instructions in one kernel, each lane with values of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from effc.codegen.ptx import Kernel, load

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
TYPES = {
    "u16": np.uint16, "s16": np.int16, "b16": np.uint16, "f16": np.float16, "bf16": np.uint16,
    "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32, "f16x2": np.uint32,
    "u64": np.uint64, "s64": np.int64, "b64": np.uint64, "f64": np.float64, "pred": np.uint32,
}  # fmt: skip
WIDTH = {t: np.dtype(d).itemsize * 8 for t, d in TYPES.items()}


def entry(
    body: str, params: Sequence[str] = ("u64",) * 2, *, before: str = "", threads: int = 32
) -> str:
    """An entry `k` with a body; %tid.x is in %t, the parameters in %q0, %q1, ... (64 bits)."""
    declared = ", ".join(f".param .{t} k_{i}" for i, t in enumerate(params))
    loads = "\n".join(
        f"ld.param.{t} %{'q' if WIDTH[t] == 64 else 'w'}{i}, [k_{i}];" for i, t in enumerate(params)
    )
    return f"""{HEAD}
{before}
.visible .entry k({declared})
.reqntid {threads}
{{
.reg .pred %p<64>;
.reg .b16 %h<64>;
.reg .b32 %r<256>;
.reg .b64 %d<64>;
.reg .b32 %t;
.reg .b64 %q<16>;
.reg .b32 %w<16>;
{loads}
mov.u32 %t, %tid.x;
{body}
ret;
}}
"""


def kernel(body: str, params: Sequence[str] = ("u64",) * 2, **kw) -> Kernel:
    return load(entry(body, params, **kw))["k"]


def address(register: str, base: str, bytes_: int) -> str:
    """`register` = base + tid * bytes"""
    return f"mad.wide.u32 {register}, %t, {bytes_}, {base};"


@dataclass(frozen=True)
class Case:
    """text: the instruction with {d}, {a}, {b}, {c}. want: of numpy arrays of 32."""

    text: str
    out: str
    ins: tuple[str, ...]
    want: Callable[..., np.ndarray]
    ulp: int = 0

    def __str__(self) -> str:
        return self.text.split(" ")[0]


def together(cases: Sequence[Case]) -> Kernel:
    """One kernel of all cases: case i reads slot i of the inputs and writes slot i of the output.

    A slot is 32 elements of 8 bytes. Parameters: out, a, b, c.
    """
    lines = []
    for i, case in enumerate(cases):
        lines.append("{")
        names = {}
        for k, t in enumerate(case.ins):
            bits = WIDTH[t]
            lines.append(
                f".reg .b{bits} x{k};\n" if t != "pred" else f".reg .pred x{k};\n.reg .b32 y{k};\n"
            )
            lines.append(address("%d0", f"%q{k + 1}", 8))
            target = f"x{k}" if t != "pred" else f"y{k}"
            lines.append(f"ld.global.b{bits} {target}, [%d0+{256 * i}];")
            if t == "pred":
                lines.append(f"setp.ne.u32 x{k}, y{k}, 0;")
            names["abc"[k]] = f"x{k}"
        bits = WIDTH[case.out]
        if case.out == "pred":
            lines.append(".reg .pred z;\n.reg .b32 o;\n")
            lines.append(case.text.format(d="z", **names) + ";\nselp.u32 o, 1, 0, z;")
        else:
            lines.append(f".reg .b{bits} o;\n" + case.text.format(d="o", **names) + ";")
        lines.append(address("%d0", "%q0", 8))
        lines.append(f"st.global.b{bits} [%d0+{256 * i}], o;\n}}")
    return kernel("\n".join(lines), ("u64",) * 4)


def run(k: Kernel, cases: Sequence[Case], values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Outputs of all cases. values: one array of 32 64-bit patterns for each operand."""
    n = len(cases)
    arrays = [np.tile(v.view(np.uint64), (n, 1)) for v in values]
    out = np.zeros((n, 32), np.uint64)
    k.launch(1, [out, *arrays])
    return [view(out[i], case.out) for i, case in enumerate(cases)]


def view(patterns: np.ndarray, type_: str) -> np.ndarray:
    """The low bits of 64-bit patterns as a type."""
    each = WIDTH[type_] // 8
    return np.ascontiguousarray(
        np.ascontiguousarray(patterns).view(np.uint8).reshape(-1, 8)[:, :each]
    ).view(TYPES[type_])[:, 0]


def same(got: np.ndarray, want: np.ndarray, ulp: int = 0) -> np.ndarray:
    """Equal bits, or both NaN, or within some units in the last place."""
    if got.dtype.kind != "f":
        return got == want.astype(got.dtype)
    want = want.astype(got.dtype)
    nan = np.isnan(got) & np.isnan(want)
    integer = {2: np.int16, 4: np.int32, 8: np.int64}[got.dtype.itemsize]
    x, y = got.view(integer), want.view(integer)
    if not ulp:
        return (x == y) | nan
    near = np.abs(x.astype(np.int64) - y.astype(np.int64)) <= ulp
    return near | nan | (got == want)
