"""The paper's printed numbers: parameter counts, cells read off the page a second time, and how they are looked up."""

import pytest

from spade.paper import NAMED_RATIO, paper_numbers, paper_value

COUNTS = {
    "deq": [999_428, 878_644, 793_159, 635_311, 353_328],
    "varnet": [19_634_712, 17_567_216, 15_772_920, 12_477_088, 6_988_752],
    "e2e-varnet": [20_119_610, 18_052_114, 16_257_818, 12_961_986, 7_473_650],
}
PSNR = {
    (1, "deq", 0.20, "self-supervised"): 36.14,
    (2, "varnet", 0.40, "school"): 34.07,
    (5, "e2e-varnet", 0.05, "supervised"): 37.95,
}


def test_parameter_counts():
    counts = lambda **where: [paper_value(ratio=ratio, metric="parameters", **where) for ratio in NAMED_RATIO]
    for network, expected in COUNTS.items():
        assert counts(table=1, network=network) == expected
    assert counts(table=4, setting=2) == [17_016_016, 15_314_620, 13_730_964, 10_837_246, 6_094_762]


def test_cells_read_off_the_page_a_second_time():
    for (table, network, ratio, strategy), value in PSNR.items():
        assert paper_value(table=table, network=network, ratio=ratio, strategy=strategy, metric="psnr") == value
    random = dict(table=3, network="varnet", ratio=0.20, strategy="self-supervised", start="random")
    assert paper_value(**random, metric="psnr") == 17.13
    assert paper_value(table=6, setting=4, ratio=0.40, metric="ssim_kept", strategy="school") == 98.4
    assert len(paper_numbers()) == 3 * 123 + 104 + 70 + 35


def test_strategies_and_starts():
    unpruned = paper_numbers(ratio=0.0)
    assert set(unpruned[unpruned["table"] != 3]["strategy"]) == {""}
    assert set(paper_numbers(network="usrnet", metric="psnr")["strategy"]) == {"", "school"}
    assert set(paper_numbers(start="random")["table"]) == {3}


def test_several_numbers_and_unknown_columns_are_refused():
    with pytest.raises(ValueError, match="where must match one number of the paper, got 3 for .*'varnet'"):
        paper_value(table=1, network="varnet", ratio=0.40, metric="psnr")
    with pytest.raises(KeyError, match="colour"):
        paper_numbers(colour="red")
    assert paper_value(table=1, network="usrnet", metric="psnr") is None


def test_a_caller_cannot_change_the_numbers():
    numbers = paper_numbers()
    numbers["value"] = 0.0
    assert paper_value(table=1, network="deq", ratio=0.0, metric="ssim") == 98.7
