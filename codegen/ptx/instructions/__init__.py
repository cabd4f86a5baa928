"""What each opcode becomes. A handler reads the instruction at hand and writes lines of C++.

Where PTX has an opcode that is not here, translation fails with its name and place: an instruction
is never left out or replaced by something near it.
"""

from . import arithmetic, bits, control, lanes, memory, values
from .common import HANDLERS

__all__ = ["HANDLERS", "arithmetic", "bits", "control", "lanes", "memory", "values"]
