"""Import packages of others, also DeepInverse, timm and others that need torchvision, beside a torch without GPU."""

import importlib
import sys
from types import ModuleType

import torch

DECLARED = []  # torch forgets the operators of a library that is deleted
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def load(name: str) -> ModuleType:
    """The module `name`. Raises `ImportError` where it is missing.

    The torchvision of PyPI is built for GPUs: beside a CPU build of torch its compiled operators do not load, and its
    import fails at the first of them. Declaring two of them is enough for all that needs none.
    """
    if not DECLARED and "torchvision" not in sys.modules:
        try:
            importlib.import_module("torchvision")
        except ModuleNotFoundError:
            pass
        except RuntimeError:
            for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
                del sys.modules[module]
            DECLARED.append(torch.library.Library("torchvision", "DEF"))
            for operator in ("nms", "qnms"):
                DECLARED[0].define(operator + SIGNATURE)
    return importlib.import_module(name)
