"""What `compare` trains without a model of yours: a Llama of 1.1 M parameters on bytes of Python
source, the text that is on every machine with Python."""

import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

_DIM, _LAYERS, _HEADS, _HIDDEN = 128, 5, 4, 352
_VOCABULARY, _LENGTH, _SEQUENCES = 256, 128, 16
_NOT_READ = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(_DIM, 1e-5), nn.RMSNorm(_DIM, 1e-5)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(_DIM, _DIM, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(_DIM, _HIDDEN, bias=False) for _ in range(2))
        self.w2 = nn.Linear(_HIDDEN, _DIM, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (
            project(h).view(*h.shape[:2], _HEADS, -1).transpose(1, 2)
            for project in (self.wq, self.wk, self.wv)
        )
        q, k = _rotated(q, rotation), _rotated(k, rotation)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(attended.transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        out: Tensor = x + self.w2(functional.silu(self.w1(h)) * self.w3(h))
        return out


class _SmallLlama(nn.Module):
    rotation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(_VOCABULARY, _DIM)
        self.layers = nn.ModuleList(_Layer() for _ in range(_LAYERS))
        self.norm = nn.RMSNorm(_DIM, 1e-5)
        self.output = nn.Linear(_DIM, _VOCABULARY, bias=False)
        # As TorchTitan starts its Llamas.
        nn.init.normal_(self.tok_embeddings.weight)
        nn.init.trunc_normal_(self.output.weight, std=_DIM**-0.5)
        for depth, layer in enumerate(self.layers):
            for name, linear in layer.named_children():
                if isinstance(linear, nn.Linear):
                    first = name in ("wq", "wk", "wv", "w1")
                    std = 0.02 if first else 0.02 / math.sqrt(2 * (depth + 1))
                    nn.init.trunc_normal_(linear.weight, std=std)
        half = _DIM // _HEADS // 2
        angles = torch.outer(torch.arange(_LENGTH), 1e4 ** (-torch.arange(half) / half))
        self.register_buffer("rotation", torch.stack([angles.cos(), angles.sin()]), False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.rotation)
        return functional.cross_entropy(self.output(self.norm(x)).flatten(0, 1), targets.flatten())


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    cos, sin = rotation
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def build() -> nn.Module:
    """The model; its forward takes tokens and targets, [B, T] each, and returns the loss."""
    return _SmallLlama()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """16 sequences of 128 bytes and what follows each byte, other ones on each rank; each is seen
    once."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    text = _text()
    each = _SEQUENCES * (_LENGTH + 1)
    for start in range(rank * each, len(text) - each, ranks * each):
        rows = text[start : start + each].view(_SEQUENCES, -1).long()
        yield rows[:, :-1], rows[:, 1:]


def _text() -> Tensor:
    """All modules of the standard library, in pieces that are mixed, so that batches resemble each
    other."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in library.rglob("*.py") if not _NOT_READ & {*f.relative_to(library).parts}]
    data = b"".join(path.read_bytes() for path in sorted(files))
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = rows[: len(rows) // (_LENGTH + 1) * (_LENGTH + 1)].view(-1, _LENGTH + 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order].flatten()
