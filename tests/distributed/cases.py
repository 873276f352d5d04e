"""Trainings drawn by a number: a model, settings, gradients, two meshes and a checkpoint between
them. What they are for is in test_fuzz.py."""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_fsdp import Shampoo, ShampooConfig
from tests.models import deterministic_gradients

LAYOUTS = {
    "single": ("single", (1,)),
    "fsdp 2": ("fsdp", (2,)),
    "fsdp 3": ("fsdp", (3,)),
    "fsdp 4": ("fsdp", (4,)),
    "hsdp": ("hsdp", (2, 2)),
    "tp 2": ("tp", (2,)),
    "tp 3": ("tp", (3,)),
    "tp x fsdp": ("tp_fsdp", (2, 2)),
    "ddp 2": ("ddp", (2,)),
    "ddp 4": ("ddp", (4,)),
}
"""A kind of mesh and its shape, by name."""

_ROOT_METHODS = {
    "shampoo": ("eigh", "eigh_pseudo_inverse", "polynomial", "coupled_newton", "qr"),
    "kl_shampoo": ("eigh", "polynomial", "coupled_newton", "qr"),
    "soap": ("qr", "eigh"),
}
_ANYWHERE: dict[str, tuple[Any, ...]] = {
    "buckets": (1, 2, 3, 5),
    "owner_scope": ("near", "shard"),
    "ranks_per_node": (1, 2),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training."""

    number: int
    shapes: dict[str, tuple[int, ...]]
    cut: dict[str, int | None]
    """By tensor parallelism: along which dimension."""
    groups: list[tuple[list[str], dict[str, Any]]]
    """Names, and settings of the group."""
    settings: dict[str, Any]
    later: dict[str, Any]
    """Other settings on the second mesh, of those that change no update."""
    dtype: torch.dtype
    """Of the parameters."""
    lr: list[float]
    """A factor for each step."""
    gradients: list[dict[str, str]]
    """For each step, of the parameters whose gradient is not the usual one: "absent", "zero",
    "nan", "inf"."""
    source: str
    target: str
    halt: int
    """After so many steps it is saved."""
    saved_as: str
    """"file", which the first rank writes alone, "folder", or "whole": a full state dict."""
    moved: bool
    """Whether others move its state to and fro, before it is saved and, on one rank, later."""

    def __str__(self) -> str:
        return "\n".join(f"    {name}: {value}" for name, value in vars(self).items())

    def optimizer(self, parameters: dict[str, Tensor], **others: Any) -> Shampoo:
        """For the parameters, wherever they are, with some other settings."""
        groups = [
            {"params": [(name, parameters[name]) for name in names], **of_group}
            for names, of_group in self.groups
        ]
        return Shampoo(groups, **self.settings | others)

    def start(self) -> dict[str, Tensor]:
        """The values of the parameters."""
        generator = torch.Generator().manual_seed(self.number)
        return {
            name: (0.1 * torch.randn(shape, generator=generator)).to(self.dtype)
            for name, shape in self.shapes.items()
        }

    def gradients_of(self, step: int) -> dict[str, Tensor | None]:
        """Whole gradients."""
        result: dict[str, Tensor | None] = dict(
            deterministic_gradients(self.shapes, 100 * self.number + step)
        )
        for name, kind in self.gradients[step].items():
            gradient = result[name]
            assert gradient is not None
            if kind == "absent":
                result[name] = None
            elif kind == "zero":
                gradient.zero_()
            else:
                at = random.Random(f"{self.number} {step} {name}").randrange(gradient.numel())
                gradient.view(-1)[at] = float(kind)
        return result


def draw(number: int) -> Case:
    """Always the same case for the same number."""
    dice = random.Random(f"shampoo {number}")
    while True:
        case = _draw(number, dice)
        try:
            parameters = {name: value.requires_grad_() for name, value in case.start().items()}
            case.optimizer(parameters, **case.later)
        except ValueError:  # settings that exclude each other, or a root that a method cannot take
            continue
        return case


def _draw(number: int, dice: random.Random) -> Case:
    shapes = {f"w{i}": _shape(dice) for i in range(dice.randint(1, 5))}
    if dice.random() < 0.5:
        shapes["embeddings"] = _shape(dice)
    names = list(shapes)
    dice.shuffle(names)
    middle = dice.randint(1, len(names)) if dice.random() < 0.5 else len(names)
    groups = [(names[:middle], {}), (names[middle:], _group(dice))]
    settings, steps = _settings(dice), dice.randint(6, 12)
    layouts = list(LAYOUTS)  # each in turn, and a hundred numbers have all pairs
    source, target = layouts[number % 10], layouts[(3 * number + number // 10) % 10]
    case = Case(
        number=number,
        shapes=shapes,
        cut={name: _cut(shape, settings, dice) for name, shape in shapes.items()},
        groups=[group for group in groups if group[0]],
        settings=settings,
        later={name: dice.choice(of) for name, of in _ANYWHERE.items() if dice.random() < 0.3},
        dtype=dice.choice([torch.float32] * 8 + [torch.float64, torch.bfloat16]),
        lr=[dice.choice((1.0, 1.0, 0.5, 0.1)) for _ in range(steps)],
        gradients=_gradients(names, steps, dice),
        source=source,
        target=target,
        halt=dice.randint(1, steps - 1),
        saved_as=dice.choice(("file", "folder", "whole")),
        moved=dice.random() < 0.5,
    )
    if dice.random() < 0.4:  # refused, and drawn anew, if its rows are no whole heads
        settings |= {"split_heads": ["w0"], "head_dim": dice.choice((2, 3))}
    return case


def _shape(dice: random.Random) -> tuple[int, ...]:
    dims = dice.choice((1, 2, 2, 2, 3, 4))
    largest = {1: 30, 2: 24, 3: 9, 4: 6}[dims]
    return tuple(dice.choice((1, 2, 3, *range(2, largest + 1))) for _ in range(dims))


def _cut(shape: tuple[int, ...], settings: dict[str, Any], dice: random.Random) -> int | None:
    # Of dimensions that are merged only the first may be cut.
    dims = 1 if "merge_dims" in settings or len(shape) > 3 else len(shape)
    return dice.choice([None, *range(dims)])


def _group(dice: random.Random) -> dict[str, Any]:
    options = {
        "lr": 3e-3,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "weight_decay": dice.choice((0.0, 0.3)),
    }
    return {name: value for name, value in options.items() if dice.random() < 0.5}


def _gradients(names: list[str], steps: int, dice: random.Random) -> list[dict[str, str]]:
    often = dice.choice((0.0, 0.1, 0.4))
    kinds = ("absent", "zero", "nan", "inf")
    result = [
        {name: dice.choice(kinds) for name in names if dice.random() < often} for _ in range(steps)
    ]
    for of_step in result:
        if all(of_step.get(name) == "absent" for name in names):
            of_step.clear()  # an optimizer's first step would be refused
    return result


def _settings(dice: random.Random) -> dict[str, Any]:
    """Valid ones for the most part."""
    rule = dice.choice(list(_ROOT_METHODS))
    choices: dict[str, tuple[Any, ...]] = {
        "root_method": _ROOT_METHODS[rule],
        "betas": ((0.9, 0.95), (0.0, 0.99), (0.9, 1.0)),
        "eps": (1e-5,),
        "weight_decay": (0.0, 0.1),
        "large_dim": ("one_sided", "diagonal"),
        "max_factor_ratio": (1.0, 1.5, 1e9),
        "merge_dims": ("small",),
        "start_preconditioning_step": (1, 3, 5),
        "refresh_warmup_steps": (0, 3),
        "refresh_schedule": ("together",),
        "root_exponents": ([0.4, 0.3],),
        "grafting": ("adam", "rmsprop", "adagrad", "sgd", "none"),
        "grafting_beta2": (0.8,),
        "grafting_eps": (1e-4,),
        "beta3": (0.0, 0.5, 0.9),
        "preconditioner_eps": (1e-6,),
        "use_bias_correction": (False,),
        "momentum": (0.8,),
        "nesterov": (True,),
        "dampening": (0.3,),
        "weight_decay_type": ("l2", "independent"),
        "factor_dtype": ("bfloat16",),
        "root_dtype": ("bfloat16",),
        "momentum_dtype": ("bfloat16",),
        "second_moment_dtype": ("bfloat16",),
        "symmetric_packing": (True,),
        "on_nonfinite": ("raise",),
        "exclude": ([], ["w0", "emb"]),
        "excluded_lr_factor": (0.3,),
        "base_width": (8,),
        "precondition_1d": (True,),
        "communication_dtype": ("bfloat16",),
        **_ANYWHERE,
    }
    known = {field.name for field in dataclasses.fields(ShampooConfig)}
    assert choices.keys() <= known | {"betas", "eps", "weight_decay"}
    often = dice.choice((0.1, 0.3))
    chosen = {name: dice.choice(of) for name, of in choices.items() if dice.random() < often}
    return {
        "lr": 1e-2,
        "lr_factor": 1.0,
        "preconditioner": rule,
        "max_preconditioner_dim": dice.choice((3, 4, 8, 8, 16, 64)),
        "precondition_frequency": dice.choice((1, 2, 3, 5)),
        **chosen,
    }
