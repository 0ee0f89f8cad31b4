"""Fixed points: independent oracles, the gradient of eq. 4, memory, divergence, batches."""

import math
import warnings

import numpy as np
import pytest
import torch

from spade.basics import tensor_float_32
from spade.config import load_config
from spade.examples import brain
from spade.models import DEQ, DivergenceError
from spade.models.deq import anderson_mix, attach_gradient, contraction_rate, fixed_point, spectral_radius, target_term
from spade.operators import MultiCoilMRI
from spade.runs import Run, load_teacher, shipped_teacher


def problem(batch=1, size=8, coils=2, dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, 1, 1, size, generator=generator) < 0.5
    mask[..., size // 2] = True
    maps = torch.randn(batch, coils, size, size, dtype=dtype, generator=generator)
    A = MultiCoilMRI(mask, maps / maps.abs().square().sum(dim=1, keepdim=True).sqrt())
    return A(torch.randn(batch, 1, size, size, dtype=dtype, generator=generator)), A


def tiny(**settings) -> DEQ:
    torch.manual_seed(0)
    return DEQ(
        **dict(features=4, num_blocks=1, tolerance=1e-13, backward_tolerance=1e-13, max_iterations=400) | settings
    ).double()


def loss_of(x):
    return (x.real - 0.3).square().sum() + x.imag.pow(3).sum()


# --- the search ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1, 2, 5])
def test_scalar_fixed_point_against_bisection(memory):
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.cos(middle) > middle else (low, middle)
    _, answer, trace = fixed_point(torch.cos, torch.zeros(1, 1, dtype=torch.float64), memory, tolerance=1e-12)
    assert trace.converged and abs(answer.item() - low) < 1e-11


def test_plain_trace_is_the_papers_rule_by_hand():
    "Recomputed with numpy: x ← cos x from 0, stop when |x_{k+1} - x_k| / |x_{k+1}| < 1e-4."
    x, residuals = 0.0, []
    while not residuals or residuals[-1] >= 1e-4:
        x, previous = np.cos(x), x
        residuals.append(abs(x - previous) / abs(x))
    _, answer, trace = fixed_point(torch.cos, torch.zeros(1, 1, dtype=torch.float64), memory=1)
    np.testing.assert_allclose([r.item() for r in trace.residuals], residuals, rtol=1e-10)
    assert trace.iterations == len(residuals) == len(trace.seconds) and answer.item() == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize("memory", [1, 5])
def test_linear_fixed_point_against_a_dense_solve(memory):
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((6, 6))
    matrix *= 0.8 / np.linalg.norm(matrix, 2)
    offset = rng.standard_normal(6)
    exact = np.linalg.solve(np.eye(6) - matrix, offset)
    _, answer, _ = fixed_point(
        lambda x: x @ torch.from_numpy(matrix).T + torch.from_numpy(offset),
        torch.zeros(1, 6, dtype=torch.float64),
        memory,
        300,
        1e-12,
    )
    np.testing.assert_allclose(answer[0].numpy(), exact, rtol=1e-9)


def test_anderson_is_faster_and_mixes_by_least_squares():
    rate = torch.linspace(0.5, 0.98, 20, dtype=torch.float64)
    runs = {
        memory: fixed_point(lambda x: rate * x + 1, torch.zeros(1, 20, dtype=torch.float64), memory, 2000, 1e-8)[
            2
        ].iterations
        for memory in (1, 5)
    }
    assert runs[5] < runs[1] / 4
    generator = torch.Generator().manual_seed(0)
    xs, gs = torch.randn(2, 4, 1, 7, dtype=torch.float64, generator=generator)
    residuals = (gs - xs)[:, 0].numpy()
    theta = np.linalg.lstsq((residuals[1:] - residuals[:-1]).T, residuals[-1], rcond=None)[0]
    expected = gs[-1, 0].numpy() - (gs[1:, 0] - gs[:-1, 0]).numpy().T @ theta
    np.testing.assert_allclose(anderson_mix(list(xs), list(gs))[0].numpy(), expected, rtol=1e-6)


def test_anderson_treats_complex_images_as_real_vectors():
    generator = torch.Generator().manual_seed(0)
    xs, gs = torch.randn(2, 3, 1, 5, dtype=torch.complex128, generator=generator)
    real = anderson_mix([torch.view_as_real(x) for x in xs], [torch.view_as_real(g) for g in gs])
    torch.testing.assert_close(torch.view_as_real(anderson_mix(list(xs), list(gs))), real)


@pytest.mark.parametrize("memory", [1, 5])
def test_an_image_does_not_depend_on_its_batch(memory):
    rates = torch.tensor([[0.1], [0.6], [0.97]], dtype=torch.float64)
    _, together, trace = fixed_point(
        lambda x: rates * torch.sin(x) + 1, torch.zeros(3, 4, dtype=torch.float64), memory, 500
    )
    for row in range(3):
        alone = fixed_point(
            lambda x: rates[row] * torch.sin(x) + 1, torch.zeros(1, 4, dtype=torch.float64), memory, 500
        )[1]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=0)
    assert trace.residuals[0].shape == (3,)


