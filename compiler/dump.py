"""A compilation as a folder that reads as a story: one runnable file a stage, a report, kernels."""

from __future__ import annotations

from effc.pipeline import Instrument


class Dump(Instrument):
    """placeholder"""
