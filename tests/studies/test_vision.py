"""The study of convolutions, shrunk."""

import pytest
import torch

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
