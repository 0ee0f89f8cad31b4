"""Masks against counts made by hand, and against fastMRI's where it is installed."""
import numpy as np
import pytest
import torch

from spade.operators import acs_lines, describe_sampling, effective_rate, equispaced_mask


@pytest.mark.parametrize("width", (96, 128, 320, 367, 368))
@pytest.mark.parametrize("acceleration", (6, 8, 10))
def test_exact_rate_for_every_offset(width, acceleration):
    for offset in range(acceleration):
        mask = equispaced_mask(width, acceleration, offset=offset, exact=True)
        assert mask.dtype == torch.bool and mask.shape == (width,)
        assert mask.sum() == round(width / acceleration)


@pytest.mark.parametrize("acceleration", (6, 8, 10))
def test_nominal_rate_is_every_line_and_the_centre(acceleration):
    for offset in range(acceleration):
        mask = equispaced_mask(320, acceleration, offset=offset)
        expected = {*range(offset, 320, acceleration), *range(144, 176)}
        assert set(mask.nonzero().flatten().tolist()) == expected
        assert effective_rate(mask) == pytest.approx(len(expected) / 320)


def test_acs_lines_contain_the_block_and_the_centre():
    for width in (64, 101, 320):
        for offset in range(6):
            acs = acs_lines(equispaced_mask(width, 6, offset=offset))
            assert acs.start <= width // 2 < acs.stop and round(width * 0.1) <= acs.stop - acs.start <= round(width * 0.1) + 2


def test_a_generator_repeats_itself_and_draws_every_offset():
    def masks() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        return [equispaced_mask(128, 8, generator=generator) for _ in range(60)]

    assert all(map(torch.equal, masks(), masks()))
    assert len({tuple(mask.tolist()) for mask in masks()}) == 8


def test_the_global_generator_is_not_touched():
    state = torch.random.get_rng_state()
    equispaced_mask(128, 6), equispaced_mask(128, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_caption_states_the_effective_rate():
    assert describe_sampling(equispaced_mask(320, 8, offset=1)) == "68 of 320 lines (21.2 %, effective R = 4.71), 32 of them ACS"
    batch = equispaced_mask(320, 8, offset=1).expand(2, 1, 5, 320)
    assert describe_sampling(batch) == describe_sampling(batch[0, 0, 0])


@pytest.mark.parametrize("arguments, message", (
    ({"acceleration": 0}, "acceleration must be a whole number from 1 to the width 320, found 0"),
    ({"acceleration": -6}, "acceleration must be"), ({"acceleration": 1.5}, "acceleration must be"), ({"acceleration": 321}, "found 321"),
    ({"acs_fraction": 0}, "acs_fraction must lie between 0 and 1"), ({"acs_fraction": 1}, "acs_fraction must lie"),
    ({"width": 8, "acs_fraction": 0.05}, "width 8 is too small"),
    ({"offset": 6}, r"offset must lie in \[0, 6\), found 6"), ({"offset": -1}, "found -1"),
    ({"acceleration": 12, "exact": True}, "allows 27 of 320 lines, but the ACS block alone has 32"),
))
def test_numbers_that_make_no_mask(arguments, message):
    with pytest.raises(ValueError, match=message):
        equispaced_mask(**({"width": 320, "acceleration": 6} | arguments))


def test_nominal_mask_is_fastmris():
    subsample = pytest.importorskip("fastmri.data.subsample")
    mask_function = subsample.EquiSpacedMaskFunc([0.10], [6])
    theirs, low = mask_function((1, 320, 2), offset=2)
    ours = equispaced_mask(320, 6, offset=2)
    assert low == 32 and np.array_equal(theirs.reshape(-1).numpy().astype(bool), ours.numpy())
