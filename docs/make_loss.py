"""Draws the README's picture, docs/loss.png, from the study's results: python -m docs.make_loss"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from studies import plots
from studies.pretrain.summary import reached

_RUNS = Path("studies/pretrain/results/batches/runs.jsonl")
_SIZE, _BASELINE = "1M-full-8k", "AdamW"


def _seed(record: dict[str, Any]) -> int:
    return int(record["settings"]["debug.seed"])


def main() -> None:
    """Loss against steps, and how much earlier KL-Shampoo is where AdamW ends,
    seed by seed."""
    records = [json.loads(line) for line in _RUNS.read_text().splitlines()]
    final = [r for r in records if r["size"] == _SIZE and r["stage"] == "final"]
    figure, (axis,) = plots.panels(1, 1, 3.4)
    curves = {}
    for name in (_BASELINE, "Muon", "KL-Shampoo"):
        runs = sorted((r for r in final if r["contestant"] == name), key=_seed)
        steps, seeds = runs[0]["step"], [r["loss"] for r in runs]
        plots.band(axis, steps, seeds, name, **plots.style_of(name))
        curves[name] = runs
    end, aims = steps[-1], [run["loss"][-1] for run in curves[_BASELINE]]
    pairs = zip(curves["KL-Shampoo"], aims, strict=True)
    there = np.mean([found[0] for run, aim in pairs if (found := reached(run, aim))])
    aim = np.mean(aims)
    plots.reference(axis, aim)
    arrow = {"arrowstyle": "->", "color": "0.3", "lw": 1.2}
    axis.annotate("", (there, aim), (end, aim), arrowprops=arrow)
    axis.text(there - 15, aim - 0.004, f"{1 - there / end:.0%} fewer steps ", ha="right", va="top")
    axis.set(ylim=(0.85, 1.45), xlim=(0, end + 40))
    plots.finish(
        axis,
        "Llama of 1 M parameters, 20 tokens per parameter; two seeds, lr tuned for each",
        xlabel="steps of 8,192 tokens",
        ylabel="held-out loss, nats per token",
    )
    plots.save(figure, Path("docs/loss.png"))


if __name__ == "__main__":
    main()