def test_a_point_at_rest_takes_one_iteration():
    _, answer, trace = fixed_point(lambda x: x, torch.zeros(2, 3))
    assert trace.iterations == 1 and trace.converged and not answer.any()


def test_limit_of_iterations_is_kept_and_said():
    _, _, trace = fixed_point(lambda x: 0.999 * x + 1, torch.ones(1, 1), memory=1, max_iterations=20, tolerance=1e-9)
    assert trace.iterations == 20 and not trace.converged
    with pytest.raises(ValueError, match="at least 1"):
        fixed_point(torch.cos, torch.ones(1, 1), max_iterations=0)


# --- divergence ---------------------------------------------------------------------------------------------


def test_growth_and_nan_are_refused():
    with pytest.raises(DivergenceError, match=r"diverged at iteration \d+: relative step .* try solver"):
        fixed_point(lambda x: 1.5 * x + 1, torch.ones(1, 1), memory=1)
    with pytest.raises(DivergenceError, match="at iteration 1"):
        fixed_point(lambda x: x / 0, torch.ones(1, 1))


def test_an_iteration_that_gains_nothing_is_refused_in_evaluation_only():
    def slowly_out(x):
        return 1.005 * x + 1

    with pytest.raises(DivergenceError, match="iteration 100"):
        fixed_point(slowly_out, torch.ones(1, 1), memory=1)
    assert not fixed_point(slowly_out, torch.ones(1, 1), memory=1, must_progress=False)[2].converged


def test_one_runaway_image_stops_the_batch():
    rates = torch.tensor([[0.5], [3.0]])
    with pytest.raises(DivergenceError):
        fixed_point(lambda x: rates * x + 1, torch.ones(2, 1), memory=1)


@pytest.mark.parametrize("solver", ["plain", "anderson"])
def test_a_runaway_network_raises(solver):
    y, A = problem(size=16)
    model = DEQ(features=4, num_blocks=1, solver=solver).double().eval()
    with torch.no_grad():
        model.denoiser.tail.weight.normal_(std=50.0, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DivergenceError):
        model(y, A)


def test_nan_in_the_measurement_is_named():
    y, A = problem()
    y[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="measurement y must be finite, got NaN or infinity in 1 of 128 values"):
        tiny()(y * A.mask + y, A.with_mask(torch.ones_like(A.mask)))


def test_backward_divergence_says_so():
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    result = attach_gradient(
        lambda x: weight * x + 1, -torch.ones(1, 1, dtype=torch.float64), memory=1
    )  # a repelling fixed point
    with pytest.raises(DivergenceError, match="jacobian-free"):
        result.sum().backward()


def test_limit_of_growth_is_the_callers():
    def slow(x):
        return 0.995 * x + 1  # rests at 200, and starts at 1

    with pytest.raises(DivergenceError, match="times as large"):
        fixed_point(slow, torch.ones(1, 1, dtype=torch.float64))
    _, answer, trace = fixed_point(slow, torch.ones(1, 1, dtype=torch.float64), largest_growth=math.inf)
    assert trace.converged and answer.item() == pytest.approx(200, rel=1e-6)
    with pytest.raises(DivergenceError, match="iteration 1"):  # not finite is refused even so
        fixed_point(lambda x: x / 0, torch.ones(1, 1), largest_growth=math.inf)


