"""What compilers report of GPU kernels, how many fit a device, and what a roofline lets expect."""

from .devices import DEVICES, Device, device
from .occupancy import Occupancy, occupancy
from .report import Estimate, Row, Work, estimate, report, table
from .resources import Resources, resources

__all__ = [
    "DEVICES", "Device", "Estimate", "Occupancy", "Resources", "Row", "Work", "device", "estimate",
    "occupancy", "report", "resources", "table",
]  # fmt: skip
