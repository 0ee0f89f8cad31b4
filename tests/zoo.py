"""The table of truth: networks of many families, pruned by `find_priors` and `prune`, judged by an independent oracle.

`python tests/zoo.py` prints all as a Markdown table, `python tests/zoo.py unet dncnn` those whose names contain a word.
The definitions are our own and small; the published networks they follow are named. Optional packages are skipped.
"""

import copy
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from foreign import load
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from spade import pruning
from spade.basics import as_real

W = 16  # width of most networks
ZOO: dict[str, tuple[Callable, str]] = {}  # name: (a function that returns model and inputs, package)


def network(name, package="torch"):
    """Enter a function that returns (model, inputs) into the zoo."""

    def enter(build):
        assert name not in ZOO
        ZOO[name] = (build, package)
        return build

    return enter


class Net(nn.Module):
    """Named layers, and a forward function of the network and its inputs."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, nn.ModuleList(layer) if isinstance(layer, list) else layer)

    def forward(self, *inputs, **keywords):
        return self.run(self, *inputs, **keywords)


def image(channels=1, size=16, axes=2, batch=1):
    return torch.rand(batch, channels, *[size] * axes)


def conv(a, b, size=3, **keywords):
    return nn.Conv2d(a, b, size, **{"padding": size // 2} | keywords)


def stack(*layers):
    return nn.Sequential(*layers)


def residual(*layers):
    return Net(lambda net, x: x + net.body(x), body=stack(*layers))


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of an image, as in NAFNet and ConvNeXt."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Scale(nn.Module):
    """One learnt factor per channel."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((1, channels, 1, 1), 0.5))

    def forward(self, x):
        return x * self.gamma


NORMS = {
    "none": lambda c: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "instance": nn.InstanceNorm2d,
    "affine instance": partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
    "group(4)": partial(nn.GroupNorm, 4),
    "group(1)": partial(nn.GroupNorm, 1),
    "layer": LayerNorm2d,
}

# Denoisers and restoration


@network("DnCNN")
def dncnn():
    hidden = [m for _ in range(3) for m in (conv(W, W, bias=False), nn.BatchNorm2d(W), nn.ReLU(True))]
    return residual(conv(1, W), nn.ReLU(True), *hidden, conv(W, 1)), image()


def unet(norm="batch", up="transposed", skip="cat", channels=1, dim=2, block=None):
    """A U-Net of three scales."""
    Conv, Up = (getattr(nn, f"{kind}{dim}d") for kind in ("Conv", "ConvTranspose"))
    make = {"batch": getattr(nn, f"BatchNorm{dim}d")}.get(norm) or NORMS[norm]
    double = block or (
        lambda a, b: stack(*[m for c in (a, b) for m in (Conv(c, b, 3, padding=1), make(b), nn.LeakyReLU(0.1, True))])
    )
    widths = [W, 2 * W, 4 * W]
    if up == "transposed":
        ups = [Up(b, a, 2, 2) for a, b in zip(widths, widths[1:])]
    else:
        ups = [stack(nn.Upsample(scale_factor=2, mode=up), Conv(b, a, 1)) for a, b in zip(widths, widths[1:])]

    def forward(net, x):
        skips = []
        for level, down in enumerate(net.down):
            x = down(x if level == 0 else net.pool(x))
            skips.append(x)
        for level in (1, 0):
            x = net.ups[level](x)
            x = net.up_blocks[level](torch.cat([skips[level], x], 1) if skip == "cat" else skips[level] + x)
        return net.tail(x)

    down = [double(a, b) for a, b in zip([channels, *widths], widths)]
    up_blocks = [double(a * (1 + (skip == "cat")), a) for a in widths[:2]]
    pool = getattr(nn, f"MaxPool{dim}d")(2)
    net = Net(forward, down=down, ups=ups, up_blocks=up_blocks, pool=pool, tail=Conv(W, channels, 1))
    return net, image(channels, 16, dim)


for norm in NORMS:
    ZOO[f"U-Net, {norm} norm"] = (partial(unet, norm), "torch")
ZOO["U-Net, bilinear, sums"] = (partial(unet, "batch", "bilinear", "sum"), "torch")
ZOO["U-Net, nearest"] = (partial(unet, "none", "nearest"), "torch")
ZOO["U-Net 1-D (Wave-U-Net)"] = (partial(unet, dim=1), "torch")
ZOO["U-Net 3-D"] = (partial(unet, dim=3), "torch")


@network("DRUNet (x, sigma)")
def drunet():
    free = partial(conv, bias=False)
    block = lambda c: residual(free(c, c), nn.ReLU(True), free(c, c))
    layers = dict(
        head=free(2, W), down1=stack(block(W), free(W, 2 * W, 2, stride=2, padding=0)), body=block(2 * W),
        up1=stack(nn.ConvTranspose2d(2 * W, W, 2, 2, bias=False), block(W)), tail=free(W, 1),
    )  # fmt: skip

    def forward(net, x, sigma):
        h = net.head(torch.cat([x, sigma.view(-1, 1, 1, 1).expand_as(x[:, :1])], 1))
        return net.tail(net.up1(net.body(net.down1(h))) + h)

    return Net(forward, **layers), (image(), torch.tensor([0.1]))


@network("FFDNet (x, float sigma)")
def ffdnet():
    def forward(net, x, sigma=0.1):
        h = F.pixel_unshuffle(x, 2)
        return F.pixel_shuffle(net.body(torch.cat([h, torch.full_like(h[:, :1], sigma)], 1)), 2)

    body = [m for _ in range(2) for m in (conv(W, W, bias=False), nn.BatchNorm2d(W), nn.ReLU(True))]
    return Net(forward, body=stack(conv(5, W), nn.ReLU(True), *body, conv(W, 4))), (image(), 0.05)


@network("EDSR x2")
def edsr():
    blocks = [residual(conv(W, W), nn.ReLU(True), conv(W, W)) for _ in range(3)]
    up = stack(conv(W, 4 * W), nn.PixelShuffle(2))
    forward = lambda net, x: net.tail(net.up((h := net.head(x)) + net.body(h)))
    return Net(forward, head=conv(3, W), body=stack(*blocks, conv(W, W)), up=up, tail=conv(W, 3)), image(3)


@network("RCAN x2")
def rcan():
    def attention(c):
        weigh = stack(nn.AdaptiveAvgPool2d(1), conv(c, 4, 1), nn.ReLU(True), conv(4, c, 1), nn.Sigmoid())
        return Net(lambda net, x: x * net.weigh(x), weigh=weigh)

    blocks = [residual(conv(W, W), nn.ReLU(True), conv(W, W), attention(W)) for _ in range(2)]
    group = residual(*blocks, conv(W, W))
    return stack(conv(3, W), residual(group, conv(W, W)), conv(W, 4 * W), nn.PixelShuffle(2), conv(W, 3)), image(3)


@network("SRResNet x4")
def srresnet():
    block = lambda: residual(conv(W, W), nn.BatchNorm2d(W), nn.PReLU(), conv(W, W), nn.BatchNorm2d(W))
    up = lambda: (conv(W, 4 * W), nn.PixelShuffle(2), nn.PReLU())
    return stack(conv(3, W, 9), nn.PReLU(), residual(block(), block()), *up(), *up(), conv(W, 3, 9)), image(3)


@network("WDSR x2 (weight norm)")
def wdsr():
    normed = lambda *a: parametrizations.weight_norm(conv(*a))
    block = lambda: residual(normed(W, 4 * W, 1), nn.ReLU(True), normed(4 * W, W, 1), normed(W, W))
    forward = lambda net, x: F.pixel_shuffle(net.tail(net.body(net.head(x))) + net.skip(x), 2)
    layers = dict(head=normed(3, W), body=stack(block(), block()), tail=normed(W, 12), skip=normed(3, 12, 5))
    return Net(forward, **layers), image(3)


