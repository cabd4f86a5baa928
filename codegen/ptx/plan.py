"""Kernels as plans on the CPU call them: one C function of addresses and numbers.

    void NAME(char* const* p, const int64_t* n, int64_t threads)

n holds the grid (3), the address of the scheduler's function, the address of a word that is set to
the kernel's name where a launch gave up, and then the kernel's own numbers.
"""

from __future__ import annotations

import jinja2

from .kernel import LARGEST_FRAME, STACK_RESERVE, Kernel, pages
from .runtime import HERE, flags, header

BEFORE = 5  # numbers before the kernel's own

TEMPLATE = """
extern "C" __attribute__((visibility("default"))) void {{ name }}(
    char* const* p, const int64_t* n, int64_t threads) {
  if (!(n[0] && n[1] && n[2])) return;
  const uint64_t params[] = {
{% for i in range(pointers) %}
    uint64_t(p[{{ i }}]),
{% endfor %}
{% for i in range(numbers) %}
    uint64_t(n[{{ before + i }}]),
{% endfor %}
    0, 0, 0, 0};
  simt::Launch l{};
  l.kernel = {{ symbol }};
  l.params = reinterpret_cast<const char*>(params);
  for (int i = 0; i < 3; ++i) l.grid[i] = uint32_t(n[i]), l.block[i] = 1;
  l.block[0] = {{ block }};
  l.shared_bytes = {{ shared }};
  l.barriers = {{ barriers }};
  l.local_bytes = {{ local }};
  l.stack_bytes = {{ stack }};
  l.threads = {{ "1" if alone else "uint32_t(threads)" }};
  if (reinterpret_cast<int (*)(simt::Launch*)>(n[3])(&l))
    *reinterpret_cast<const char**>(n[4]) = "{{ name }}";
}
"""


def scheduler_source() -> str:
    """The translation unit of `effc_simt_launch`, whose address calls carry."""
    return f"{header()}\n{(HERE / 'effc_simt.cpp').read_text()}"


def plan_function(
    kernel: Kernel, *, threads: int, shared: int, pointers: int, numbers: int
) -> str:  # fmt: skip
    """The translation unit of a kernel that takes 64-bit pointers, then 64-bit numbers.

    threads: of a block. shared: dynamic bytes. Raises PtxError for what is not known.
    """
    unit = kernel.unit
    tail = jinja2.Template(TEMPLATE, trim_blocks=True, lstrip_blocks=True).render(
        name=kernel.name, symbol=unit.symbol, pointers=pointers, numbers=numbers, before=BEFORE,
        block=threads, shared=unit.shared + shared, local=unit.local, alone=unit.alone,
        barriers=int(unit.fibers or unit.frame > LARGEST_FRAME),
        stack=pages(unit.frame * 2 + STACK_RESERVE),
    )  # fmt: skip
    return f"{header()}\n{unit.source}\n{tail}"


__all__ = ["BEFORE", "flags", "plan_function", "scheduler_source"]
