"""The study of convolutions, shrunk."""

import pytest
import torch

from studies.pretrain.results import Results
from studies.vision import __main__ as study
from studies.vision import training


@pytest.fixture
def few_images(monkeypatch):
    """Ten patterns and noise, in the place of digits."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(30)
    patterns = torch.randn(10, 1, 12, 12, generator=generator)
    images = patterns[labels] + 0.3 * torch.randn(300, 1, 12, 12, generator=generator)
    held_out = images[:50], labels[:50]
    monkeypatch.setattr(training, "_digits", lambda name: (images[50:], labels[50:], held_out))


@pytest.mark.parametrize("contestant", study.CONTESTANTS)
def test_every_contestant_trains_and_repeats_itself(few_images, contestant):
    lr = study.CONTESTANTS[contestant][2][2]
    settings = {**study.run_of(contestant, lr, 1, "test").settings, "epochs": 6}
    found = training.train(settings)
    assert found["training_loss"][-1] < found["training_loss"][0] - 0.05
    assert len(found["accuracy"]) == 6 and "commit" in found["versions"]
    assert training.train(settings)["loss"] == found["loss"]


def test_seeds_are_compared_once_all_values_of_lr_have_been_tried(tmp_path, monkeypatch):
    asked = []

    def train(settings):
        asked.append(settings)
        lr = settings["options"]["lr"]
        best = study.CONTESTANTS["AdamW"][2][1]
        losses = [2.0, 1.0 + abs(lr - best)]
        return {"training_loss": losses, "loss": losses, "accuracy": [0.5, 0.5, 0.9]}

    monkeypatch.setattr(training, "train", train)
    results = Results(tmp_path / "runs.jsonl")
    assert study.best_lr("AdamW", results) is None and study.finals(results) == {}
    study.run(results)
    assert study.best_lr("AdamW", results) == study.CONTESTANTS["AdamW"][2][1]
    number = len(asked)
    study.run(Results(tmp_path / "runs.jsonl"))  # nothing is missing
    assert len(asked) == number == len(study.CONTESTANTS) * 9
    final = [s for s in asked if s["images"] == "test"]
    assert {s["seed"] for s in final} == {1, 2, 3}
    text = study.markdown(results)
    assert "| AdamW | 0.002 | 90.0% | 90.0% | 1.0000 | 1.0000 |" in text
    pytest.importorskip("matplotlib")
    study.draw(results, tmp_path / "digits.png")
    assert (tmp_path / "digits.png").stat().st_size > 10_000
