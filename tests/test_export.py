"""Model cards, ONNX in onnxruntime, and recorded programs of whole networks."""

import json

import onnxruntime
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from torch import nn

from spade.basics import evaluating
from spade.checkpoint import load, read_checkpoint, save
from spade.examples import brain
from spade.export import describe, export_onnx, export_program
from spade.models import DEQ, E2EVarNet, USRNet, VarNet
from spade.operators import BlurDownsample, MultiCoilMRI
from spade.pruning import prune

NETWORKS = {
    "DEQ": lambda: DEQ(features=5, num_blocks=1),
    "VarNet": lambda: VarNet(num_cascades=1, channels=5, num_pools=2),
    "E2EVarNet": lambda: E2EVarNet(num_cascades=1, channels=5, num_pools=2, sens_channels=3, sens_num_pools=2),
    "USRNet": lambda: USRNet(iterations=2, widths=[5, 5, 5, 5], blocks=1, hypanet_channels=5),
}


def student(name: str) -> nn.Module:
    torch.manual_seed(0)
    return prune(NETWORKS[name]().eval(), 0.40)


# The model card


def test_the_card_is_one_that_hugging_face_reads(tmp_path):
    facts = dict(strategy="school", data={"folder": "data/demo"}, metrics={"psnr": 34.5, "ssim": 0.9, "note": "R = 6"})
    path = save(student("VarNet"), tmp_path / "m", **facts, seed=3, title="Zürich: #1")
    card = ModelCard(describe(path))
    (psnr, ssim) = card.data.eval_results
    assert (psnr.metric_type, psnr.metric_value, ssim.metric_value) == ("psnr", 34.5, 0.9)
    assert json.loads(psnr.dataset_name) == facts["data"] and card.data.library_name == "spade"
    for text in ('spade.load("m")', "## Strategy", '"school"', '"seed": 3', "R = 6", "Zürich: #1", "A VarNet with"):
        assert text in card.text
    for name, value in load(path).state_dict().items():
        assert f"| `{name}` | {' × '.join(map(str, value.shape))} |" in card.text.splitlines()


def test_the_card_of_a_foreign_network_without_results(tmp_path):
    path = save(nn.Sequential(nn.Conv2d(1, 3, 3)), tmp_path / "m.1", metrics="none yet")
    before = read_checkpoint(path)[1]
    card = describe(path)
    assert 'spade.load("m.1", build=Sequential)' in card and "A Sequential with 30 parameters" in card
    assert "model-index" not in yaml.safe_load(card.split("---")[1]) and "## Arguments" not in card
    assert read_checkpoint(path)[1] == before


def test_the_card_of_a_damaged_file_is_refused(tmp_path):
    path = save(student("DEQ"), tmp_path / "m")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="must have the SHA-256 in its header"):
        describe(path)


# ONNX


@pytest.mark.parametrize("name", ["DEQ", "VarNet", "USRNet"])
def test_onnxruntime_computes_what_the_pruned_cnn_computes(tmp_path, name):
    generator = torch.Generator().manual_seed(0)
    cnn, example, _ = next(student(name).priors())
    path = export_onnx(cnn, torch.randn(2, example.shape[1], 32, 48, generator=generator), tmp_path / "cnn.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    run = lambda image: session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
    for batch, *size in ((1, 64, 32), (3, 32, 48)) + (((2, 33, 17),) if name == "DEQ" else ()):
        image = torch.randn(batch, example.shape[1], *size, generator=generator)
        with evaluating(cnn), torch.no_grad():
            expected = cnn(image)
        assert torch.allclose(torch.from_numpy(run(image)), expected, atol=1e-5 * float(expected.abs().max()))
    if name == "VarNet":  # its padding was decided when it was recorded: an error, not a wrong image
        with pytest.raises(Exception, match="mismatched dimensions"):
            run(torch.randn(1, 2, 33, 32))
    assert [p.name for p in tmp_path.iterdir()] == ["cnn.onnx"]


class Counting(nn.Module):
    """Takes another branch for bright images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, x):
        return self.conv(x) if x.mean() > 0 else x


def test_operations_that_depend_on_values_are_refused(tmp_path, capfd):
    with pytest.raises(ValueError, match="^Counting must do the same operations for all inputs, got .*") as caught:
        export_onnx(Counting(), torch.ones(1, 1, 8, 8), tmp_path / "c.onnx")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    assert "def forward" not in capfd.readouterr().err


# Whole networks


def test_a_recorded_network_is_the_network_for_other_masks_and_maps(tmp_path):
    (y, A, x), model = brain(), student("VarNet")
    program = torch.export.load(export_program(model, y, A, tmp_path / "m.pt2")).module()
    for operator in (A, MultiCoilMRI(A.mask.roll(1), A.maps.flip(-1))):
        measured = operator(x)
        with torch.no_grad():
            assert torch.equal(program(measured, dict(operator.state_dict())), model(measured, operator))


@pytest.mark.parametrize("name", ["DEQ", "E2EVarNet", "USRNet"])
def test_networks_that_cannot_be_recorded_are_refused(tmp_path, name):
    y, A, _ = brain()
    if name == "USRNet":
        y, A = torch.rand(1, 3, 16, 16), BlurDownsample(torch.ones(1, 1, 5, 5) / 25, 2)
    with pytest.raises(ValueError, match=f"^{name} must do the same operations for all inputs, got .*export_onnx.$"):
        export_program(student(name), y, A, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