@network("RFDN (distillation, ESA)")
def rfdn():
    def distil(net, x):
        kept = []
        for thin, body in zip(net.thin, net.body):
            kept.append(F.leaky_relu(thin(x), 0.05))
            x = F.leaky_relu(body(x) + x, 0.05)
        x = net.join(torch.cat([*kept, net.last(x)], 1))
        small = F.max_pool2d(net.shrink(net.reduce(x)), 3, 2)
        gate = F.interpolate(net.inner(small), x.shape[-2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(net.grow(gate + net.reduce(x)))

    def block():
        layers = dict(thin=[conv(W, 8, 1) for _ in range(3)], body=[conv(W, W) for _ in range(3)], last=conv(W, 8))
        attention = dict(reduce=conv(W, 8, 1), shrink=conv(8, 8, 3, stride=2), inner=conv(8, 8), grow=conv(8, W, 1))
        return Net(distil, join=conv(32, W, 1), **layers, **attention)

    def forward(net, x):
        a = net.one(h := net.head(x))
        return net.up(net.lr(net.join(torch.cat([a, net.two(a)], 1))) + h)

    up = stack(conv(W, 12), nn.PixelShuffle(2))
    layers = dict(head=conv(3, W), one=block(), two=block(), join=conv(2 * W, W, 1), lr=conv(W, W), up=up)
    return Net(forward, **layers), image(3, 24)


@network("IMDN (split by stored sizes)")
def imdn():
    def forward(net, x):
        h, kept = net.a(x), []
        for layer in net.body:
            thin, h = torch.split(F.leaky_relu(layer(h), 0.05), (net.thin, net.wide), dim=1)
            kept.append(thin)
        return net.tail(net.join(torch.cat([*kept, net.last(h)], 1)))

    layers = dict(body=[conv(W, W), conv(12, W)], last=conv(12, 4), join=conv(12, W, 1), tail=conv(W, 1))
    net = Net(forward, a=conv(1, W), **layers)
    net.thin, net.wide = 4, 12
    return net, image()


@network("NAFNet")
def nafnet():
    def block(net, x):
        a, b = net.dw(net.one(net.norm1(x))).chunk(2, dim=1)
        h = a * b
        x = x + net.beta * net.three(h * net.sca(h.mean((2, 3), keepdim=True)))
        a, b = net.four(net.norm2(x)).chunk(2, dim=1)
        return x + net.gamma * net.five(a * b)

    def make(c):
        layers = dict(
            one=conv(c, 2 * c, 1), dw=conv(2 * c, 2 * c, groups=2 * c), sca=conv(c, c, 1), three=conv(c, c, 1)
        )
        scales = dict(beta=nn.Parameter(torch.ones(1, c, 1, 1)), gamma=nn.Parameter(torch.ones(1, c, 1, 1)))
        norms = dict(norm1=LayerNorm2d(c), norm2=LayerNorm2d(c))
        layers |= dict(three=conv(c, c, 1), four=conv(c, 2 * c, 1), five=conv(c, c, 1))
        return Net(block, **layers, **norms, **scales)

    def forward(net, x):
        h = net.enc(net.intro(x))
        up = F.pixel_shuffle(net.up(net.mid(net.down(h))), 2)
        return net.ending(net.dec(up + h)) + x

    layers = dict(enc=make(W), down=conv(W, 2 * W, 2, stride=2, padding=0), mid=make(2 * W), up=conv(2 * W, 4 * W, 1))
    return Net(forward, intro=conv(3, W), **layers, dec=make(W), ending=conv(W, 3)), image(3)


@network("ConvNeXt (channels last)")
def convnext():
    def block(net, x):
        h = net.norm(net.dw(x).permute(0, 2, 3, 1))
        return x + (net.gamma * net.two(F.gelu(net.one(h)))).permute(0, 3, 1, 2)

    def make(c):
        layers = dict(
            dw=conv(c, c, 7, groups=c), norm=nn.LayerNorm(c), one=nn.Linear(c, 4 * c), two=nn.Linear(4 * c, c)
        )
        return Net(block, **layers, gamma=nn.Parameter(torch.ones(c)))

    return stack(conv(3, W, 4, stride=4, padding=0), LayerNorm2d(W), make(W), make(W), conv(W, 3, 1)), image(3)


@network("attention U-Net")
def attention_unet():
    def forward(net, x):
        a = net.enc(x)
        g = net.up(net.mid(F.max_pool2d(a, 2)))
        gate = torch.sigmoid(net.psi(F.relu(net.wg(g) + net.wx(a))))
        return net.tail(net.dec(torch.cat([a * gate, g], 1)))

    double = lambda a, b: stack(conv(a, b), nn.BatchNorm2d(b), nn.ReLU(True), conv(b, b), nn.ReLU(True))
    gates = dict(wg=conv(W, 8, 1), wx=conv(W, 8, 1), psi=stack(conv(8, 1, 1), nn.BatchNorm2d(1)))
    layers = dict(enc=double(1, W), mid=double(W, 2 * W), up=nn.ConvTranspose2d(2 * W, W, 2, 2), dec=double(2 * W, W))
    return Net(forward, **layers, **gates, tail=conv(W, 1, 1)), image()


@network("RDN (dense blocks)")
def rdn():
    def dense(net, x):
        features = [x]
        for layer in net.layers:
            features.append(F.relu(layer(torch.cat(features, 1))))
        return x + net.join(torch.cat(features, 1))

    make = lambda: Net(dense, layers=[conv(W + 8 * i, 8) for i in range(3)], join=conv(W + 24, W, 1))

    def forward(net, x):
        a = net.one(net.head2(s := net.head(x)))
        return net.tail(net.join(torch.cat([a, net.two(a)], 1)) + s)

    layers = dict(head=conv(1, W), head2=conv(W, W), one=make(), two=make(), join=conv(2 * W, W, 1), tail=conv(W, 1))
    return Net(forward, **layers), image()


@network("DenseNet (norm first)")
def densenet():
    def forward(net, x):
        x = net.head(x)
        for layer in net.layers:
            x = torch.cat([x, layer(x)], 1)
        return net.tail(x)

    layers = [stack(nn.BatchNorm2d(c), nn.ReLU(), conv(c, 8)) for c in (W, W + 8, W + 16)]
    return Net(forward, head=conv(1, W), layers=layers, tail=conv(W + 24, 1)), image()


@network("MWCNN (Haar wavelets)")
def mwcnn():
    def haar(x):
        a, b, c, d = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        return torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2

    def forward(net, x):
        h = net.mid(haar(a := net.enc(x)))
        return net.tail(F.pixel_shuffle(h, 2) + a)

    mid = stack(conv(4 * W, 2 * W), nn.ReLU(), conv(2 * W, 4 * W))
    return Net(forward, enc=stack(conv(1, W), nn.ReLU()), mid=mid, tail=conv(W, 1)), image()


@network("MemNet/DRRN (tied recursion)")
def drrn():
    def forward(net, x):
        h = first = net.head(x)
        for _ in range(4):
            h = first + net.b(F.relu(net.a(F.relu(h))))
        return net.tail(h)

    return Net(forward, head=conv(1, W), a=conv(W, W), b=conv(W, W), tail=conv(W, 1)), image()


@network("kernel prediction (KPN)")
def kpn():
    def forward(net, x):
        kernels = net.body(x).softmax(1)
        return (kernels * F.unfold(x, 3, padding=1).unflatten(2, x.shape[-2:])).sum(1, keepdim=True)

    return Net(forward, body=stack(conv(1, W), nn.ReLU(), conv(W, W), nn.ReLU(), conv(W, 9))), image()


@network("dilated multi-branch (Inception)")
def inception():
    branch = lambda d: stack(conv(W, 8, 3, padding=d, dilation=d), nn.ELU())
    forward = lambda net, x: net.tail(torch.cat([b(net.head(x)) for b in net.branches], 1))
    return Net(forward, head=conv(1, W), branches=[branch(d) for d in (1, 2, 4)], tail=conv(24, 1)), image()


@network("two encoders, one shared (Siamese fusion)")
def siamese():
    encoder = stack(conv(1, W), nn.ReLU(), conv(W, W))
    forward = lambda net, a, b: net.tail(F.relu(net.join(torch.cat([net.enc(a), net.enc(b)], 1))))
    return Net(forward, enc=encoder, join=conv(2 * W, W), tail=conv(W, 1)), (image(), image())


@network("deep supervision (dictionary)")
def supervised():
    def forward(net, x):
        a = F.relu(net.a(x))
        b = F.relu(net.b(a))
        return {"fine": net.out_b(b), "coarse": [net.out_a(a)]}

    return Net(forward, a=conv(1, W), b=conv(W, W), out_a=conv(W, 1), out_b=conv(W, 2)), image()


@network("unused layers")
def unused():
    forward = lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x)))))
    return Net(forward, a=conv(1, W), b=conv(W, W), c=conv(W, 1), mean_shift=conv(3, 3, 1), spare=conv(W, W)), image()


# Channel tricks


