"""Networks of other packages: their import beside a torch without GPU, and an oracle of their pruning."""

import copy
import importlib
from types import ModuleType

from torch import Tensor, nn


def load(name: str) -> ModuleType:
    """The module `name`; importing `spade.deepinv` first lets it import torchvision beside a torch of another build."""
    importlib.import_module("spade.deepinv")
    return importlib.import_module(name)


def zeroed(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """A copy of the teacher in which the filters that the student's report names as removed are zero."""
    copied = copy.deepcopy(teacher).eval()
    for group in student.pruning_report.groups:
        prefix, removed = group.name.removesuffix(group.layers[0][0]), list(group.removed)
        for name, side in group.layers:
            layer = copied.get_submodule(prefix + name)
            for tensor in [getattr(layer, name, None) for name in ("weight", "bias") if side != "in"]:
                if tensor is not None and tensor.numel() > 1:
                    axis = int(getattr(layer, "transposed", False) and tensor.ndim > 1)
                    tensor.data.transpose(0, axis)[removed] = 0
    return copied


def widths(model: nn.Module) -> list[tuple[int, int]]:
    """(input channels, output channels) of each convolution, in the order of registration."""
    return [(m.in_channels, m.out_channels) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest magnitude."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
