"""What TorchTitan's metrics and log say of a step."""

import logging
from unittest import mock

import torch
from torchtitan.components.metrics import MetricsProcessor

from shampoo_fsdp import Shampoo
from shampoo_torchtitan import metrics


class Container:
    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = list(optimizers)


def logged(container: object) -> dict[str, float]:
    """The metrics that TorchTitan is given beside its own."""
    processor = object.__new__(MetricsProcessor)
    processor.optimizers = container
    with mock.patch.object(metrics, "_titan_log") as log:
        metrics._log(processor, 4, 1.0, 1.0, 1.0, extra_metrics={"theirs": 2.0})
    return log.call_args.kwargs["extra_metrics"]


def test_figures_of_the_step_reach_the_metrics_and_its_times_the_log(caplog):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Linear(8, 4))
    optimizer = Shampoo(model.named_parameters(), precondition_frequency=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 12)).square().mean().backward()
        optimizer.step()
    with mock.patch.object(logging.getLogger(), "disabled", False), caplog.at_level(logging.INFO):
        figures = logged(Container(torch.optim.SGD(model.parameters()), optimizer))
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


def test_metrics_of_other_optimizers_are_left_alone():
    model = torch.nn.Linear(2, 2)
    assert logged(Container(torch.optim.SGD(model.parameters()))) == {"theirs": 2.0}
    assert logged(None) == {"theirs": 2.0}