# --- the gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["plain", "anderson"])
def test_eq4_against_finite_differences(solver):
    y, A = problem()
    model = tiny(solver=solver)
    loss_of(model(y, A)).backward()
    generator, h = torch.Generator().manual_seed(0), 1e-5
    for name, weight in model.named_parameters():
        direction = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                weight += sign * h * direction
                values.append(loss_of(model(y, A)).item())
        with torch.no_grad():
            weight += h * direction
        expected = (values[0] - values[1]) / (2 * h)
        assert (weight.grad * direction).sum().item() == pytest.approx(expected, rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("memory, iterations", [(5, 100), (1, 4000)])
def test_a_slow_step_has_the_gradient_of_the_closed_form(memory, iterations):
    "T(x) = a x + b rests at b / (1 - a): with a = 0.995 and b = 1, dx/db = 200 and dx/da = 40000."
    a, b = (torch.full((1, 1), value, dtype=torch.float64, requires_grad=True) for value in (0.995, 1.0))
    start, settings = torch.full((1, 1), 200.0, dtype=torch.float64), dict(max_iterations=iterations, tolerance=1e-9)
    result = attach_gradient(lambda x: a * x + b, start, memory=memory, **settings)
    by_a, by_b = torch.autograd.grad((0.25 * result).sum(), (a, b))
    assert by_b.item() == pytest.approx(0.25 * 200, rel=1e-6) and by_a.item() == pytest.approx(0.25 * 40_000, rel=1e-6)


def test_eq4_against_unrolled_iterations():
    y, A = problem(batch=2)
    y.requires_grad_()
    model = tiny()
    found = torch.autograd.grad(loss_of(model(y, A)), [y, *model.parameters()])
    x = A.adjoint(y)
    for _ in range(400):
        x = model.step(x, y, A)
    expected = torch.autograd.grad(loss_of(x), [y, *model.parameters()])
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_jacobian_free_is_one_application():
    y, A = problem()
    model = tiny(gradient="jacobian-free")
    found = torch.autograd.grad(loss_of(model(y, A)), list(model.parameters()))
    with torch.no_grad():
        x = model.search(y, A)[0]
    expected = torch.autograd.grad(loss_of(model.step(x, y, A)), list(model.parameters()))
    model.gradient = "implicit"
    exact = torch.autograd.grad(loss_of(model(y, A)), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(found, exact))


@pytest.mark.parametrize("gradient", ["implicit", "jacobian-free"])
def test_memory_does_not_grow_with_iterations(gradient):
    y, A = problem(size=16)

    def saved_bytes(iterations: int) -> int:
        sizes = []
        model = tiny(gradient=gradient, max_iterations=iterations, tolerance=0.0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
        ):
            model(y, A)
        assert model.last_iterations == iterations
        return sum(sizes)

    assert saved_bytes(5) == saved_bytes(50) > 0


def test_two_backward_passes_accumulate():
    y, A = problem()
    model = tiny()
    for _ in range(2):
        loss_of(model(y, A)).backward()
    twice = model.alpha.grad.clone()
    model.zero_grad()
    loss_of(model(y, A)).backward()
    torch.testing.assert_close(twice, 2 * model.alpha.grad)


# --- the network --------------------------------------------------------------------------------------------


def test_same_answer_with_and_without_gradients():
    y, A = problem(dtype=torch.complex64)
    torch.manual_seed(0)
    model = DEQ(features=4, num_blocks=1)
    with torch.no_grad():
        silent = model(y, A)
    assert torch.equal(model(y, A).detach(), silent)


def test_untrained_paper_size_converges():
    y, A = problem(size=32, coils=3, dtype=torch.complex64)
    torch.manual_seed(0)
    model = DEQ().eval()
    x_hat, trace = model.solve(y, A, record=False)
    assert trace.converged and trace.iterations < 60 and x_hat.isfinite().all() and not trace.images


def test_solve_records_what_figure_2_needs():
    y, A = problem(dtype=torch.complex64)
    torch.manual_seed(0)
    model = DEQ(features=4, num_blocks=1).eval()
    x_hat, trace = model.solve(y, A, record=True)
    assert len(trace.images) == len(trace.residuals) == len(trace.seconds) == trace.iterations == model.last_iterations
    assert torch.equal(trace.images[-1], x_hat) and min(trace.seconds) > 0 and not x_hat.requires_grad
    assert not model.last_trace.images, "the model must not keep a hundred images alive"


def test_step_by_hand():
    y, A = problem()
    model = tiny(alpha=0.3, gamma=0.7)
    x = A.adjoint(y)
    with torch.no_grad():
        z = x - 0.7 * A.adjoint(A(x) - y)
        denoised = model.denoiser(torch.cat([z.real, z.imag], dim=1))
        torch.testing.assert_close(model.step(x, y, A), 0.3 * torch.complex(denoised[:, :1], denoised[:, 1:]) + 0.7 * z)


def test_training_may_be_capped():
    y, A = problem(dtype=torch.complex64)
    model = DEQ(features=4, num_blocks=1, train_iterations=3, tolerance=1e-6)
    model.train()(y, A)
    assert model.last_iterations == 3
    model.eval()(y, A)
    assert model.last_iterations > 3


def test_settings_changed_later_are_in_the_description():
    model = DEQ(features=4, num_blocks=1)
    model.tolerance = 4e-3
    assert model.config()["tolerance"] == 4e-3 and DEQ(**model.config()).tolerance == 4e-3


@pytest.mark.parametrize("settings", [dict(solver="newton"), dict(gradient="exact")])
def test_unknown_choices_are_named(settings):
    with pytest.raises(ValueError, match="choose one of"):
        DEQ(features=2, num_blocks=1, **settings)


@pytest.mark.parametrize("gain", [0.8, 0.5])
def test_restart_is_the_start_of_the_class(gain):
    torch.manual_seed(0)
    model, noise = DEQ(num_blocks=1, gain=gain), torch.randn(1, 2, 16, 16)
    others = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not name.startswith(("denoiser.tail", "denoiser.body.1"))
    }
    with torch.no_grad():
        for layer in (model.denoiser.tail, model.denoiser.body[-1]):
            layer.weight.fill_(1), layer.bias.fill_(1)
        model.reset_parameters()
        assert (model.denoiser(noise) - gain * noise).norm() < 0.15 * noise.norm()
    assert len(others) == 8 and all(torch.equal(model.state_dict()[name], value) for name, value in others.items())


