"""What float rounding in the gradients, as another mesh makes it, does to a training.

    python -m benchmarks.noise --rules kl_shampoo    # or all

Two trainings from the same weights on the same batches, a regression by two layers, one of them
with each entry of its gradients changed by one unit in the last place of fp32. The difference is
that of the worst weight, as a share of the way that it went.

"Range kept": gradients of one fixed range, rank 8 in 100 x 100; how much of the last update's norm
lies in that range. With exact arithmetic all of Shampoo's does.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command import console, parser_of, table
from shampoo_fsdp import Shampoo

RULES: dict[str, dict[str, Any] | None] = {
    "kl_shampoo": {},
    "kl_shampoo, polynomial": {"root_method": "polynomial"},
    "kl_shampoo, polynomial, ridge": {"root_method": "polynomial", "preconditioner_eps": 0.004},
    "shampoo": {"preconditioner": "shampoo"},
    "shampoo, polynomial": {"preconditioner": "shampoo", "root_method": "polynomial"},
    "soap": {"preconditioner": "soap"},
    "AdamW": None,
}
PRECISIONS = ("highest", "medium")
ROWS, SEEDS, STEPS = (8, 512), 3, 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("benchmarks.noise", __doc__)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = []
    for rule in options.rules:
        for precision in PRECISIONS if RULES[rule] is not None else ("-",):
            make, row = maker(rule, precision), {"rule": rule, "matmul_precision": precision}
            for rows in ROWS:
                apart = [moved_apart(make, rows, seed) for seed in range(SEEDS)]
                shown = f"{statistics.median(apart):.1e}, {max(apart):.1e}"
                row[f"{rows} rows: median, largest"] = shown
            kept = [range_kept(make, seed) for seed in range(SEEDS)]
            shown = f"{statistics.median(kept):.1%}, {min(kept):.1%}"
            # AdamW's entries know nothing of a range.
            row["range kept: median, smallest"] = shown if RULES[rule] is not None else "-"
            found.append(row)
    console().print(table("Rounding", found))


Maker = Callable[[nn.Module], torch.optim.Optimizer]


def maker(rule: str, precision: str) -> Maker:
    """Makes the optimizer of a model by one of `RULES`."""
    options = RULES[rule]
    if options is None:
        return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    return lambda model: Shampoo(
        model.named_parameters(),
        lr=1e-2,
        lr_factor=1.0,
        exclude=[],
        matmul_precision=precision,
        **options,
    )


def moved_apart(make: Maker, rows: int, seed: int = 0, steps: int = STEPS) -> float:
    """The largest of all weights' ||W - W'|| / ||W - W_0||, W' being that of the other training.

    Args:
        make: the optimizer of a model.
        rows: of a batch.
        seed: of weights, batches and noise.
        steps: of both trainings.
    """
    start, one, other = (
        _weights(make, rows, seed, n, noisy)
        for n, noisy in ((0, False), (steps, False), (steps, True))
    )
    apart = [
        torch.linalg.norm(a - b) / torch.linalg.norm(a - s)
        for s, a, b in zip(start, one, other, strict=True)
    ]
    return max(apart).item()


def _weights(make: Maker, rows: int, seed: int, steps: int, noisy: bool) -> list[Tensor]:
    """The weights after so many steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 96, bias=False))
    optimizer = make(model)
    data, noise = (torch.Generator().manual_seed(s) for s in (seed, seed + 1))
    for _ in range(steps):
        inputs = torch.randn(rows, 64, generator=data)
        targets = torch.randn(rows, 96, generator=data)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        if noisy:
            for p in model.parameters():
                assert p.grad is not None
                signs = torch.rand(p.shape, generator=noise).round_().mul_(2.0).sub_(1.0)
                p.grad.mul_(1.0 + 2.0**-23 * signs)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def range_kept(
    make: Maker, seed: int = 0, steps: int = STEPS, rank: int = 8, n: int = 100
) -> float:
    """||P U Q|| / ||U|| of the last update U, P and Q being the projections on the range of all
    gradients, from the left and from the right.

    Args:
        make: the optimizer of a model.
        seed: of ranges and gradients.
        steps: number of updates.
        rank: of the gradients.
        n: of rows and columns.
    """
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    model = nn.Linear(n, n, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = make(model)
    before = model.weight.detach().clone()
    for _ in range(steps):
        before.copy_(model.weight.detach())
        inner = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        model.weight.grad = (left @ inner @ right.mT).float()
        optimizer.step()
    update = (model.weight.detach() - before).double()
    kept = torch.linalg.norm(left.mT @ update @ right) / torch.linalg.norm(update)
    return kept.item()


if __name__ == "__main__":
    main()
