"""Networks that nobody here has written: pruned exactly, or refused in one sentence whose advice works."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from spade import pruning
from spade.basics import Batch
from spade.models import DEQ
from spade.pruning import explain, prune

N = 16
conv = lambda a, b, size=3, **kw: nn.Conv2d(a, b, size, padding=size // 2, **kw)


class Net(nn.Module):
    """Named layers and a forward function `f(net, *inputs)`."""

    def __init__(self, f, **layers):
        super().__init__()
        self.f = f
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs, **keywords):
        return self.f(self, *inputs, **keywords)


def image(channels=1, size=8):
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))


def zero(layer, channels, side="out"):
    """Set filters of one side of a layer to zero."""
    with torch.no_grad():
        transposed = isinstance(layer, nn.ConvTranspose2d)
        axis = 1 if isinstance(layer, nn.Embedding) else int((side == "in") != transposed)
        layer.weight.transpose(0, axis)[channels] = 0
        if side == "out" and getattr(layer, "bias", None) is not None:
            layer.bias[channels] = 0


def widths(student):
    return {n: getattr(m, "out_channels", getattr(m, "out_features", 0)) for n, m in student.named_modules() if n}


def film(n=N):
    def forward(net, x, sigma):
        scale, shift = net.embed(sigma.view(-1, 1)).chunk(2, dim=1)
        return net.c(torch.relu(net.b(torch.relu(net.a(x))) * (1 + scale[..., None, None]) + shift[..., None, None]))

    return Net(forward, embed=nn.Linear(1, 2 * n), a=conv(1, n), b=conv(n, n), c=conv(n, 1)).eval()


def test_scale_and_shift_of_one_linear_layer_are_cut_together():
    torch.manual_seed(0)
    net, x, gone = film(), (image(size=16), torch.tensor([0.1])), [0, 2, 3, 7, 9, 12, 15]
    for layer, channels in ((net.b, gone), (net.embed, gone + [k + N for k in gone])):
        zero(layer, channels)
    zero(net.c, gone, "in")
    zero(net.a, gone)
    zero(net.b, gone, "in")
    student = prune(net, 0.40, [(net, x, [net.c])])
    assert (student.a.out_channels, student.b.out_channels, student.embed.out_features) == (9, 9, 18)
    removed = {g.name: g.removed for g in student.pruning_report.groups}
    assert removed["embed"] == tuple(gone + [k + N for k in gone]) and removed["a"] == tuple(gone)
    assert torch.allclose(student(*x), net(*x), atol=1e-6)


@pytest.mark.parametrize(
    "f, out, width",
    [
        (lambda h: torch.maximum(*h.chunk(2, 1)), 8, 8),
        (lambda h: F.glu(h, 1), 8, 8),
        (lambda h: (lambda a, b: a * b.sigmoid())(*h.chunk(2, 1)), 8, 8),
        (lambda h: h.flip(1), 16, 9),
        (lambda h: F.pixel_shuffle(h, 2), 4, 8),
        (lambda h: F.pixel_unshuffle(h, 2), 64, 9),
        (lambda h: torch.cat([h, h.flip(1)], 1), 32, 9),
        (lambda h: torch.cat([torch.ones_like(h[:, :3]), h], 1), 19, 9),
        (lambda h: torch.cat(h.chunk(2, 1)[::-1], 1), 16, 9),
        (lambda h: sum(h.chunk(4, 1)), 4, 8),
        (lambda h: h * h.amax(1, keepdim=True).sigmoid(), 16, 9),
    ],
    ids="maxout glu gate flip shuffle unshuffle twice shifted swapped quarters spatial_gate".split(),
)
def test_channels_that_change_places(f, out, width):
    torch.manual_seed(0)
    net = Net(lambda net, x: net.c(f(net.a(x).relu())), a=conv(1, N, bias=False), c=conv(out, 1)).eval()
    student = prune(net, 0.40, [(net, image(), [net.c])])
    (group,) = student.pruning_report.groups
    assert (group.before, group.after, student.a.out_channels) == (N, width, width)
    zero(net.a, list(group.removed))  # zero channels leave without a trace: no other end had to be touched
    assert torch.allclose(student(image(size=12)), net(image(size=12)), atol=1e-6)


def test_pixel_shuffle_loses_four_channels_at_a_time():
    net = nn.Sequential(conv(3, N), nn.ReLU(), conv(N, 4 * N), nn.PixelShuffle(2), conv(N, 3)).eval()
    student = prune(net, 0.40, [(net, torch.zeros(1, 3, 8, 8), [net[4]])])
    assert (student[0].out_channels, student[2].out_channels, student[4].in_channels) == (9, 36, 9)
    assert [g.removed[i : i + 4] for g in student.pruning_report.groups[:1] for i in range(0, 28, 4)] == [
        tuple(range(4 * k, 4 * k + 4)) for k in sorted({c // 4 for c in student.pruning_report.groups[0].removed})
    ]


def test_channel_shuffle_by_views():
    def shuffle(h):
        b, c, *size = h.shape
        return h.view(b, 2, c // 2, *size).transpose(1, 2).reshape(b, c, *size)

    net = Net(lambda net, x: net.c(shuffle(net.a(x))), a=conv(1, N), c=conv(N, 1)).eval()
    with pytest.raises(ValueError, match="add 'a' to ignored_layers|no layer can be cut"):
        prune(net, 0.40, [(net, image(), [net.c])])


@pytest.mark.parametrize("ends", [(0.5, 8), (0.40, 9)])
def test_rolled_channels_are_refused(ends):
    net = Net(lambda net, x: net.c(net.b(net.a(x).roll(1, 1))), a=conv(1, N), b=conv(N, N), c=conv(N, 1)).eval()
    zero(net.a, [N - 1])  # without its last channel, the others change their order
    with pytest.raises(ValueError, match="'a': its output differs by .* add 'a' to ignored_layers"):
        prune(net, ends[0], [(net, image(), [net.c])])
    assert prune(net, ends[0], [(net, image(), [net.c, net.a])]).b.out_channels == ends[1]


def test_embedding_is_ranked_by_its_columns():
    f = lambda net, x, t: net.b(torch.relu(net.a(x) + net.e(t)[:, :, None, None]))
    for steps in (1000, 10):  # fewer rows than channels, too
        net = Net(f, e=nn.Embedding(steps, N), a=conv(1, N), b=conv(N, 1)).eval()
        with torch.no_grad():
            net.e.weight[:], net.e.weight[:, :7] = 0, 100.0
        student = prune(net, 0.40, [(net, (image(), torch.tensor([1])), [net.b])])
        assert student.e.embedding_dim == 9 and not set(student.pruning_report.groups[0].removed) & set(range(7))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("stages", [3, 4, 6, N])
def test_a_vector_of_scales_keeps_its_length(stages, zipped):
    def forward(net, x):
        h = net.head(x)
        for scale, layer in zip(net.scale, net.body) if zipped else ((net.scale[i], b) for i, b in enumerate(net.body)):
            h = h + scale * torch.relu(layer(h))
        return net.tail(h)

    layers = dict(head=conv(1, N), body=nn.ModuleList(conv(N, N) for _ in range(stages)), tail=conv(N, 1))
    net = Net(forward, scale=nn.Parameter(torch.full((stages,), 0.5)), **layers).eval()
    student = prune(net, 0.25, [(net, image(), [net.tail])])
    assert len(student.scale) == stages and student.head.out_channels == 12


def test_a_bare_parameter_per_channel_is_cut():
    f = lambda net, x: net.b(net.a(x) * net.scale[None, :, None, None] + net.shift)
    net = Net(
        f, a=conv(1, N), b=conv(N, 1), scale=nn.Parameter(torch.randn(N)), shift=nn.Parameter(torch.randn(N, 1, 1))
    )
    student = prune(net, 0.40, [(net, image(), [net.b])])
    kept = [k for k in range(N) if k not in student.pruning_report.groups[0].removed]
    assert torch.equal(student.scale, net.scale[kept]) and torch.equal(student.shift, net.shift[kept])


@pytest.mark.parametrize("act", [nn.PReLU(), nn.PReLU(8), nn.LeakyReLU(0.25)], ids=["one", "eight", "leaky"])
def test_prelu_before_a_concatenation(act):
    def forward(net, x):
        h = net.act(net.a(x))
        return net.c(torch.cat([h, net.act(net.b(h))], 1))

    net = Net(forward, act=act, a=conv(1, 8), b=conv(8, 8), c=conv(16, 1)).eval()
    student = prune(net, 0.25, [(net, image(), [net.c])])
    assert (student.a.out_channels, student.b.out_channels, student.c.in_channels) == (6, 6, 12)
    assert student.act.weight.requires_grad if isinstance(act, nn.PReLU) else True


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_weight_norm_is_folded_and_put_back(norm):
    net = nn.Sequential(norm(conv(1, 8)), nn.ReLU(), norm(conv(8, 8)), nn.ReLU(), conv(8, 1)).eval()
    with torch.no_grad():
        expected, state = net(image()), {k: v.clone() for k, v in net.state_dict().items()}
    student = prune(net, 0.25, [(net, image(), [net[4]])])
    assert student[2].weight.shape == (6, 6, 3, 3) and student.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(net(image()), expected) and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    student(image()).sum().backward()
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"])
@pytest.mark.filterwarnings("ignore:.*spectral_norm")
def test_spectral_norm_is_refused_and_the_advice_works(norm):
    net = nn.Sequential(norm(conv(1, 8)), nn.ReLU(), conv(8, 1)).eval()
    with pytest.raises(ValueError, match="Conv2d '0', whose weight is computed by .*SpectralNorm; remove the param"):
        prune(net, 0.25, [(net, image(), [net[2]])])
    if parametrize.is_parametrized(net[0]):
        parametrize.remove_parametrizations(net[0], "weight")
    else:
        nn.utils.remove_spectral_norm(net[0])
    assert prune(net, 0.25, [(net, image(), [net[2]])])[0].out_channels == 6


def test_an_unused_layer_is_left_alone():
    net = Net(lambda net, x: net.b(torch.relu(net.a(x))), a=conv(1, N), b=conv(N, 1), unused=conv(N, N)).eval()
    for ignored in ([net.b], [net.b, net.unused]):
        student = prune(net, 0.40, [(net, image(), ignored)])
        assert student.a.out_channels == 9 and torch.equal(student.unused.weight, net.unused.weight)
        assert student.pruning_report.kept["unused"] in ("not used for the example", "in ignored_layers")


def test_a_weight_used_without_its_layer_is_refused():
    f = lambda net, x: net.c(F.conv2d(net.a(x), net.b.weight, padding=1))
    net = Net(f, a=conv(1, N), b=conv(N, N), c=conv(N, 1)).eval()
    with pytest.raises(
        ValueError, match="cannot be pruned as it is: layer 'a': .*in ignored_layers|no layer can be cut"
    ):
        prune(net, 0.40, [(net, image(), [net.c])])


def test_a_hidden_norm_is_refused_and_the_advice_works():
    f = lambda net, x: net.c(net.b(F.relu(net.norm(net.a(x)), inplace=True)))
    net = Net(f, a=conv(1, N), norm=nn.InstanceNorm2d(N), b=conv(N, N), c=conv(N, 1)).eval()
    with pytest.raises(ValueError, match="layer 'a': .*; add 'a' to ignored_layers"):
        prune(net, 0.40, [(net, image(), [net.c])])
    assert prune(net, 0.40, [(net, image(), [net.c, net.a])]).b.out_channels == 9


def test_nothing_to_prune():
    f = lambda net, x: x + F.conv2d(F.relu(F.conv2d(x, net.d, padding=1)), net.g, padding=1)
    net = Net(f, d=nn.Parameter(torch.randn(N, 1, 3, 3)), g=nn.Parameter(torch.randn(1, N, 3, 3)))
    with pytest.raises(ValueError, match=r"no layer can be cut: its weights are bare parameters \(d, g\)"):
        prune(net, 0.40, [(net, image(), [])])
    chain = nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 1))
    with pytest.raises(ValueError, match="no layer can be cut: '0' is in ignored_layers; '2' is in ignored_layers"):
        prune(chain, 0.40, [(chain, image(), [chain])])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_example_is_cast_to_the_models_precision(dtype):
    net = nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 1)).to(dtype)
    assert prune(net, 0.25, [(net, image(), [net[2]])])[0].weight.dtype == dtype


def test_examples_with_numbers_none_and_keywords():
    f = lambda net, x, sigma, mask=None, power=1: net.b(torch.relu(net.a(x * sigma**power)))
    net = Net(f, a=conv(1, N), b=conv(N, 1)).eval()
    for example in ((image(), 0.1, None), dict(x=image(), sigma=0.1, mask=None, power=2)):
        assert prune(net, 0.40, [(net, example, [net.b])]).a.out_channels == 9


def test_outputs_may_be_tuples_or_dictionaries():
    for pack in (lambda y, h: (y, h), lambda y, h: {"y": y, "features": [h]}):
        net = Net(
            lambda net, x: pack(net.c(net.b(net.a(x))), net.b(net.a(x))), a=conv(1, N), b=conv(N, 4), c=conv(4, 1)
        )
        with pytest.raises(ValueError, match="layer 'b': its output changes .* add 'b' to ignored_layers"):
            prune(net, 0.40, [(net, image(), [net.c])])
        assert prune(net, 0.40, [(net, image(), [net.c, net.b])]).a.out_channels == 9


def test_what_a_forward_raises_becomes_a_sentence():
    def forward(net, x):
        h = net.a(x)
        assert h.shape[1] == N, "input feature has wrong size"
        return net.c(net.b(torch.relu(h)))

    net = Net(forward, a=conv(1, N), b=conv(N, N), c=conv(N, 1))
    with pytest.raises(
        ValueError, match="layer 'a': it does not run .*AssertionError: input feature.*; add 'a' to ign"
    ):
        prune(net, 0.25, [(net, image(), [net.c])])
    assert prune(net, 0.25, [(net, image(), [net.c, net.a])]).b.out_channels == 12


def test_all_conflicts_are_listed_at_once_and_the_advice_works():
    def forward(net, x):
        h = net.b(net.a(x).flip(1).roll(1, 1) + torch.arange(N)[: net.a.out_channels, None, None])
        return net.d(net.c(h.view(len(h), 4, 4, *h.shape[2:]).flatten(1, 2)))

    net = Net(forward, a=conv(1, N), b=conv(N, N), c=conv(N, N), d=conv(N, 2)).eval()
    sentence = explain(net, (image(),), [], 0.40, True)
    assert sentence.count("layer '") == 3 and sentence.count("\n") == 0
    assert sentence.endswith("add 'd', 'b', 'a' to ignored_layers"), sentence
    assert prune(net, 0.40, [(net, image(), [net.d, net.b, net.a])]).c.out_channels == 9


def test_a_mean_over_channels_is_refused():
    net = Net(lambda net, x: net.b(torch.relu(net.a(x))).mean(1, keepdim=True), a=conv(1, N), b=conv(N, N)).eval()
    with pytest.raises(ValueError, match="layer 'b': its output differs by .* add 'b' to ignored_layers"):
        prune(net, 0.40, [(net, image(), [])])
    assert prune(net, 0.40, [(net, image(), [])], check=False).b.out_channels == 9  # at the caller's risk


def test_a_gate_of_one_channel():
    f = lambda net, x: net.c(net.a(x) * torch.sigmoid(net.norm(net.gate(net.a(x)))))
    net = Net(f, a=conv(1, N), gate=conv(N, 1), norm=nn.BatchNorm2d(1), c=conv(N, 1)).eval()
    student = prune(net, 0.40, [(net, image(), [net.c])])
    assert (student.a.out_channels, student.gate.in_channels, student.gate.out_channels) == (9, 9, 1)
    assert student.pruning_report.kept["gate"] == "one channel"


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_takes_the_next_even_width(groups):
    net = nn.Sequential(conv(1, N), nn.GroupNorm(groups, N), nn.ReLU(), conv(N, 1)).eval()
    student = prune(net, 0.40, [(net, image(), [net[3]])])
    assert student[0].out_channels == student[1].num_channels == 9 - 9 % groups


@pytest.mark.parametrize("norm", [nn.LayerNorm(N), nn.LayerNorm(N, elementwise_affine=False)])
def test_layer_norm_of_channels_last(norm):
    f = lambda net, x: net.c(net.norm(net.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    net = Net(f, a=conv(1, N), norm=norm, c=conv(N, 1)).eval()
    assert prune(net, 0.40, [(net, image(), [net.c])]).norm.normalized_shape == (9,)


def test_statistics_of_an_instance_norm_are_cut():
    net = nn.Sequential(conv(1, N), nn.InstanceNorm2d(N, track_running_stats=True), conv(N, 1)).eval()
    net[1].running_mean.copy_(torch.arange(N))
    student = prune(net, 0.40, [(net, image(), [net[2]])])
    kept = [k for k in range(N) if k not in student.pruning_report.groups[0].removed]
    assert student[1].running_mean.tolist() == kept and len(student[1].running_var) == 9


def test_a_function_that_encloses_a_layer_is_refused():
    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = cnn = nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 1))
            self.denoise = lambda x: cnn(x)

        def forward(self, y, A):
            return self.denoise(y)

    net = Closed()
    with pytest.raises(ValueError, match="'denoise' of Closed must not be a function that encloses a layer"):
        prune(net, 0.25, [(net.cnn, image(), [net.cnn[2]])])
    net.denoise = lambda x, f=net.cnn.forward: f(x)
    with pytest.raises(ValueError, match="'denoise' of Closed must not be a function that encloses a layer"):
        prune(net, 0.25, [(net.cnn, image(), [net.cnn[2]])])
    net.denoise = net.cnn.forward  # a method is copied with its object
    student = prune(net, 0.25, [(net.cnn, image(), [net.cnn[2]])])
    batch = Batch(image(), nn.Identity(), None, {})
    assert not torch.equal(student(batch.y, batch.A), net(batch.y, batch.A))


def test_a_remembered_tensor_is_copied_and_a_lock_is_named():
    net = Net(lambda net, y: net.cnn(y), cnn=nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 1)))
    net.last = [net(image())]  # not a leaf
    student = prune(net, 0.25, [(net.cnn, image(), [net.cnn[2]])])
    assert torch.equal(student.last[0], net.last[0]) and net.last[0].grad_fn is not None
    net.cnn.lock = threading.Lock()
    with pytest.raises(ValueError, match="'cnn.lock' of Net must be copyable, got TypeError"):
        prune(net, 0.25, [(net.cnn, image(), [net.cnn[2]])])


def test_priors_that_are_modules_are_no_method():
    net = Net(lambda net, x: x, priors=nn.ModuleList([conv(1, 1)]))
    with pytest.raises(TypeError, match=r"has no priors\(\) that names its CNNs; pass priors="):
        prune(net, 0.25)


def test_a_time_limit_ends_the_search(monkeypatch):
    monkeypatch.setattr(pruning, "TIME_LIMIT", 0.0)
    net = nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 1))
    with pytest.raises(ValueError, match="its layer groups were not found within 0 s; name smaller CNNs in priors"):
        prune(net, 0.25, [(net, image(), [net[2]])])


def test_an_example_that_does_not_fit():
    net = nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 1))
    with pytest.raises(ValueError, match="Sequential must run with its example, got RuntimeError: Given groups=1"):
        prune(net, 0.25, [(net, image(3), [net[2]])])


def test_the_report_is_short_and_says_what_stayed():
    net = Net(lambda net, x: net.d(net.a(x) + net.c(net.b(x))), a=conv(1, N), b=conv(1, N), c=conv(N, N), d=conv(N, 1))
    report = prune(net, 0.40, [(net, image(), [net.d, net.a])]).pruning_report
    assert repr(report) == str(report) and len(repr(report)) < 150
    assert report.kept == {"a": "in ignored_layers", "d": "in ignored_layers", "c": "tied to a"}


def test_a_grouped_convolution_is_refused_by_name():
    net = nn.Sequential(conv(1, N), conv(N, N, groups=4), conv(N, N), conv(N, 1)).eval()
    with pytest.raises(ValueError, match="add .*'0'.* to ignored_layers"):
        prune(net, 0.40, [(net, image(), [net[3]])])


def test_noise_is_the_same_in_both_passes_and_the_callers_state_comes_back():
    net = Net(lambda net, x: net.b(torch.relu(net.a(x + 0.1 * torch.randn_like(x)))), a=conv(1, N), b=conv(N, 1))
    state = torch.random.get_rng_state()
    assert prune(net, 0.40, [(net, image(), [net.b])]).a.out_channels == 9
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_norm_of_ones_own_over_channels_needs_check_false():
    f = lambda net, x: net.b((h := net.a(x)) / h.std(1, keepdim=True))
    net = Net(f, a=conv(1, N), b=conv(N, 1)).eval()
    with pytest.raises(ValueError, match="layer 'a': its output differs"):
        prune(net, 0.40, [(net, image(), [net.b])])
    assert prune(net, 0.40, [(net, image(), [net.b])], check=False).a.out_channels == 9


def test_the_paper_networks_with_and_without_the_check():
    teacher = DEQ(features=16, num_blocks=2)
    students = [prune(teacher, 0.40, check=check) for check in (True, False)]
    assert students[0].pruning_report.groups == students[1].pruning_report.groups
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters()))