def test_a_memory_of_nothing_is_refused():
    with pytest.raises(ValueError, match="memory must be at least 1, got 100 and 0"):
        fixed_point(lambda x: 0.5 * x, torch.ones(1, 2), memory=0)


# --- convergence --------------------------------------------------------------------------------------------


def test_weight_and_step_size_stay_in_their_intervals():
    y, A = problem()
    model = tiny(alpha=0.25, gamma=1.5)
    assert model.prior_weight.item() == pytest.approx(0.25) and model.step_size.item() == pytest.approx(1.5)
    assert {name for name, p in model.named_parameters() if p.ndim == 0} == {"alpha", "gamma"}
    assert sum(p.numel() for p in DEQ().parameters()) == 999_428
    for value in (-1e3, -20.0, 20.0, 1e3):
        with torch.no_grad():
            model.alpha.fill_(value), model.gamma.fill_(value)
        assert 0 <= model.prior_weight <= 1 and 0 <= model.step_size <= 2
        assert model.step(A.adjoint(y), y, A).isfinite().all()


@pytest.mark.parametrize("settings", [dict(alpha=0.0), dict(alpha=1.0), dict(gamma=2.0), dict(gamma=-0.1)])
def test_weight_and_step_size_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"alpha and gamma must lie in \(0, 1\) and in \(0, 2\), got"):
        DEQ(features=2, num_blocks=1, **settings)