@network("ShuffleNet (channel shuffle)")
def shufflenet():
    def unit(net, x):
        a, b = x.chunk(2, dim=1)
        x = torch.cat([a, net.branch(b)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    c = W // 2
    branch = lambda: stack(conv(c, c, 1), nn.BatchNorm2d(c), nn.ReLU(), conv(c, c, groups=c), conv(c, c, 1), nn.ReLU())
    mid = stack(conv(W, 2 * W), nn.ReLU(), conv(2 * W, W))
    return stack(conv(1, W), Net(unit, branch=branch()), Net(unit, branch=branch()), mid, conv(W, 1)), image()


@network("MobileNetV3 blocks")
def mobilenet():
    def block(c, wide):
        squeeze = stack(nn.AdaptiveAvgPool2d(1), conv(wide, 8, 1), nn.ReLU(), conv(8, wide, 1), nn.Hardsigmoid())
        gate = Net(lambda net, x: x * net.squeeze(x), squeeze=squeeze)
        depth = (conv(wide, wide, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        return residual(conv(c, wide, 1), nn.BatchNorm2d(wide), nn.Hardswish(), *depth, gate, conv(wide, c, 1))

    return stack(conv(3, W), block(W, 48), block(W, 48), conv(W, 3)), image(3)


@network("ResNeXt (grouped convolutions)")
def resnext():
    block = lambda: residual(conv(W, W, 1), nn.ReLU(), conv(W, W, groups=4), nn.ReLU(), conv(W, W, 1))
    return stack(conv(1, W), block(), block(), conv(W, 1)), image()


@network("depth multiplier 2")
def multiplier():
    return stack(conv(1, W), conv(W, 2 * W, groups=W), nn.ReLU(), conv(2 * W, W), nn.ReLU(), conv(W, 1)), image()


@network("squeeze and excitation (Linear)")
def squeeze():
    def forward(net, x):
        h = net.b(F.relu(net.a(x)))
        return net.c(h * net.fc(h.mean((2, 3))).sigmoid().view(h.shape[0], -1, 1, 1))

    fc = stack(nn.Linear(W, 4), nn.ReLU(), nn.Linear(4, W))
    return Net(forward, a=conv(1, W), b=conv(W, W), c=conv(W, 1), fc=fc), image()


@network("CBAM")
def cbam():
    def forward(net, x):
        h = net.b(F.relu(net.a(x)))
        h = h * torch.sigmoid(net.mlp(h.mean((2, 3), keepdim=True)) + net.mlp(h.amax((2, 3), keepdim=True)))
        gate = net.spatial(torch.cat([h.mean(1, keepdim=True), h.amax(1, keepdim=True)], 1))
        return net.c(F.relu(h * torch.sigmoid(gate)))

    mlp = stack(conv(W, 4, 1), nn.ReLU(), conv(4, W, 1))
    wide = stack(conv(1, W), nn.ReLU(), conv(W, W))
    return Net(forward, a=wide, b=conv(W, W), mlp=mlp, spatial=conv(2, 1, 7), c=conv(W, 1)), image()


@network("scSE")
def scse():
    def block(c):
        channel = stack(nn.AdaptiveAvgPool2d(1), conv(c, 4, 1), nn.ReLU(), conv(4, c, 1), nn.Sigmoid())
        run = lambda net, x: x * net.channel(x) + x * torch.sigmoid(net.spatial(x))
        return Net(run, channel=channel, spatial=conv(c, 1, 1))

    return stack(conv(1, W), nn.ReLU(), conv(W, W), block(W), conv(W, W), nn.ReLU(), conv(W, 1)), image()


@network("pixel attention (PAN)")
def pan():
    block = lambda: Net(
        lambda net, x: x + net.b(net.a(x) * net.g(x).sigmoid()), a=conv(W, W), g=conv(W, W, 1), b=conv(W, W)
    )
    return stack(
        conv(3, W), block(), block(), nn.Upsample(scale_factor=2), conv(W, W), nn.LeakyReLU(), conv(W, 3)
    ), image(3)


@network("gated convolutions (GLU)")
def gated():
    return stack(conv(1, 2 * W), nn.GLU(1), conv(W, 2 * W), nn.GLU(1), conv(W, 1)), image()


@network("max-out")
def maxout():
    half = lambda: Net(lambda net, x: torch.maximum(*net.a(x).chunk(2, 1)), a=conv(W, 2 * W))
    return stack(conv(1, W), half(), half(), conv(W, 1)), image()


@network("half instance norm (HINet)")
def hinet():
    def forward(net, x):
        a, b = net.a(net.head(x)).chunk(2, dim=1)
        return net.tail(F.leaky_relu(net.b(F.leaky_relu(torch.cat([net.norm(a), b], 1), 0.2)), 0.2))

    norm = nn.InstanceNorm2d(W // 2, affine=True)
    return Net(forward, head=conv(1, W), a=conv(W, W), norm=norm, b=conv(W, W), tail=conv(W, 1)), image()


@network("FiLM (noise level by chunk)")
def film():
    def forward(net, x, sigma):
        scale, shift = net.embed(sigma.view(-1, 1)).chunk(2, dim=1)
        return net.c(F.relu(net.b(F.relu(net.a(x))) * (1 + scale[..., None, None]) + shift[..., None, None]))

    embed = stack(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 2 * W))
    return Net(forward, embed=embed, a=conv(1, W), b=conv(W, W), c=conv(W, 1)), (image(), torch.tensor([0.1]))


@network("time embedding by a table")
def embedded():
    forward = lambda net, x, t: net.c(F.relu(net.b(F.relu(net.a(x) + net.e(t)[:, :, None, None]))))
    layers = dict(e=nn.Embedding(10, W), a=conv(1, W), b=conv(W, W), c=conv(W, 1))
    return Net(forward, **layers), (image(), torch.tensor([3]))


@network("learnt step sizes (one vector)")
def steps():
    def forward(net, x):
        h = net.head(x)
        for scale, layer in zip(net.scale, net.body):
            h = h + scale * F.relu(layer(h))
        return net.tail(h)

    scale = nn.Parameter(torch.full((4,), 0.5))
    return Net(forward, scale=scale, head=conv(1, W), body=[conv(W, W) for _ in range(4)], tail=conv(W, 1)), image()


@network("ECBSR (weights merged in forward)")
def ecb():
    block = lambda: Net(
        lambda net, x: F.relu(F.conv2d(x, net.k3.weight + F.pad(net.k1.weight, [1] * 4), net.k3.bias, padding=1)),
        k3=conv(W, W), k1=conv(W, W, 1, bias=False),
    )  # fmt: skip
    return stack(conv(1, W), conv(W, W), nn.ReLU(), block(), block(), conv(W, 1)), image()


@network("equalised learning rate")
def equalised():
    class Equal(nn.Conv2d):
        def forward(self, x):
            gain = (self.weight.shape[1] * 9) ** -0.5
            return F.conv2d(x, self.weight * gain, self.bias, padding=1)

    return stack(Equal(1, W, 3), nn.ReLU(), conv(W, W), nn.ReLU(), conv(W, W), nn.ReLU(), Equal(W, 1, 3)), image()


@network("spectral norm (Lipschitz)")
def lipschitz():
    normed = lambda *a: parametrizations.spectral_norm(conv(*a))
    return stack(normed(1, W), nn.ReLU(), normed(W, W), nn.ReLU(), normed(W, 1)), image()


# Transforms, sequences, attention


@network("Fourier units (FFC)")
def fourier():
    def unit(net, x):
        h = torch.fft.rfft2(x, norm="ortho")
        h = F.relu(net.c(torch.cat([h.real, h.imag], 1)))
        return torch.fft.irfft2(torch.complex(*h.chunk(2, 1)), s=x.shape[-2:], norm="ortho")

    def make():
        fourier = Net(unit, c=stack(conv(2 * W, 2 * W, 1), nn.BatchNorm2d(2 * W)))
        return Net(lambda net, x: F.relu(net.local(x) + net.unit(x)) + x, local=conv(W, W), unit=fourier)

    return stack(conv(1, W), make(), make(), conv(W, 1)), image()


@network("FNO (complex spectral weights)")
def fno():
    def layer(net, x):
        h = torch.fft.rfft2(x)
        return torch.fft.irfft2(torch.einsum("bihw,iohw->bohw", h, net.weight), s=x.shape[-2:]) + net.skip(x)

    make = lambda: Net(layer, weight=nn.Parameter(torch.randn(W, W, 16, 9, dtype=torch.cfloat) / W), skip=conv(W, W, 1))
    return stack(
        conv(1, W), nn.GELU(), conv(W, W, 1), make(), nn.GELU(), make(), conv(W, W, 1), nn.GELU(), conv(W, 1)
    ), image()


@network("LSTM over frames")
def lstm():
    def forward(net, x):
        b, t, h, w = x.shape
        f = F.relu(net.a(x.reshape(b * t, 1, h, w))).mean((2, 3)).view(b, t, -1)
        gain = net.fc(net.lstm(f)[0]).reshape(b * t, -1, 1, 1)
        return net.c(F.relu(net.b(x.reshape(b * t, 1, h, w)) * gain)).view(b, t, h, w)

    layers = dict(a=conv(1, W), b=conv(1, W), c=conv(W, 1), fc=nn.Linear(12, W))
    return Net(forward, lstm=nn.LSTM(W, 12, batch_first=True), **layers), image(3)


@network("GRU")
def gru():
    forward = lambda net, x: net.out(F.relu(net.mid(net.gru(F.relu(net.a(x)))[0])))
    layers = dict(a=nn.Linear(4, W), mid=nn.Linear(12, W), out=nn.Linear(W, 4))
    return Net(forward, gru=nn.GRU(W, 12, batch_first=True), **layers), torch.rand(1, 9, 4)


@network("convolutional GRU (CRNN)")
def crnn():
    def forward(net, x):
        h = torch.zeros_like(net.x2h(x[:, :1]))
        outputs = []
        for t in range(x.shape[1]):
            frame = net.x2h(x[:, t : t + 1])
            z = torch.sigmoid(net.gate(torch.cat([frame, h], 1)))
            h = (1 - z) * h + z * torch.tanh(net.new(torch.cat([frame, h], 1)))
            outputs.append(net.tail(h))
        return torch.cat(outputs, 1)

    layers = dict(x2h=conv(1, W), gate=conv(2 * W, W), new=conv(2 * W, W), tail=conv(W, 1))
    return Net(forward, **layers), image(3)


@network("autoencoder (transposed convolutions)")
def autoencoder():
    up = lambda a, b: nn.ConvTranspose2d(a, b, 4, 2, 1)
    down = stack(conv(1, W, 4, stride=2, padding=1), nn.ReLU(), conv(W, 2 * W, 4, stride=2, padding=1), nn.ReLU())
    return stack(down, stack(up(2 * W, W), nn.BatchNorm2d(W), nn.ReLU(), up(W, 1))), image()


@network("classifier head (flatten, Linear)")
def classifier():
    features = (conv(1, W), nn.ReLU(), nn.MaxPool2d(4), conv(W, 8), nn.ReLU(), nn.Flatten())
    return stack(*features, nn.Linear(8 * 16, 24), nn.ReLU(), nn.Linear(24, 5)), image()


@network("SIREN (coordinates)")
def siren():
    sine = lambda a, b: Net(lambda net, x: torch.sin(3 * net.a(x)), a=nn.Linear(a, b))
    return stack(sine(2, W), sine(W, W), sine(W, W), nn.Linear(W, 1)), torch.rand(50, 2)


def window_attention(net, x):
    b, h, w, c = x.shape
    y = net.norm1(x).view(b, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)
    q, k, v = net.qkv(y).view(len(y), 16, 3, net.heads, c // net.heads).permute(2, 0, 3, 1, 4)
    y = ((q @ k.mT) * net.scale).softmax(-1) @ v
    y = net.proj(y.transpose(1, 2).reshape(-1, 16, c))
    x = x + y.view(b, h // 4, w // 4, 4, 4, c).transpose(2, 3).reshape(b, h, w, c)
    return x + net.mlp(net.norm2(x))


@network("SwinIR (window attention)")
def swinir():
    def make():
        mlp = stack(nn.Linear(W, 2 * W), nn.GELU(), nn.Linear(2 * W, W))
        layers = dict(qkv=nn.Linear(W, 3 * W), proj=nn.Linear(W, W), mlp=mlp)
        net = Net(window_attention, norm1=nn.LayerNorm(W), norm2=nn.LayerNorm(W), **layers)
        net.heads, net.scale = 2, (W // 2) ** -0.5
        return net

    forward = lambda net, x: net.tail(
        (h := net.head(x)) + net.conv(net.body(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    )
    return Net(forward, head=conv(1, W), body=stack(make(), make()), conv=conv(W, W), tail=conv(W, 1)), image()


@network("Restormer (channel attention)")
def restormer():
    def attention(net, x):
        b, c, h, w = x.shape
        q, k, v = (t.flatten(2) for t in net.dw(net.qkv(net.norm(x))).chunk(3, dim=1))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * net.temperature).softmax(-1)
        x = x + net.proj((weights @ v).view(b, c, h, w))
        a, g = net.ffn(x).chunk(2, dim=1)
        return x + net.out(F.gelu(a) * g)

    def make():
        layers = dict(
            qkv=conv(W, 3 * W, 1), dw=conv(3 * W, 3 * W, groups=3 * W), proj=conv(W, W, 1), norm=LayerNorm2d(W)
        )
        return Net(
            attention, **layers, ffn=conv(W, 4 * W), out=conv(2 * W, W, 1), temperature=nn.Parameter(torch.ones(1))
        )

    return stack(conv(1, W), make(), make(), conv(W, 1)), image()


@network("Transformer encoder (ViT)")
def vit():
    def forward(net, x):
        h = net.body(net.embed(x).flatten(2).mT + net.position)
        return net.tail(h.mT.unflatten(2, (4, 4)))

    layer = nn.TransformerEncoderLayer(W, 2, 4 * W, batch_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    position = nn.Parameter(torch.randn(1, 16, W))
    tail = nn.ConvTranspose2d(W, 1, 4, 4)
    return Net(forward, embed=conv(1, W, 4, stride=4, padding=0), body=body, position=position, tail=tail), image()


@network("non-local block")
def nonlocal_net():
    def block(net, x):
        q, k, v = (layer(x).flatten(2) for layer in (net.q, net.k, net.v))
        return x + net.out((v @ (q.mT @ k).softmax(-1).mT).unflatten(2, x.shape[-2:]))

    attention = Net(block, q=conv(W, 8, 1), k=conv(W, 8, 1), v=conv(W, 8, 1), out=conv(8, W, 1))
    return stack(conv(1, W), nn.ReLU(), attention, conv(W, W), nn.ReLU(), conv(W, 1)), image()


@network("diffusion U-Net (x, t)")
def diffusion():
    def block(net, x, e):
        h = net.one(F.silu(net.n1(x))) + net.t(F.silu(e))[:, :, None, None]
        return net.skip(x) + net.two(F.silu(net.n2(h)))

    def make(a, b):
        norms = dict(n1=nn.GroupNorm(4, a), n2=nn.GroupNorm(4, b))
        return Net(block, **norms, one=conv(a, b), two=conv(b, b), t=nn.Linear(24, b), skip=conv(a, b, 1))

    def forward(net, x, t):
        angle = t[:, None] * torch.logspace(0, -3, 4)
        e = net.embed(torch.cat([angle.sin(), angle.cos()], 1))
        a = net.enc(net.head(x), e)
        b = net.mid(net.down(a), e)
        h = net.dec(torch.cat([F.interpolate(b, scale_factor=2), a], 1), e)
        return net.tail(F.silu(net.norm(h)))

    layers = dict(
        enc=make(W, W), down=conv(W, W, stride=2), mid=make(W, 2 * W), dec=make(3 * W, W), norm=nn.GroupNorm(4, W)
    )
    embed = stack(nn.Linear(8, 24), nn.SiLU(), nn.Linear(24, 24))
    return Net(forward, head=conv(1, W), embed=embed, **layers, tail=conv(W, 1)), (image(), torch.tensor([7.0]))


# Further families


@network("Res2Net (hierarchical splits)")
def res2net():
    def block(net, x):
        parts = torch.split(net.a(x), 4, dim=1)
        h, done = parts[0], [parts[0]]
        for part, layer in zip(parts[1:], net.layers):
            h = F.relu(layer(h + part))
            done.append(h)
        return x + net.b(torch.cat(done, 1))

    make = lambda: Net(block, a=conv(W, 16, 1), layers=[conv(4, 4) for _ in range(3)], b=conv(16, W, 1))
    return stack(conv(1, W), make(), make(), conv(W, W), nn.ReLU(), conv(W, 1)), image()


@network("GhostNet (cheap copies)")
def ghost():
    def forward(net, x):
        a = F.relu(net.a(x))
        return torch.cat([a, F.relu(net.b(a))], 1)

    make = lambda c: Net(forward, a=conv(c, W, 1), b=conv(W, W, groups=W))
    return stack(make(1), make(2 * W), conv(2 * W, 1)), image()


@network("selective kernels (softmax over branches)")
def selective():
    def forward(net, x):
        a, b = F.relu(net.a(x)), F.relu(net.b(x))
        z = F.relu(net.squeeze((a + b).mean((2, 3), keepdim=True)))
        weights = torch.stack([net.wa(z), net.wb(z)]).softmax(0)
        return net.tail(F.relu(net.mid(weights[0] * a + weights[1] * b)))

    layers = dict(a=conv(1, W), b=conv(1, W, 5), squeeze=conv(W, 8, 1), wa=conv(8, W, 1), wb=conv(8, W, 1))
    return Net(forward, **layers, mid=conv(W, W), tail=conv(W, 1)), image()


@network("coordinate channels (CoordConv)")
def coordinates():
    def forward(net, x):
        grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in x.shape[-2:]], indexing="ij"))
        h = F.relu(net.a(torch.cat([x, grid[None]], 1)))
        return net.c(F.relu(net.b(torch.cat([h, grid[None]], 1))))

    return Net(forward, a=conv(3, W), b=conv(W + 2, W), c=conv(W, 1)), image()


@network("modulated convolution (StyleGAN 2)")
def modulated():
    def layer(net, x, style):
        weight = net.conv.weight * net.style(style)[0, None, :, None, None]
        weight = weight * (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        return F.leaky_relu(F.conv2d(x, weight, net.conv.bias, padding=1), 0.2)

    make = lambda a, b: Net(layer, conv=conv(a, b), style=nn.Linear(8, a))

    def forward(net, x, style):
        style = net.mapping(style)
        return net.tail(net.two(net.one(net.head(x), style), style))

    mapping = stack(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
    layers = dict(mapping=mapping, head=stack(conv(1, W), nn.ReLU(), conv(W, W)), one=make(W, W), two=make(W, W))
    return Net(forward, **layers, tail=stack(conv(W, W), nn.ReLU(), conv(W, 1))), (image(), torch.rand(1, 4))


@network("adaptive instance norm (AdaIN)")
def adain():
    def forward(net, x, style):
        h = F.relu(net.a(x))
        mean, std = h.mean((2, 3), keepdim=True), h.std((2, 3), keepdim=True)
        scale, shift = net.fc(style)[..., None, None].chunk(2, 1)
        return net.c(F.relu(net.b((h - mean) / (std + 1e-5) * scale + shift)))

    return Net(forward, a=conv(1, W), b=conv(W, W), c=conv(W, 1), fc=nn.Linear(4, 2 * W)), (image(), torch.rand(1, 4))


@network("SPADE normalisation (maps from an image)")
def spade_norm():
    def norm(net, h, x):
        a = F.relu(net.shared(x))
        return F.instance_norm(h) * (1 + net.gamma(a)) + net.beta(a)

    make = lambda: Net(norm, shared=conv(1, 8), gamma=conv(8, W), beta=conv(8, W))

    def forward(net, x):
        h = net.b(F.relu(net.one(net.a(x), x)))
        return net.c(F.relu(net.two(h, x)))

    return Net(forward, a=conv(1, W), b=conv(W, W), c=conv(W, 1), one=make(), two=make()), image()


@network("blind spot (rotations, shift)")
def blind_spot():
    def forward(net, x):
        views = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])
        h = F.pad(net.body(views), (0, 0, 1, 0))[:, :, :-1]
        views = torch.cat([v.rot90(-k, (2, 3)) for k, v in enumerate(h.chunk(4))], 1)
        return net.tail(F.relu(net.join(views)))

    body = stack(conv(1, W), nn.ReLU(), conv(W, W), nn.ReLU())
    return Net(forward, body=body, join=conv(4 * W, W, 1), tail=conv(W, 1, 1)), image()


@network("rotation-equivariant convolution (tied weights)")
def equivariant():
    def layer(net, x):
        return torch.stack([F.conv2d(x, net.conv.weight.rot90(k, (2, 3)), padding=1) for k in range(4)]).amax(0)

    make = lambda a, b: Net(layer, conv=conv(a, b, bias=False))
    return stack(make(1, W), make(W, W), nn.ReLU(), conv(W, W), nn.ReLU(), conv(W, 1)), image()


@network("additive coupling (reversible)")
def reversible():
    def block(net, x):
        a, b = x.chunk(2, 1)
        a = a + net.f(b)
        return torch.cat([a, b + net.g(a)], 1)

    half = lambda: stack(conv(W // 2, W), nn.ReLU(), conv(W, W // 2))
    make = lambda: Net(block, f=half(), g=half())
    return stack(conv(1, W), make(), make(), conv(W, 1)), image()


@network("vector quantisation (VQ-VAE)")
def quantised():
    def forward(net, x):
        h = net.enc(x).permute(0, 2, 3, 1)
        nearest = (h.unsqueeze(3) - net.codes.weight).square().sum(-1).argmin(-1)
        return net.dec(net.codes(nearest).permute(0, 3, 1, 2))

    enc = stack(conv(1, W), nn.ReLU(), conv(W, 8))
    return Net(forward, enc=enc, codes=nn.Embedding(12, 8), dec=stack(conv(8, W), nn.ReLU(), conv(W, 1))), image()


@network("mixture of experts (gated branches)")
def experts():
    def forward(net, x):
        h = F.relu(net.head(x))
        gate = net.gate(h.mean((2, 3))).softmax(-1)
        return net.tail(F.relu(sum(gate[:, i, None, None, None] * e(h) for i, e in enumerate(net.experts))))

    layers = dict(head=conv(1, W), gate=nn.Linear(W, 4), experts=[conv(W, W) for _ in range(4)], tail=conv(W, 1))
    return Net(forward, **layers), image()


@network("conditional convolution (mixed kernels)")
def condconv():
    def layer(net, x):
        mix = net.gate(x.mean((2, 3))).sigmoid()
        return F.conv2d(x, (mix[0, :, None, None, None, None] * net.kernels).sum(0), padding=1)

    make = lambda: Net(layer, gate=nn.Linear(W, 3), kernels=nn.Parameter(0.1 * torch.randn(3, W, W, 3, 3)))
    return stack(
        conv(1, W), nn.ReLU(), conv(W, W), nn.ReLU(), make(), nn.ReLU(), conv(W, W), nn.ReLU(), conv(W, 1)
    ), image()


@network("convolutional LSTM (four gates by chunk)")
def convlstm():
    def forward(net, x):
        h = c = x.new_zeros(len(x), W, *x.shape[2:])
        for t in range(x.shape[1]):
            i, f, g, o = net.gates(torch.cat([x[:, t : t + 1], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return net.tail(F.relu(net.mid(h)))

    return Net(forward, gates=conv(W + 1, 4 * W), mid=conv(W, W), tail=conv(W, 1)), image(3)


@network("bidirectional LSTM")
def bilstm():
    forward = lambda net, x: net.out(F.relu(net.mid(net.rnn(F.relu(net.a(x)))[0])))
    rnn = nn.LSTM(W, 12, 2, batch_first=True, bidirectional=True)
    return Net(forward, rnn=rnn, a=nn.Linear(4, W), mid=nn.Linear(24, W), out=nn.Linear(W, 4)), torch.rand(1, 9, 4)


@network("MLP-Mixer")
def mixer():
    def block(net, x):
        x = x + net.tokens(net.norm1(x).mT).mT
        return x + net.channels(net.norm2(x))

    mlp = lambda n: stack(nn.Linear(n, 24), nn.GELU(), nn.Linear(24, n))
    make = lambda: Net(block, norm1=nn.LayerNorm(W), norm2=nn.LayerNorm(W), tokens=mlp(16), channels=mlp(W))
    forward = lambda net, x: net.tail(net.body(net.embed(x).flatten(2).mT).mT.unflatten(2, (4, 4)))
    embed, tail = conv(1, W, 4, stride=4, padding=0), nn.ConvTranspose2d(W, 1, 4, 4)
    return Net(forward, embed=embed, body=stack(make(), make()), tail=tail), image()


@network("cross attention (MultiheadAttention)")
def cross_attention():
    def forward(net, x, y):
        q, k = (net.enc(v).flatten(2).mT for v in (x, y))
        h = q + net.attention(q, k, k, need_weights=False)[0]
        return net.tail(F.relu(net.mid(h)).mT.unflatten(2, x.shape[-2:]))

    attention = nn.MultiheadAttention(W, 2, batch_first=True)
    layers = dict(enc=stack(conv(1, W), nn.ReLU(), conv(W, W)), mid=nn.Linear(W, W), tail=conv(W, 1))
    return Net(forward, attention=attention, **layers), (image(1, 8), image(1, 8))


@network("linear attention, einsum")
def einsum_attention():
    def block(net, x):
        q, k, v = (t.flatten(2).unflatten(1, (2, -1)) for t in net.qkv(x).chunk(3, 1))
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
        return x + net.out(torch.einsum("bhde,bhdn->bhen", context, q).flatten(1, 2).unflatten(2, x.shape[-2:]))

    make = lambda: Net(block, qkv=conv(W, 48, 1), out=conv(W, W, 1))
    return stack(conv(1, W), make(), conv(W, W), nn.ReLU(), make(), conv(W, 1)), image()


@network("back projection (DBPN)")
def dbpn():
    up, down = lambda: nn.ConvTranspose2d(W, W, 6, 2, 2), lambda: conv(W, W, 6, stride=2, padding=2)

    def unit(net, x):
        h = net.act(net.up1(x))
        return h + net.act(net.up2(net.act(net.down(h)) - x))

    make = lambda: Net(unit, up1=up(), down=down(), up2=up(), act=nn.PReLU(W))

    def forward(net, x):
        h1 = net.one(x := net.head(x))
        return net.tail(torch.cat([h1, net.two(net.back(h1) + x)], 1))

    return Net(forward, head=conv(1, W), one=make(), two=make(), back=down(), tail=conv(2 * W, 1)), image()


@network("U-Net++ (nested skips)")
def unetpp():
    block = lambda a, b: stack(conv(a, b), nn.BatchNorm2d(b), nn.ReLU(True))
    up = lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    def forward(net, x):
        a = net.a0(x)
        b = net.b0(F.avg_pool2d(a, 2))
        c = net.c0(F.avg_pool2d(b, 2))
        a1, b1 = net.a1(torch.cat([a, up(b)], 1)), net.b1(torch.cat([b, up(c)], 1))
        return net.tail(net.a2(torch.cat([a, a1, up(b1)], 1)))

    layers = dict(a0=block(1, W), b0=block(W, 24), c0=block(24, 32), a1=block(W + 24, W), b1=block(56, 24))
    return Net(forward, **layers, a2=block(2 * W + 24, W), tail=conv(W, 1)), image()


@network("layer attention (HAN)")
def han():
    def forward(net, x):
        h, features = net.head(x), []
        for layer in net.body:
            features.append(h := F.relu(layer(h)))
        s = torch.stack(features, 1)
        flat = s.flatten(2)
        s = s + ((flat @ flat.mT / 1000).softmax(-1) @ flat).view_as(s)
        return net.tail(F.relu(net.join(s.flatten(1, 2))))

    body = [conv(W, W) for _ in range(3)]
    return Net(forward, head=conv(1, W), body=body, join=conv(3 * W, W), tail=conv(W, 1)), image()


@network("scale per channel, CReLU")
def crelu():
    doubled = Net(lambda net, x: torch.cat([F.relu(x), F.relu(-x)], 1))
    layers = (conv(1, W), doubled, conv(2 * W, W), Scale(W), nn.Softplus(), conv(W, 1))
    return stack(*layers), image()


@network("softmax over channels, top-k")
def channel_softmax():
    def forward(net, x):
        h = net.a(x)
        h = h * h.softmax(1)
        return net.c(F.relu(net.b(h)))

    return Net(forward, a=conv(1, W), b=conv(W, W), c=conv(W, 1)), image()


@network("sorted channels")
def sorted_channels():
    forward = lambda net, x: net.c(F.relu(net.b(net.a(x).sort(1).values)))
    return Net(forward, a=conv(1, W), b=conv(W, W), c=conv(W, 1)), image()


@network("output width in the forward (channel mean)")
def channel_mean():
    forward = lambda net, x: x + net.b(F.relu(net.a(x))).mean(1, keepdim=True)
    return Net(forward, a=conv(1, W), b=conv(W, W)), image()


@network("weight standardisation, group norm")
def standardised():
    def layer(net, x):
        w = net.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.relu(net.norm(F.conv2d(x, w, net.conv.bias, padding=1)))

    make = lambda a, b: Net(layer, conv=conv(a, b), norm=nn.GroupNorm(4, b))
    return stack(make(1, W), make(W, W), make(W, W), conv(W, W), nn.ReLU(), conv(W, 1)), image()


@network("frozen first layer, lists as inputs")
def lists():
    def forward(net, frames):
        return net.tail(F.relu(net.mid(torch.cat([F.relu(net.head(f)) for f in frames], 1))))

    net = Net(forward, head=conv(1, W), mid=conv(3 * W, W), tail=conv(W, 1))
    net.head.requires_grad_(False)
    return net, ([image(), image(), image()],)


@network("stored position table added to features")
def position_table():
    def forward(net, x):
        return net.c(F.relu(net.b(F.relu(net.a(x)) + net.table)))

    return Net(
        forward, a=conv(1, W), b=conv(W, W), c=conv(W, 1), table=nn.Parameter(torch.randn(1, W, 16, 16))
    ), image()


@network("buffer per channel, fixed blur")
def buffers():
    def forward(net, x):
        h = (F.relu(net.a(x)) - net.mean) / net.std
        return net.c(F.relu(net.b(F.conv2d(h, net.blur.expand(h.shape[1], 1, 3, 3), padding=1, groups=h.shape[1]))))

    net = Net(forward, a=conv(1, W), b=conv(W, W), c=conv(W, 1))
    net.register_buffer("mean", torch.rand(1, W, 1, 1))
    net.register_buffer("std", 1 + torch.rand(1, W, 1, 1))
    net.register_buffer("blur", torch.ones(1, 1, 3, 3) / 9)
    return net, image()


@network("batch norm per branch, one convolution")
def two_norms():
    def forward(net, x):
        h = net.a(x)
        return net.c(F.relu(net.n1(h)) + F.relu(-net.n2(h.flip(-1))))

    return Net(forward, a=conv(1, W), n1=nn.BatchNorm2d(W), n2=nn.BatchNorm2d(W), c=conv(W, 1)), image()


@network("strided slices of channels")
def slices():
    forward = lambda net, x: net.c(F.relu(net.b((h := net.a(x))[:, ::2] * h[:, 1::2])))
    return Net(forward, a=conv(1, W), b=conv(W // 2, W), c=conv(W, 1)), image()


@network("channels moved to the batch")
def to_batch():
    def forward(net, x):
        h = F.relu(net.a(x))
        b, c, *size = h.shape
        h = net.each(h.reshape(b * c, 1, *size)).reshape(b, -1, *size)
        return net.c(F.relu(net.b(h)))

    return Net(forward, a=conv(1, W), each=conv(1, 1), b=conv(W, W), c=conv(W, 1)), image()


@network("complex image by view_as_real")
def viewed():
    def forward(net, x):
        h = torch.view_as_real(x).movedim(-1, 1).flatten(1, 2)
        h = net.c(F.relu(net.b(F.relu(net.a(h)))))
        return torch.view_as_complex(h.unflatten(1, (2, -1)).movedim(1, -1).contiguous())

    return Net(forward, a=conv(6, W), b=conv(W, W), c=conv(W, 6)), torch.randn(1, 3, 16, 16, dtype=torch.cfloat)


@network("channels as a product of two axes (3-D kernel over slices)")
def slices_3d():
    def forward(net, x):
        h = F.relu(net.a(x))
        h = net.mix(h[:, None])[:, 0]
        return net.c(F.relu(h))

    return Net(forward, a=conv(1, W), mix=nn.Conv3d(1, 1, 3, padding=1), c=conv(W, 1)), image()


# Complex numbers and physics


@network("complex image as two channels")
def two_channels():
    def forward(net, x):
        h = net.body(torch.cat([x.real, x.imag], 1))
        return torch.complex(*h.chunk(2, 1))

    body = stack(conv(2, W), nn.ReLU(), conv(W, W), nn.ReLU(), conv(W, 2))
    return Net(forward, body=body), torch.randn(1, 1, 16, 16, dtype=torch.cfloat)


@network("complex image, layers in the model")
def bare_complex():
    forward = lambda net, x: torch.complex(
        *net.c(F.relu(net.b(F.relu(net.a(torch.cat([x.real, x.imag], 1)))))).chunk(2, 1)
    )
    return Net(forward, a=conv(2, W), b=conv(W, W), c=conv(W, 2)), torch.randn(1, 1, 16, 16, dtype=torch.cfloat)


@network("complex convolutions (real and imaginary weights)")
def complex_pairs():
    def layer(a, b):
        run = lambda net, re, im: (net.re(re) - net.im(im), net.re(im) + net.im(re))
        return Net(run, re=conv(a, b, bias=False), im=conv(a, b, bias=False))

    def forward(net, x):
        parts = net.a(x.real, x.imag)
        parts = net.b(*(F.relu(p) for p in parts))
        return torch.complex(*net.c(*(F.relu(p) for p in parts)))

    return Net(forward, a=layer(1, W), b=layer(W, W), c=layer(W, 1)), torch.randn(1, 1, 16, 16, dtype=torch.cfloat)


@network("complex weights")
def complex_weights():
    crelu = lambda: Net(lambda net, x: torch.complex(F.relu(x.real), F.relu(x.imag)))
    layer = partial(conv, dtype=torch.cfloat)
    net = stack(layer(1, W), crelu(), layer(W, W), crelu(), layer(W, 1))
    return net, torch.randn(1, 1, 16, 16, dtype=torch.cfloat)


def modl_step(net, y, mask):
    """Alternates a CNN and data consistency in k-space."""
    x = torch.fft.ifft2(y)
    for stage in net.stages:
        x = (
            x
            + torch.view_as_complex(
                stage(torch.view_as_real(x)[:, 0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
            )[:, None]
        )
        x = torch.fft.ifft2(mask * y + (1 - mask) * torch.fft.fft2(x))
    return x


@network("MoDL (one CNN, tied)")
def modl():
    cnn = stack(conv(2, W), nn.ReLU(), conv(W, W), nn.ReLU(), conv(W, 2))
    mask = (torch.rand(1, 1, 1, 16) > 0.5).float()
    return Net(modl_step, stages=[cnn] * 3), (mask * torch.randn(1, 1, 16, 16, dtype=torch.cfloat), mask)


@network("unrolled cascade (untied)")
def cascade():
    cnn = lambda: stack(conv(2, W), nn.ReLU(), conv(W, W), nn.ReLU(), conv(W, 2))
    mask = (torch.rand(1, 1, 1, 16) > 0.5).float()
    return Net(modl_step, stages=[cnn() for _ in range(3)]), (
        mask * torch.randn(1, 1, 16, 16, dtype=torch.cfloat),
        mask,
    )


@network("learned primal-dual (real)")
def primal_dual():
    def forward(net, y):
        A = torch.linspace(0, 1, 144).view(9, 16).cos()
        x, d = y.new_zeros(1, 5, 16, 16), y.new_zeros(1, 5, 9, 16)
        for dual, primal in zip(net.dual, net.primal):
            d = d + dual(torch.cat([d, A @ x[:, :1], y], 1))
            x = x + primal(torch.cat([x, A.mT @ d[:, :1]], 1))
        return x[:, :1]

    make = lambda c: stack(conv(c, W), nn.PReLU(), conv(W, W), nn.PReLU(), conv(W, 5))
    return Net(forward, dual=[make(7) for _ in range(2)], primal=[make(6) for _ in range(2)]), image(1)[:, :, :9]


@network("ISTA-Net (convolution and its learnt adjoint)")
def istanet():
    def forward(net, x):
        for stage in net.stages:
            h = stage.f(x)
            x = x - 0.1 * (x - x.flip(-1)) + stage.g(h.sign() * F.relu(h.abs() - 0.01))
        return x

    make = lambda: Net(None, f=stack(conv(1, W), nn.ReLU(), conv(W, W)), g=stack(conv(W, W), nn.ReLU(), conv(W, 1)))
    return Net(forward, stages=[make(), make()]), image()


@network("spade DEQ", "spade")
def spade_deq():
    from spade.examples import brain
    from spade.models import DEQ

    return DEQ(W, 2, max_iterations=8), brain()[:2]


@network("spade VarNet", "spade")
def spade_varnet():
    from spade.examples import brain
    from spade.models import VarNet

    return VarNet(2, 6, 2), brain()[:2]


@network("spade E2EVarNet", "spade")
def spade_e2e():
    from spade.examples import brain
    from spade.models import E2EVarNet

    return E2EVarNet(2, 6, 2, 4, 2), brain()[:2]


@network("spade USRNet", "spade")
def spade_usrnet():
    from spade.models import USRNet
    from spade.operators import BlurDownsample

    return USRNet(2, (8, 8, 16, 16), 1, 8), (image(3), BlurDownsample(torch.ones(5, 5) / 25, 2, 0.1))


# Networks of other packages


def foreign(name, package, build, inputs):
    """Enter a network of another package, which is imported when the network is built."""

    def make():
        module = load(package)
        return build(module), inputs(module) if callable(inputs) else inputs

    ZOO[name] = (make, package.split(".")[0])


def denoiser(name, build, channels=1, size=32):
    """Enter a denoiser of DeepInverse, called as (x, sigma)."""
    foreign(f"deepinv {name}", "deepinv", lambda d: build(d.models), (image(channels, size), 0.1))


denoiser("DnCNN", lambda m: m.DnCNN(1, 1, 5, nf=W, pretrained=None))
denoiser("UNet", lambda m: m.UNet(channels_per_scale=(8, 16, 32)))
denoiser("UNet, bias-free norm", lambda m: m.UNet(bias=False, batch_norm="biasfree", channels_per_scale=(8, 16, 32)))
denoiser("UNet without cat", lambda m: m.UNet(cat=False, channels_per_scale=(8, 16, 32)))
denoiser("DRUNet", lambda m: m.DRUNet(1, 1, (8, 16, 16, 32), 2, pretrained=None))
denoiser("DRUNet, pixel shuffle", lambda m: m.DRUNet(1, 1, (8, 16, 16, 32), 2, "E", "maxpool", "pixelshuffle", None))
denoiser("GSDRUNet", lambda m: m.GSDRUNet(in_channels=1, out_channels=1, nc=(8, 16, 16, 32), nb=1, pretrained=None))
denoiser("FFDNet", lambda m: m.FFDNet(5, W, pretrained=None))
denoiser("SCUNet", lambda m: m.SCUNet(1, [1] * 7, 64, pretrained=None), size=64)
denoiser("SwinIR", lambda m: m.SwinIR(32, 1, 1, 24, (2, 2), (2, 2), pretrained=None))
denoiser("Restormer", lambda m: m.Restormer(1, 1, 16, (1, 1, 1, 1), 1, (1, 2, 2, 4), pretrained=None))
foreign("deepinv ICNN", "deepinv", lambda d: d.models.ICNN(1, W, 3, 4), image())
denoiser("DScCP", lambda m: m.DScCP(3, W, pretrained=None), 3)
denoiser("EquivariantDenoiser", lambda m: m.EquivariantDenoiser(m.DnCNN(1, 1, 4, nf=W, pretrained=None)))
foreign("deepinv DRUNet 3-D", "deepinv", lambda d: d.models.DRUNet(1, 1, (8, 8, 16, 16), 1, pretrained=None, dim=3), (
    image(1, 8, 3), 0.1))  # fmt: skip
foreign("deepinv AutoEncoder", "deepinv", lambda d: d.models.AutoEncoder(64, 48, 16), torch.rand(2, 64))
foreign("deepinv ADMUNet", "deepinv", lambda d: d.models.ADMUNet(
    16, 1, 1, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), pretrained=None),
    (image(1, 16), torch.tensor([0.1])))  # fmt: skip
foreign("deepinv PDNet block", "deepinv", lambda d: d.models.PDNet_PrimalBlock(), (image(5), image(1)))
foreign("deepinv SRResNet", "deepinv", lambda d: d.models.SRResNet(pretrained=None), (image(3), 0.1))


def measured(d, channels=1, size=32):
    """A blurred image and DeepInverse's physics."""
    physics = d.physics.Blur(torch.ones(1, 1, 3, 3) / 9, padding="circular")
    return physics.A(image(channels, size)), physics


def unfolded(d, algorithm, untied=False, **keywords):
    """DeepInverse's unfolded algorithm, three iterations, one denoiser or one for each."""
    make = lambda: d.optim.PnP(denoiser=d.models.DnCNN(1, 1, 4, nf=W, pretrained=None))
    prior = [make() for _ in range(3)] if untied else make()
    parameters = {"stepsize": [0.5] * 3, "g_param": [0.1] * 3, "lambda": [1.0] * 3}
    return d.unfolded.unfolded_builder(
        algorithm, params_algo=parameters, data_fidelity=d.optim.L2(), max_iter=3, prior=prior, **keywords
    )


for algorithm in ("PGD", "HQS", "ADMM", "DRS"):
    foreign(f"deepinv unfolded {algorithm}", "deepinv", partial(unfolded, algorithm=algorithm), measured)
foreign("deepinv unfolded PGD, untied", "deepinv", partial(unfolded, algorithm="PGD", untied=True), measured)
foreign("deepinv DEQ", "deepinv", lambda d: d.unfolded.DEQ_builder(
    "PGD", params_algo={"stepsize": 0.5, "g_param": 0.1, "lambda": 1.0}, data_fidelity=d.optim.L2(), max_iter=3,
    prior=d.optim.PnP(denoiser=d.models.DnCNN(1, 1, 4, nf=W, pretrained=None))), measured)  # fmt: skip


def mri(d, coils=0):
    """k-space and DeepInverse's MRI physics, with coil maps on request."""
    mask = (torch.rand(1, 1, 32, 32) > 0.5).float()
    maps = torch.randn(1, coils, 32, 32, dtype=torch.cfloat)
    physics = (
        d.physics.MultiCoilMRI(mask=mask, coil_maps=maps) if coils else d.physics.MRI(mask=mask, img_size=(2, 32, 32))
    )
    return physics.A(torch.randn(1, 2, 32, 32)), physics


complex_dncnn = lambda d: d.models.DnCNN(2, 2, 4, nf=W, pretrained=None)
foreign("deepinv MoDL", "deepinv", lambda d: d.models.MoDL(complex_dncnn(d), 2), mri)
foreign("deepinv VarNet", "deepinv", lambda d: d.models.VarNet(complex_dncnn(d), num_cascades=2), mri)
foreign(
    "deepinv VarNet, coils",
    "deepinv",
    lambda d: d.models.VarNet(complex_dncnn(d), num_cascades=2),
    partial(mri, coils=3),
)
foreign("deepinv ArtifactRemoval", "deepinv", lambda d: d.models.ArtifactRemoval(
    d.models.UNet(channels_per_scale=(8, 16, 32)), "adjoint"), measured)  # fmt: skip

MONAI = "monai.networks.nets"


def monai(name, build, size=32, channels=1, dim=2):
    foreign(f"monai {name}", MONAI, build, image(channels, size, dim))


monai("UNet", lambda m: m.UNet(2, 1, 1, (8, 16, 32), (2, 2), num_res_units=1))
monai("UNet 3-D, ReLU, batch norm", lambda m: m.UNet(3, 1, 1, (8, 16, 32), (2, 2), act="relu", norm="batch"), 16, dim=3)
monai("AttentionUnet", lambda m: m.AttentionUnet(2, 1, 1, (8, 16, 32), (2, 2)))
monai("BasicUNet", lambda m: m.BasicUNet(2, 1, 1, (8, 8, 16, 32, 32, 8)))
monai("BasicUNet++", lambda m: m.BasicUNetPlusPlus(2, 1, 1, (8, 8, 16, 32, 32, 8)))
monai("FlexibleUNet", lambda m: m.FlexibleUNet(3, 1, "efficientnet-b0", decoder_channels=(32, 24, 16, 12, 8)), 64, 3)
monai("SegResNet", lambda m: m.SegResNet(2, 8, 1, 1))
monai("SegResNet, batch norm", lambda m: m.SegResNet(2, 8, 1, 1, norm="BATCH"))
monai("DynUNet", lambda m: m.DynUNet(2, 1, 1, [3, 3, 3], [1, 2, 2], [2, 2], [8, 16, 32]))
monai("DynUNet, residual", lambda m: m.DynUNet(2, 1, 1, [3, 3, 3], [1, 2, 2], [2, 2], [8, 16, 32], res_block=True))
monai("UNETR", lambda m: m.UNETR(1, 1, (32, 32), 8, 32, 64, 4, spatial_dims=2))
monai("SwinUNETR", lambda m: m.SwinUNETR(1, 1, feature_size=12, spatial_dims=2), 64)
monai("AutoEncoder", lambda m: m.AutoEncoder(2, 1, 1, (8, 16, 32), (1, 2, 2)))
monai("HighResNet", lambda m: m.HighResNet(2, 1, 1))
monai("DenseNet121", lambda m: m.DenseNet(2, 1, 3, 16, 8, (2, 2)))
monai("ResNet", lambda m: m.ResNet("basic", [1, 1, 1, 1], [8, 16, 32, 64], 2, n_input_channels=1, num_classes=3))
lines = torch.arange(-16, 16).view(1, 1, 1, 32, 1)
kspace = lambda *_: (torch.randn(1, 3, 32, 32, 2), (lines % 3 < 1) | (lines.abs() < 4))


def monai_varnet(_):
    part = lambda name: load(f"monai.apps.reconstruction.networks.nets.{name}")
    coils = part("coil_sensitivity_model").CoilSensitivityModel(2, (8, 8, 16, 16, 16, 8))
    cnn = part("complex_unet").ComplexUnet(2, (8, 8, 16, 16, 16, 8))
    return part("varnet").VariationalNetworkModel(coils, cnn, 2)


foreign("monai VariationalNetworkModel", MONAI, monai_varnet, kspace)
foreign("fastMRI Unet", "fastmri.models", lambda m: m.Unet(1, 1, 8, 3), image(1, 33))
foreign("fastMRI VarNet", "fastmri.models", lambda m: m.VarNet(2, 4, 2, 6, 2), kspace)
for backbone in ("resnet18", "convnext_atto", "efficientnet_b0", "mobilenetv3_small_050", "regnetx_002", "densenet121"):
    foreign(f"timm {backbone}", "timm", lambda t, name=backbone: t.create_model(name, num_classes=5), image(3, 64))
for kind in ("Unet", "UnetPlusPlus", "Linknet", "FPN", "PAN", "DeepLabV3Plus", "MAnet"):
    foreign(
        f"smp {kind}",
        "segmentation_models_pytorch",
        lambda s, kind=kind: getattr(s, kind)("resnet18", encoder_weights=None),
        image(3, 128),
    )
foreign("smp Unet, efficientnet, scSE", "segmentation_models_pytorch", lambda s: s.Unet(
    "efficientnet-b0", encoder_weights=None, decoder_attention_type="scse"), image(3, 64))  # fmt: skip


# The oracle


@dataclass
class Row:
    """One network's line of the table."""

    name: str
    package: str
    result: str = ""  # proven | refused | wrong | crash | absent
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    kept: int = 0  # layers that keep their width, output layers not counted
    remark: str = ""

    def __str__(self):
        change = lambda pair: f"{pair[0]:,} → {pair[1]:,}" if self.result in ("proven", "wrong") else ""
        cells = (
            self.name,
            self.package,
            self.result,
            change(self.parameters),
            change(self.macs),
            f"{self.seconds:.1f}",
        )
        return "| " + " | ".join((*cells, self.remark.replace("|", "/").replace("\n", " "))) + " |"


HEAD = "| network | package | result | parameters | multiply-accumulates | s | remark |\n|---|---|---|--:|--:|--:|---|"


def randomise(model):
    """Random values for what starts at 0 or 1, such as norms: no channel equals another or has no effect."""
    for m in model.modules():
        if isinstance(m, pruning.PRUNABLE):
            m.weight.data *= 2  # signals keep their size
        for name, value in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]:
            if value.is_floating_point() and value.numel() > 1 and value.flatten().eq(value.flatten()[0]).all():
                if name in ("weight", "running_var", "gamma", "beta"):
                    value.data.uniform_(0.5, 1.5)
                elif name in ("bias", "running_mean") or isinstance(value, nn.Parameter):
                    value.data.uniform_(-0.2, 0.2)


def positions(before, after):
    """For each axis, which indices of the tensor `before` are in its part `after`: found by their values."""
    if before.ndim == 1:  # in order
        values, kept = iter(enumerate(before.tolist())), []
        for value in after.tolist():
            kept.append(next((i for i, v in values if abs(v - value) <= 1e-6 * abs(value)), -1))
        assert min(kept) >= 0, f"a part of {len(after)} is not found in {len(before)} numbers"
        return [kept]
    for digits in (None, 1e5):  # exact, then rounded: a folded weight norm changes the last digits
        values = [t if digits is None else (t * digits / before.abs().max()).round() for t in (before, after)]
        all_of, part = (v.numpy(force=True).ravel() for v in values)
        unique, first, count = np.unique(all_of, return_index=True, return_counts=True)
        place = np.searchsorted(unique, part).clip(max=len(unique) - 1)
        small = np.flatnonzero((unique[place] == part) & (count[place] == 1))
        found = []
        for axis, length in enumerate(after.shape):
            i = np.unravel_index(small, after.shape)[axis]
            j = np.unravel_index(first[place[small]], before.shape)[axis]
            votes = np.zeros((length, before.shape[axis]), dtype=np.int64)
            np.add.at(votes, (i, j), 1)
            found.append(votes.argmax(1) if votes.any(1).all() else [0, 0])
        if all(len(set(f)) == n for f, n in zip(found, after.shape)):
            return [sorted(map(int, f)) for f in found]
    raise AssertionError(f"a part of shape {tuple(after.shape)} is not found in {tuple(before.shape)}")


def plain(model):
    """A copy without the normalisation of weights: weight norms folded, spectral norms (across channels) left out."""
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        for norm in list(getattr(layer, "parametrizations", {}).values()):
            layer.__class__ = type(type(layer).__name__, type(layer).__bases__, dict(vars(type(layer))))
            folded = type(norm[0]).__name__ != "_SpectralNorm"
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=folded)
    return copied


@torch.no_grad()
def zeroed(teacher, student):
    """A copy of the teacher in which all that the student lacks is 0, axis by axis of each of its tensors."""
    copied = copy.deepcopy(teacher)
    small = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    for name, value in [*copied.named_parameters(), *copied.named_buffers()]:
        part = small.get(name)
        if part is None or part.shape == value.shape or not value.is_floating_point() and not value.is_complex():
            continue
        for axis, kept in enumerate(positions(value, part)):
            gone = [i for i in range(value.shape[axis]) if i not in set(kept)]
            if not name.endswith("running_var"):
                value.transpose(0, axis)[gone] = 0
    return copied


TOLERANCE = 1e-5  # rounding, also in single precision
ACROSS = ("GroupNorm", "LayerNorm", "LayerNorm2d", "LocalResponseNorm", "RMSNorm", "GroupNormAct", "LayerNormAct")


def outputs(model, inputs):
    """All tensors that a model returns, norms across channels left out, in evaluation mode."""
    transparent = lambda m, args, output: args[0] if type(m).__name__ in ACROSS else None
    args, keywords = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    torch.manual_seed(1)
    with torch.no_grad(), nn.modules.module.register_module_forward_hook(transparent):
        return pruning.tensors_of(model.eval()(*args))


def fresh(inputs):
    """Other inputs of the same shapes; masks, integers and objects stay."""
    if isinstance(inputs, (tuple, list)):
        return tuple(map(fresh, inputs))
    if not isinstance(inputs, torch.Tensor) or inputs.dtype in (torch.bool, torch.int64) or inputs.numel() < 2:
        return inputs
    return (
        inputs
        if as_real(inputs).unique().numel() <= 2
        else inputs + 0.5 * inputs.abs().mean() * torch.randn_like(inputs)
    )


def double(value):
    """A copy in double precision: of a tensor, of a module, or of all of them in a tuple."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value)._apply(double)
    if isinstance(value, (tuple, list)):
        return type(value)(map(double, value))
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.detach().to(torch.complex128 if value.is_complex() else torch.float64)


def difference(teacher, student, inputs):
    """(error, change), relative to the largest output on fresh inputs, in double precision where the network allows it.

    The error is that of the student against the teacher with zero filters; the change is what the zeros make."""
    teacher, student = plain(teacher), plain(student)
    models, inputs, results = (teacher, zeroed(teacher, student), student), fresh(inputs), None
    try:
        results = [outputs(double(m), double(inputs)) for m in models]
    except RuntimeError:  # a number type is fixed in the network
        results = [outputs(copy.deepcopy(m), inputs) for m in models]
    error = change = 0.0
    for a, b, c in zip(*results):
        assert b.shape == c.shape, f"output {tuple(b.shape)} became {tuple(c.shape)}"
        if b.is_floating_point() or b.is_complex():
            assert b.isfinite().all() and c.isfinite().all(), "an output is not finite"
            scale = max(b.abs().max().item(), 1e-30)
            error = max(error, (b - c).abs().max().item() / scale)
            change = max(change, min((a - b).nan_to_num(nan=1e30).abs().max().item() / scale, 1.0))
    return error, change


def judge(name, ratio=0.4, limit=120):
    """Build and prune one network, and compare: its line of the table; at most `limit` seconds."""
    build, package = ZOO[name]
    row, began = Row(name, package), time.perf_counter()
    torch.manual_seed(0)
    try:
        model, inputs = build()
    except ImportError as error:
        row.result, row.remark = "absent", str(error)
        return row
    except Exception as error:
        row.result, row.remark = "broken", str(error)
        return row
    randomise(model.eval())
    before = copy.deepcopy(model.state_dict())

    def late(*_):
        raise TimeoutError(f"no answer within {limit} s")

    try:
        signal.signal(signal.SIGALRM, late)
        signal.alarm(limit)
        found = pruning.find_priors(model, inputs)
        student = pruning.prune(model, ratio, found)
        report = student.pruning_report
        row.parameters = (report.parameters_before, report.parameters_after)
        row.macs, row.seconds = (report.macs_before, report.macs_after), time.perf_counter() - began
        error, change = difference(model, student, inputs)
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        fine = error <= TOLERANCE and change > 100 * error and same
        row.result = "proven" if fine and row.parameters[1] < row.parameters[0] else "wrong"
        row.kept = sum(why not in ("in ignored_layers", "its channels are an output") for why in report.kept.values())
        row.remark = f"error {error:.0e}, change {change:.0e}" + ("" if same else ", teacher changed")
        row.remark += f", {row.kept} layers keep their width" if row.kept else ""
    except (ValueError, TypeError) as error:
        row.result, row.remark = "refused", " ".join(str(error).split())
    except AssertionError as error:  # of the oracle
        row.result, row.remark = "wrong", str(error)
    except Exception as error:
        row.result, row.remark = "crash", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.alarm(0)
    row.seconds = row.seconds or time.perf_counter() - began
    return row


def summary(rows):
    """One line: how many of each result."""
    ran = [r for r in rows if r.result != "absent"]
    count = {k: sum(r.result == k for r in ran) for k in ("proven", "refused", "wrong", "crash")}
    share = count["proven"] / max(len(ran), 1)
    return f"{len(ran)} networks: {share:.0%} pruned; " + ", ".join(f"{n} {k}" for k, n in count.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    words = [w.lower() for w in sys.argv[1:]]
    print(HEAD)
    rows = []
    for name in ZOO:
        if not words or any(w in f"{name} {ZOO[name][1]}".lower() for w in words):
            rows.append(judge(name))
            print(rows[-1], flush=True)
    print("\n" + summary(rows))
