"""A network of named layers and a function, for the tests of pruning."""

from torch import nn


class Net(nn.Module):
    """Named layers and a forward function `f(net, *inputs)`."""

    def __init__(self, f, **layers):
        super().__init__()
        self.f = f
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs, **keywords):
        return self.f(self, *inputs, **keywords)