@pytest.mark.parametrize("values", [(0.9, 0.5, 0.1), (-0.8, 0.3, 0.2)])
def test_spectral_radius_against_eigenvalues(values):
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((3, 3))
    matrix = torch.from_numpy(basis @ np.diag(values) @ np.linalg.inv(basis))
    found = spectral_radius(lambda x: x @ matrix.T + 1, torch.zeros(1, 3, dtype=torch.float64), products=200)
    assert found == pytest.approx(max(map(abs, values)), rel=1e-6)


def test_spectral_radius_of_a_complex_pair_and_of_nothing():
    turn = 0.7 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    stretched = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    matrix = stretched @ turn @ stretched.inverse()  # its powers swing, its eigenvalues have modulus 0.7
    found = spectral_radius(lambda x: x @ matrix.T, torch.zeros(1, 2, dtype=torch.float64))
    assert found == pytest.approx(0.7, rel=1e-6)
    assert spectral_radius(lambda x: 0 * x, torch.zeros(1, 2)) < 1e-6


def test_radius_of_the_network_against_the_eigenvalues_of_its_jacobian():
    y, A = problem()
    model = tiny().eval()
    x = model.solve(y, A, record=False)[0]
    step = lambda image: torch.view_as_real(model.step(torch.view_as_complex(image), y, A))
    jacobian = torch.autograd.functional.jacobian(step, torch.view_as_real(x)).reshape(128, 128)
    largest = torch.linalg.eigvals(jacobian).abs().max().item()
    assert model.radius(y, A, x) == pytest.approx(largest, rel=2e-2) and largest < 1


def test_records_of_a_batch():
    rates = torch.tensor([[0.1], [0.6], [0.999]], dtype=torch.float64)
    trace = fixed_point(lambda x: rates * x + 1, torch.zeros(3, 4, dtype=torch.float64), 1, 40)[2]
    rows = trace.rows()
    for rate, row in zip((0.1, 0.6), rows):
        alone = fixed_point(lambda x, rate=rate: rate * x + 1, torch.zeros(1, 4, dtype=torch.float64), 1, 40)[2]
        assert row["iterations"] == alone.iterations and row["converged"] is True and row["relative_step"] < 1e-4
    assert rows[2]["iterations"] == 40 and rows[2]["converged"] is False and rows[2]["relative_step"] > 1e-4


def test_a_search_without_convergence_warns_once_and_only_in_evaluation():
    y, A = problem(dtype=torch.complex64)
    model = DEQ(features=4, num_blocks=1, max_iterations=2)
    model.train()(y, A)
    with pytest.warns(UserWarning, match=r"relative step of the DEQ must fall below 0.0001, got .* in 2 applications"):
        model.eval()(y, A)
    model(y, A)  # a second warning would be an error
    fixed = DEQ(features=4, num_blocks=1, max_iterations=2, tolerance=0.0).eval()
    fixed(y, A)  # a number of iterations by intention
    fine = DEQ(features=4, num_blocks=1).eval()
    fine(y, A)
    assert fine.last_trace.converged


def test_phantom_gradients_are_the_first_terms_of_the_series():
    y, A = problem()
    gradients = {}
    for name, settings in {"free": {}, "one": dict(unrolled=1), "many": dict(unrolled=300)}.items():
        model = tiny(gradient="jacobian-free" if name == "free" else "phantom", **settings)
        gradients[name] = torch.autograd.grad(loss_of(model(y, A)), list(model.parameters()))
    model = tiny()
    exact = torch.autograd.grad(loss_of(model(y, A)), list(model.parameters()))
    for free, one, many, whole in zip(gradients["free"], gradients["one"], gradients["many"], exact):
        assert torch.equal(free, one)
        torch.testing.assert_close(many, whole, rtol=1e-6, atol=1e-9)


# --- the terms for training ---------------------------------------------------------------------------------


def test_rate_along_the_residual_is_that_of_the_slow_mode():
    rates = torch.linspace(0.2, 0.95, 30, dtype=torch.float64)
    step = lambda x: rates * x + 1
    x, answer, _ = fixed_point(step, torch.zeros(2, 30, dtype=torch.float64), 1, 100, 0.0, must_progress=False)
    found = contraction_rate(step, x, answer)
    assert found.shape == (2,) and found == pytest.approx([0.95, 0.95], abs=1e-3)
    rest = torch.ones(1, 3)
    assert contraction_rate(lambda x: 0 * x + 1, rest, rest).item() == 0  # at rest, and without a residual


