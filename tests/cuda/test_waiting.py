"""The host never waits for the GPU on a step: it may run ahead of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from shampoo_fsdp.config import RULES
from tests.cuda.training import Training

pytestmark = pytest.mark.cuda

BUILT_IN = ("shampoo", "kl_shampoo", "soap")
# torch.linalg.eigh itself reads back whether it succeeded.
METHODS = [
    (rule, method)
    for rule in BUILT_IN
    for method in RULES[rule].root_methods
    if not method.startswith("eigh")
]
SETTINGS = [
    {"buckets": 3},
    {"symmetric_packing": True, "momentum_dtype": "bfloat16"},
    {"weight_decay_type": "l2", "momentum": 0.5},
    *({"grafting": name} for name in ("rmsprop", "adagrad", "sgd", "none")),
    {"large_dim": "diagonal"},
    {"precondition_1d": True},
]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def never_waits(device: torch.device, **settings: object) -> None:
    """From the second step on, which is the first one that is preconditioned, or, with roots that
    begin with an eigendecomposition, the third."""
    training = Training(device, start_preconditioning_step=2, **settings)
    first = 2 if training.optimizer.config.basis_method == "qr" else 1
    training.run(range(first))
    for step in range(first, 8):
        training.give(step)
        with waiting_is_an_error():
            training.optimizer.step()
    assert all(p.isfinite().all() for p in training.parameters.values())


def test_waiting_would_be_noticed(gpu):
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_is_an_error():
        torch.ones((), device=gpu).item()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize(("rule", "method"), METHODS)
def test_no_rule_waits(gpu, rule, method, precision):
    never_waits(gpu, preconditioner=rule, root_method=method, matmul_precision=precision)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("rule", BUILT_IN)
def test_no_setting_waits(gpu, rule, settings):
    never_waits(gpu, preconditioner=rule, **settings)


@pytest.mark.parametrize("rule", BUILT_IN)
def test_a_bad_gradient_is_skipped_without_waiting(gpu, rule):
    training = Training(gpu, preconditioner=rule, start_preconditioning_step=2)
    training.run(range(2))
    training.give(2)
    for parameter in training.parameters.values():
        parameter.grad.view(-1)[0] = torch.nan
    with waiting_is_an_error():
        training.optimizer.step()
    skipped_blocks, skipped_entries = training.optimizer.counters().tolist()[2:]
    assert skipped_blocks > 0 and skipped_entries > 0
