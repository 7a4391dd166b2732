"""pipeline.quantize.check: its limits, where the model is held meanwhile, and its figures on a model known by heart."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.programs import python

from pipeline.errors import StageFailed
from pipeline.quantize import check, formats
from pipeline.quantize.calibration import Sample

FIGURES = """
import json
from types import SimpleNamespace
import torch
from pipeline.quantize import check
from pipeline.quantize.calibration import Sample

class Layer(torch.nn.Module):
    def __init__(self, factor, in_tuple):
        super().__init__()
        self.factor, self.in_tuple = factor, in_tuple
    def forward(self, hidden):
        changed = hidden + self.factor * hidden
        return (changed,) if self.in_tuple else changed

class Toy(torch.nn.Module):
    device = torch.device("cpu")
    def __init__(self, factors=(1.0, 2.0), sure=0.0, in_tuple=False):
        super().__init__()
        self.layers, self.sure = torch.nn.ModuleList(Layer(factor, in_tuple) for factor in factors), sure
    def get_decoder(self):
        return self
    def forward(self, input_ids, use_cache):
        hidden = torch.nn.functional.one_hot(input_ids, 8).float()
        for layer in self.layers:
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        following = torch.nn.functional.one_hot((input_ids + 1) % 8, 8).float()
        return SimpleNamespace(logits=self.sure * following)
    def hooks(self):
        return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in self.layers)

counting, jumping = Sample((1, 2, 3, 4), 2), Sample((5, 1, 2, 3, 7), 2, 1)
original = check.read(Toy(), [counting, jumping])
calls = original.layers[1][0]
quantized, broken = Toy((1.5, 2.0)), Toy((1.5, 2.0))
broken.forward = lambda **_: 1 / 0
answers = {
    "even": check.perplexity(Toy(), [counting]),
    "sure": check.perplexity(Toy(sure=50.0), [counting, jumping]),
    "whole text": check.perplexity(Toy(sure=50.0), [Sample((5, 1, 2, 3, 7))]),
    "nan": check.perplexity(Toy(sure=float("nan")), [counting]),
    "calls": [len(layer) for layer in original.layers],
    "second": [calls.before[0, 1].item(), calls.update[0, 1].item()],
    "errors": check.layer_errors(quantized, [counting, jumping], original),
    "same": check.layer_errors(Toy(in_tuple=True), [counting, jumping], original),
    "hooks": quantized.hooks(),
}
try:
    check.layer_errors(broken, [counting], original)
except ZeroDivisionError:
    answers["hooks after an error"] = broken.hooks()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def figures() -> dict:
    """Of a toy whose layers multiply by 2 and 3, and whose output says that numbers go up by one."""
    return json.loads(python(FIGURES).splitlines()[-1])


@pytest.mark.slow
def test_perplexity_is_of_the_answers_alone(figures):
    """Eight even chances are 8, a sure and right answer 1, whatever stands before and behind it; no number is infinite."""
    assert figures["even"] == pytest.approx(8)
    assert figures["sure"] == pytest.approx(1)
    assert figures["whole text"] == pytest.approx(math.exp(100 / 4), rel=1e-3)
    assert math.isinf(figures["nan"])


@pytest.mark.slow
def test_a_reading_holds_each_layers_input_and_what_it_added(figures):
    """One call a layer and sample; the second layer got 2 and added 4."""
    assert figures["calls"] == [2, 2]
    assert figures["second"] == [2, 4]


@pytest.mark.slow
def test_one_layers_error_is_not_charged_to_the_next(figures):
    """A first layer that adds half as much again is off by 0.5, the second by nothing; old transformers' tuples are read too."""
    assert figures["errors"] == pytest.approx([0.5, 0])
    assert figures["same"] == pytest.approx([0, 0])


@pytest.mark.slow
def test_no_hook_stays_behind(figures):
    """Neither after comparing nor after an error in it."""
    assert figures["hooks"] == figures["hooks after an error"] == 0


def compare(monkeypatch: pytest.MonkeyPatch, perplexity: float, errors: list[float]) -> check.Comparison:
    """A comparison with these figures, the original's perplexity being 4."""
    monkeypatch.setattr(check, "_on_accelerator", lambda _model: nullcontext())
    monkeypatch.setattr(formats, "load_dequantized", lambda _model, _folder: None)
    monkeypatch.setattr(check, "perplexity", lambda _model, _samples: perplexity)
    monkeypatch.setattr(check, "layer_errors", lambda _model, _samples, _original: errors)
    return check.compare(None, Path("made"), [Sample((1, 2))], check.Reading(4.0, ()))


def test_figures_at_the_limits_pass(monkeypatch):
    """Just 0.6 a layer and just three times the perplexity are still rounding."""
    assert compare(monkeypatch, 12.0, [0.6, 0.0]) == check.Comparison(12.0, (0.6, 0.0))


@pytest.mark.parametrize(
    ("perplexity", "errors", "problems"),
    [
        (4.0, [0.1, 0.61, math.nan], ["layer 1 differs from the original: median relative error 0.61", "layer 2"]),
        (12.1, [0.1], ["perplexity of the answers went from 4.00 to 12.10"]),
        (math.inf, [0.7], ["layer 0", "perplexity of the answers went from 4.00 to inf"]),
        (math.nan, [0.1], ["perplexity of the answers went from 4.00 to nan"]),
    ],
)
def test_whatever_is_beyond_the_limits_is_named(monkeypatch, perplexity, errors, problems):
    """Each layer and the whole, NaN too, behind the folder; every problem says what to set."""
    with pytest.raises(StageFailed) as refusal:
        compare(monkeypatch, perplexity, errors)
    first, *rest = refusal.value.problems
    assert (first.what, first.file) == ("the quantizer corrupted the weights", "made")
    assert len(rest) == len(problems)
    assert all(problem.what.startswith(beginning) for problem, beginning in zip(rest, problems, strict=True))
    assert {problem.remedy for problem in refusal.value.problems} == {check.RETRY}


class Weights:
    """A model of 80 bytes, and where it was moved."""

    def __init__(self, device: str) -> None:
        self.device, self.moves = SimpleNamespace(type=device), []

    def parameters(self) -> list[SimpleNamespace]:
        """Two of them."""
        return [SimpleNamespace(nbytes=50), SimpleNamespace(nbytes=30)]

    def to(self, device: str) -> None:
        """Note it."""
        self.moves.append(device)


@pytest.mark.parametrize(
    ("device", "gpu", "free", "moves"),
    [
        ("cpu", True, 100, ["cuda", "cpu"]),
        ("cpu", True, 99, []),
        ("cpu", False, 100, []),
        ("cuda", True, 100, []),
    ],
)
def test_a_model_is_on_a_gpu_with_room_only_meanwhile(monkeypatch, device, gpu, free, moves):
    """It may take four fifths of what is free, goes back even after an error, and stays where it already is on one."""
    cuda = SimpleNamespace(is_available=lambda: gpu, mem_get_info=lambda: (free, 1000), empty_cache=lambda: None)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    model = Weights(device)
    moves_meanwhile = []

    def fail() -> None:
        with check._on_accelerator(model):
            moves_meanwhile.extend(model.moves)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert moves_meanwhile == moves[:1]
    assert model.moves == moves