@pytest.mark.parametrize("gradient", ["jacobian-free", "implicit", "phantom"])
def test_stability_is_zero_for_a_contraction_and_pulls_a_slow_step_back(gradient):
    y, A = problem()
    model = tiny(gradient=gradient, contraction=0.999).train()
    assert model.stability(model(y, A), y, A, A.adjoint(y), torch.dist) == 0
    model.contraction = 0.1
    term = model.stability(model(y, A), y, A, A.adjoint(y), torch.dist)
    term.backward()
    assert term > 0 and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    before = term.item()
    with torch.no_grad():
        for p in model.parameters():
            p.grad is None or p.sub_(1e-3 * p.grad / max(p.grad.norm().item(), 1e-12))
    assert model.stability(model(y, A), y, A, A.adjoint(y), torch.dist).item() < before


def test_target_term_is_zero_only_for_a_step_that_rests_at_the_target():
    target, found = torch.ones(3, 1, 4, 4), torch.zeros(3, 1, 4, 4)
    seen = []
    assert target_term(lambda x: seen.append(x) or torch.ones_like(x), found, target, torch.dist, None) == 0
    share = seen[0][:, 0, 0, 0]
    assert ((share >= -0.5) & (share <= 1)).all() and len(set(share.tolist())) == 3  # one number for each image
    assert target_term(lambda x: x / 2 + 1, found, target, torch.dist, None) > 0


def test_stability_is_nothing_by_default_and_has_the_weight_of_its_second_term():
    y, A = problem()
    model = tiny().train()
    assert model.stability(model(y, A), y, A, A.adjoint(y), torch.dist) == 0
    model = tiny(target_weight=2.0).train()
    x_hat, generator = model(y, A), torch.Generator().manual_seed(0)
    found = model.stability(x_hat, y, A, A.adjoint(y), torch.dist, generator)
    expected = target_term(
        lambda x: model.step(x, y, A), x_hat, A.adjoint(y), torch.dist, torch.Generator().manual_seed(0)
    )
    assert found.item() == pytest.approx(2 * expected.item())


# --- the support of the coil maps ---------------------------------------------------------------------------


def test_the_image_is_zero_outside_the_support_and_one_setting_turns_this_off():
    y, A = problem()
    inside = torch.ones(8, 8, dtype=torch.bool)
    inside[:3], inside[:, 6:] = False, False
    cut = A.with_maps(A.maps * inside)
    model = tiny()
    image = model(cut(A.adjoint(y)), cut)
    assert torch.equal(cut.support[0, 0], inside)
    assert not image[0, 0][~inside].any() and image[0, 0][inside].all()
    model.project = False
    assert model(cut(A.adjoint(y)), cut)[0, 0][~inside].any() and model.config()["project"] is False


def test_the_projection_is_nothing_where_the_maps_cover_the_image():
    y, A = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = [tiny(project=project)(y, A) for project in (False, True)]
    assert A.support.all() and torch.equal(*images)


# --- safeguard, warm start, one image at a time ----------------------------------------------------------------------


def rotation(rate: float, angle: float) -> torch.Tensor:
    """A contraction that turns: the plain iteration spirals in."""
    c, s = math.cos(angle), math.sin(angle)
    return rate * torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


@pytest.mark.parametrize("memory", [1, 2, 5])
def test_the_safeguarded_search_ends_at_the_same_point(memory):
    turn = rotation(0.95, 0.7)
    step = lambda x: x @ turn.T + 0.1 * torch.tanh(x) + 1
    plain = fixed_point(step, torch.zeros(1, 2).double(), 1, 2000, 1e-12)[1]
    x, answer, trace = fixed_point(step, torch.zeros(1, 2).double(), memory, 2000, 1e-12, safeguard=2.0)
    assert trace.converged
    torch.testing.assert_close(answer, plain, rtol=1e-9, atol=0)


