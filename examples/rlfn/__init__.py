"""RLFN x4 super-resolution: the network, its training on free photographs, tiled inference."""

from .model import RLFN, load_rlfn, rlfn, rlfn_prune, rlfn_s
from .tiled import super_resolve

__all__ = ["RLFN", "load_rlfn", "rlfn", "rlfn_prune", "rlfn_s", "super_resolve"]
