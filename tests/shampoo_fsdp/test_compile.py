"""`compile = true`: the same updates, from one compilation per shape of block."""

import torch
from torch import Tensor, nn

from shampoo_fsdp import Shampoo


def train(steps: int, moved_at: int = -1, **settings) -> tuple[list[Tensor], list[int]]:
    """The parameters at the end, and how many graphs had been compiled after each step."""
    generator = torch.Generator().manual_seed(0)
    # Cut in blocks of 16 x 16 and 16 x 12.
    weights = [nn.Parameter(torch.randn(32, 28, generator=generator)) for _ in range(2)]
    optimizer = Shampoo(
        [("a", weights[0]), ("b", weights[1])],
        lr=1e-2,
        max_preconditioner_dim=16,
        precondition_frequency=3,
        **settings,
    )
    graphs = []
    for step in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        if step == moved_at:  # others' tensors in the places of all entries: the stacks go
            for entries in optimizer.state.values():
                entries.update({name: value.clone() for name, value in entries.items()})
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)  # schedules must not recompile
        optimizer.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return [weight.detach() for weight in weights], graphs


def test_it_compiles_once_and_changes_nothing():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected, _ = train(12)
    compiled, graphs = train(12, moved_at=8, compile=True)
    for weight, reference in zip(compiled, expected, strict=True):
        torch.testing.assert_close(weight, reference, rtol=1e-5, atol=1e-6)
    # One shape of block, (16, 14), and two parts of its step, around the refresh of the roots.
    assert graphs[-1] == graphs[4] == 2