def test_a_worse_mixed_iterate_is_replaced_by_the_best_answer(monkeypatch):
    "A mixture that jumps away: without the safeguard the search fails, with it the search is the plain one."
    import spade.models.deq as deq

    far = lambda xs, gs, damping=0.0: gs[-1] + 50.0 * (len(xs) > 1)
    monkeypatch.setattr(deq, "anderson_mix", far)
    step = lambda x: 0.5 * x + 1
    with pytest.raises(DivergenceError):
        fixed_point(step, torch.ones(1, 3).double(), 5, 60, 1e-8)
    x, answer, trace = fixed_point(
        step, torch.ones(1, 3).double(), 5, 200, 1e-4, largest_growth=math.inf, safeguard=2.0
    )
    assert trace.converged and torch.allclose(answer, torch.full((1, 3), 2.0).double(), atol=1e-3)


def test_the_safeguard_does_not_mix_the_images_of_a_batch():
    rates = torch.tensor([[0.1], [0.9], [0.97]]).double()
    together = fixed_point(lambda x: rates * torch.sin(x) + 1, torch.zeros(3, 4).double(), safeguard=2.0)[1]
    for row in range(3):
        alone = fixed_point(lambda x: rates[row] * torch.sin(x) + 1, torch.zeros(1, 4).double(), safeguard=2.0)[1]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=0)


def two_measurements() -> tuple[torch.Tensor, MultiCoilMRI]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 12, 10, dtype=torch.complex64, generator=generator)
    maps = maps / maps.abs().square().sum(dim=1, keepdim=True).sqrt()
    masks = torch.rand(2, 1, 1, 10, generator=generator) < 0.6
    A = MultiCoilMRI(masks, maps)
    return A(torch.randn(2, 1, 12, 10, dtype=torch.complex64, generator=generator)), A


@pytest.mark.parametrize("solver", ["anderson", "safeguarded", "plain"])
def test_slices_one_by_one_equal_those_of_the_batch(solver):
    torch.manual_seed(0)
    model, (y, A) = (
        DEQ(features=8, num_blocks=1, solver=solver, tolerance=1e-5, max_iterations=400).eval(),
        two_measurements(),
    )
    together, record = model.solve(y, A, record=False)
    apart, traces = model.solve_slices(y, A)
    assert [trace.iterations for trace in traces] == [row["iterations"] for row in record.rows()]
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-4)
    warm, traces = model.solve_slices(y[:1].repeat(2, 1, 1, 1), A.slice(0), warm=True)
    assert traces[1].iterations <= 2 < traces[0].iterations  # the second slice starts at its own answer
    torch.testing.assert_close(warm[1], warm[0], rtol=1e-3, atol=1e-4)
    assert model.config()["solver"] == solver


def test_a_solver_by_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown solver 'newton': choose one of anderson, safeguarded, plain"):
        DEQ(solver="newton")


def test_no_search_convolves_in_tensor_float_32():
    """Its rounding is as large as the tolerance: a trained network took up to three times the iterations."""
    y, A = problem()
    model, seen = tiny(max_iterations=3, tolerance=0.0), []
    model.denoiser.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    with tensor_float_32(True), torch.no_grad():
        model(y, A)
        assert torch.backends.cudnn.allow_tf32, "and the caller's choice returns"
    assert seen == 3 * [False]


def test_a_trained_network_needs_more_iterations_with_rounded_convolutions(monkeypatch):
    """10 bits of mantissa, as in TensorFloat-32: why the search forbids it. The image is nearly the same."""
    y, A, _ = brain()
    model = load_teacher(shipped_teacher(Run("deq", 6), load_config("demo"))).eval()
    exact_image, exact = model.solve(y, A)
    convolve = torch.nn.Conv2d._conv_forward

    def rounded(values):
        return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    monkeypatch.setattr(
        torch.nn.Conv2d, "_conv_forward", lambda layer, x, w, b: convolve(layer, rounded(x), rounded(w), b)
    )
    image, coarse = model.solve(y, A)
    assert exact.converged and coarse.iterations > 1.2 * exact.iterations
    assert ((image - exact_image).norm() / exact_image.norm()).item() < 0.01
