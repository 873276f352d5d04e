"""`python -m shampoo_fsdp inspect` tells of a checkpoint what its optimizer would have told."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from shampoo_fsdp import Shampoo
from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader
from shampoo_fsdp.runtime.diagnostics import merged
from shampoo_fsdp.tools.command import main
from shampoo_fsdp.tools.inspection import inspect_checkpoint
from tests.distributed.test_checkpoints import Built, make, states
from tests.models import train
from tests.ranks import run_ranks

WQ = "layers.0.attention.wq.weight"
STEPS = 5

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "flat": {},
    "not flat": {},
    "diagonals": {"large_dim": "diagonal"},
    "soap, packed": {"preconditioner": "soap", "symmetric_packing": True},
    "fewer factors": {"max_factor_ratio": 0.5},
    "heads": {"split_heads": ["wq"], "head_dim": 6},
    "cut at shards": {"block_alignment": "shard"},
}
"""Settings."""


def save(folder: Path) -> None:
    for name, settings in CHECKPOINTS.items():
        built, optimizer = make("fsdp", **settings)
        train(built, optimizer, range(STEPS))
        dcp.save(states(built, optimizer, name != "not flat"), checkpoint_id=folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspection")
    run_ranks(2, save, folder=path)
    return path


def inspect(capsys: Any, *arguments: object) -> dict[str, Any]:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def optimizer_alone() -> tuple[Built, Any]:
    built, optimizer = make("single")
    train(built, optimizer, range(STEPS))
    return built, optimizer


@pytest.mark.parametrize("name", ["flat", "not flat"])
def test_it_tells_what_the_optimizer_has(folder, capsys, name):
    report = inspect(capsys, folder / name)
    built, optimizer = optimizer_alone()
    assert report["optimizer"] == "Shampoo"
    assert report["bytes_on_disk"] == sum(f.stat().st_size for f in (folder / name).iterdir())
    parameters = {p["name"]: p for p in report["parameters"]}
    assert parameters.keys() == dict(built.model.named_parameters()).keys()
    wq = parameters[WQ]
    assert wq["step"] == wq["factor_step"] == STEPS and wq["shape"] == [24, 24]
    assert wq["preconditioner"] == "kl_shampoo" and wq["max_preconditioner_dim"] == 16
    assert (wq["settings"]["lr"], wq["settings"]["lr_factor"]) == (5e-3, 2.0)
    assert wq["settings"]["weight_decay"] == 0.1
    assert parameters["norm.weight"]["blocks"] == []
    factors = optimizer.state_dict()["state"]
    index = [n for n, _ in built.model.named_parameters()].index(WQ)
    matrices = factors[index]["factors"].view(4, 2, 12, 12).double()
    assert [b["offsets"] for b in wq["blocks"]] == [[0, 0], [0, 12], [12, 0], [12, 12]]
    for block, expected in zip(wq["blocks"], matrices, strict=True):
        for factor, matrix in zip(block["factors"], expected, strict=True):
            values = torch.linalg.eigvalsh(matrix).clamp(min=0.0)
            floor = values[-1] * 1e-5  # that of the roots of KL-Shampoo
            condition = values[-1] / torch.maximum(values[0], floor)
            assert factor["condition_number"] == pytest.approx(condition.item(), rel=1e-3)
            shares = values / values.sum()
            entropy = -sum(s * math.log(s) for s in shares.tolist() if s > 0.0)
            assert factor["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("diagonals", {WQ: ["diagonal", "diagonal"], WQ.replace("wq", "wk"): ["full", "diagonal"]}),
        ("soap, packed", {WQ: ["packed", "packed"]}),
        ("fewer factors", {WQ: ["full", "full"], "layers.0.feed_forward.w1.weight": ["full"]}),
        ("cut at shards", {WQ: ["full", "full"]}),
    ],
)
def test_every_kind_of_factor_is_known(folder, capsys, name, kinds):
    parameters = {p["name"]: p for p in inspect(capsys, folder / name)["parameters"]}
    for parameter, expected in kinds.items():
        rule = CHECKPOINTS[name].get("preconditioner", "kl_shampoo")
        assert parameters[parameter]["preconditioner"] == rule
        for block in parameters[parameter]["blocks"]:
            factors = sorted(block["factors"], key=lambda f: f["dimension"])
            assert sorted(f["kind"] for f in factors) == sorted(expected)
            assert [f["n"] for f in factors] == [block["shape"][f["dimension"]] for f in factors]
            assert all(f["condition_number"] >= 1.0 for f in factors)


def test_blocks_are_cut_between_heads(folder, capsys):
    report = inspect(capsys, folder / "heads", "--parameter", "layers.0.attention.wq")
    (wq,) = report["parameters"]
    assert [b["offsets"] for b in wq["blocks"]] == [
        [row, column] for row in (0, 6, 12, 18) for column in (0, 12)
    ]


def test_numbers_that_are_not_finite_are_found(folder, capsys, tmp_path):
    built, optimizer = optimizer_alone()
    saved = states(built, optimizer, flat=True)
    saved["optimizer"][f"state.{WQ}.factors"][7] = float("nan")
    saved["optimizer"]["state.norm.weight.exp_avg"][:2] = float("inf")
    saved["model"]["output.weight"][0, 0] = float("-inf")
    dcp.save(saved, checkpoint_id=tmp_path)
    report = inspect(capsys, tmp_path)
    found = {p["name"]: p["nonfinite"] for p in report["parameters"] if p["nonfinite"]}
    assert found == {
        WQ: {"factors": 1}, "norm.weight": {"exp_avg": 2}, "output.weight": {"weight": 1},
    }  # fmt: skip
    (wq,) = [p for p in report["parameters"] if p["name"] == WQ]
    assert wq["blocks"][0]["factors"][0]["condition_number"] is None
    assert main(["inspect", str(tmp_path)]) == 0
    assert f"{WQ}: NaN or infinite: 1 in factors" in capsys.readouterr().out


def test_a_choice_of_parameters_and_blocks(folder, capsys):
    chosen = inspect(capsys, folder / "flat", "--parameter", "wq|norm", "--blocks", "1")
    names = [p["name"] for p in chosen["parameters"]]
    assert names == [
        WQ, "layers.0.attention_norm.weight", "layers.0.ffn_norm.weight", "norm.weight",
    ]  # fmt: skip
    wq = chosen["parameters"][0]
    assert len(wq["blocks"]) == 1 and wq["number_of_blocks"] == 4
    assert main(["inspect", str(folder / "flat"), "--blocks", "1"]) == 0
    assert "1 of 4" in capsys.readouterr().out


def test_no_more_is_read_at_once_than_a_rank_has_written_at_once(folder, capsys, monkeypatch):
    sizes = []
    entry = SafeFileSystemReader.entry

    def recorded(self: Any, *arguments: Any) -> Any:
        sizes.append(getattr(found := entry(self, *arguments), "nbytes", 0))
        return found

    monkeypatch.setattr(SafeFileSystemReader, "entry", recorded)
    inspect(capsys, folder / "flat")
    assert max(sizes) == 26 * 24 * 4  # half of w1, of 52 rows


def test_what_cannot_be_inspected_is_said_in_a_line(folder, capsys, tmp_path):
    built, _ = make("single")
    adamw = torch.optim.AdamW(built.model.parameters())
    dcp.save(states(built, adamw, flat=True), checkpoint_id=tmp_path / "step-1")
    dcp.save({"model": states(built, adamw, True)["model"]}, checkpoint_id=tmp_path / "model")
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "step-1")]) == 0
    assert "AdamW (or another optimizer) has saved this" in capsys.readouterr().out

    def refusal(*arguments: object) -> str:
        assert main(["inspect", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "there is no such folder" in refusal(tmp_path / "nowhere")
    assert "there is no checkpoint in it" in refusal(tmp_path / "empty")
    assert "it holds the checkpoints model, step-1; choose one" in refusal(tmp_path)
    assert "has no optimizer state; was only the model saved?" in refusal(tmp_path / "model")
    assert "no name matches 'zz'" in refusal(folder / "flat", "--parameter", "zz")
    assert "is no regular expression" in refusal(folder / "flat", "--parameter", "(")
    (torn,) = (tmp_path / "step-1").glob("*.distcp")
    torn.write_bytes(torn.read_bytes()[:999])
    assert f"{torn.name} has 999 bytes, of which there should be" in refusal(tmp_path / "step-1")
    (tmp_path / "step-1" / ".metadata").write_bytes(b"")
    assert ".metadata cannot be read (EOFError" in refusal(tmp_path / "step-1")
    (tmp_path / "step-1" / ".metadata").unlink()
    assert "saving it has not finished" in refusal(tmp_path / "step-1")


@pytest.mark.parametrize("preconditioner", ["shampoo", "soap", "kl_shampoo"])
@pytest.mark.parametrize("rank", [3, 12])
def test_the_condition_number_is_that_of_the_log(tmp_path, preconditioner, rank):
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(12, 12, bias=False)
    settings = {"preconditioner": preconditioner, "betas": (0.9, 0.5 if rank == 3 else 0.95)}
    optimizer = Shampoo(model.named_parameters(), **settings)
    (rows,) = torch.randn(1, rank, 12, generator=generator)
    for _ in range(30):
        model.weight.grad = torch.randn(12, rank, generator=generator) @ rows
        optimizer.step()
    dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=tmp_path)
    (weight,) = inspect_checkpoint(tmp_path)["parameters"]
    inspected = max(factor["condition_number"] for factor in weight["blocks"][0]["factors"])
    logged = merged([optimizer.diagnostics()])["condition_number"]
    assert logged == pytest.approx(inspected, rel=0.01 if rank == 3 else 0.25)
