"""Data: simulated and measured acquisitions, coil maps, photographs and blur kernels."""

from ..basics import Batch

__all__ = ["Batch"]
