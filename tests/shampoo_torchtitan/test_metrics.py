"""What TorchTitan's metrics and log say of a step."""

import logging
from unittest import mock

import shampoo_torchtitan  # noqa: F401  first: it makes TorchTitan run without a GPU

# isort: split
import torch
import torchtitan.components.metrics as titan

from shampoo_torchtitan.metrics import ShampooMetricsProcessor
from shampoo_torchtitan.optimizer import ShampooContainer


def test_figures_of_the_step_reach_the_metrics_and_its_times_the_log(caplog):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Linear(8, 4))
    container = ShampooContainer([model], {"precondition_frequency": 2})
    for _ in range(4):
        container.zero_grad()
        model(torch.randn(16, 12)).square().mean().backward()
        container.step()
    processor = object.__new__(ShampooMetricsProcessor)
    processor.optimizers = container
    logger = logging.getLogger()
    with (
        mock.patch.object(titan.MetricsProcessor.__mro__[1], "log") as log,
        mock.patch.object(logger, "disabled", False),
        caplog.at_level(logging.INFO),
    ):
        processor.log(4, 1.0, 1.0, 1.0, {"theirs": 2.0})

    figures = log.call_args.args[-1]
    assert figures["theirs"] == 2.0
    assert figures["shampoo/root_refreshes"] >= 4  # two factors of each matrix
    assert figures["shampoo/failed_roots"] == figures["shampoo/skipped_blocks"] == 0
    assert figures["shampoo/skipped_entries"] == 0
    assert figures["shampoo/condition_number"] > 1.0
    assert figures["shampoo/update_rms/weight"] > 0.0
    assert figures["shampoo/mib_sent_per_step"] == 0.0  # one rank
    (line,) = (r.getMessage() for r in caplog.records if "last step" in r.getMessage())
    parts = [part.split()[0] for part in line.partition(": ")[2].split(", ")]
    assert parts == ["apply", "direction", "exchange", "excluded", "factors", "roots"]
