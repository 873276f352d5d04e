"""The report says what the plan means, and why it is not more even."""

import json
import math
import subprocess
import sys

import pytest

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.plan.shards import ParameterSpec, Sharded
from shampoo_fsdp.tools.command import main
from shampoo_fsdp.tools.models import model_specs
from shampoo_fsdp.tools.plan_figures import JobPlan


def report_of(model: str, mesh: dict[str, int], **settings) -> dict:
    return JobPlan(model, [model_specs(model, mesh)], ShampooConfig(**settings)).figures


def as_json(capsys, *arguments: str):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_figures_of_llama3_8b_on_64_ranks(capsys):
    report = as_json(capsys, "--model", "llama3-8b", "--mesh", "dp_shard=64")
    assert report["ranks"] == 64
    assert report["blocks_by_shape"] == {"1024 x 1024": 6656}
    assert report["elements_preconditioned"] == 6656 * 1024**2
    per_rank = report["per_rank"]
    adamw = report["elements"] * 8 / 2**30  # two moments in fp32
    assert per_rank["adamw_state_gib"]["mean"] * 64 == pytest.approx(adamw)
    # Two moments of everything; of each block two factors in fp32 and two inverse roots in bf16.
    shampoo = adamw + 6656 * 2 * 1024**2 * (4 + 2) / 2**30
    assert per_rank["state_gib"]["mean"] * 64 == pytest.approx(shampoo)
    sent = per_rank["gib_sent_inside_node"]["mean"] + per_rank["gib_sent_across_nodes"]["mean"]
    assert sent * 64 == pytest.approx(report["gib_sent_by_all_ranks"])
    assert sum(phase["blocks_refreshed"] for phase in report["phases"]) == 6656
    assert report["worst_rank"]["load_over_mean"] <= 1.05
    assert report["even"]


@pytest.mark.parametrize(
    ("head_dim", "blocks", "without"),
    # 4096 + 2 * 1024 rows in 32 layers.
    [(128, {"128 x 1024": 48 * 4 * 32}, {"128 x 1024": [1024]}), (256, {"256 x 1024": 3072}, {})],
)
def test_blocks_of_single_heads_lack_their_long_factor(head_dim, blocks, without):
    heads = {"split_heads": [r"\.w[qkv]\."], "head_dim": head_dim}
    report = report_of("llama3-8b", {"dp_shard": 8}, **heads)
    assert report["blocks_by_shape"] == blocks | {"1024 x 1024": 5888}
    assert report["sides_without_factor"] == without


def test_fewer_blocks_than_ranks_are_the_reason_given():
    report = report_of("llama3-8b", {"dp_shard": 512}, max_preconditioner_dim=16384)
    reason = report["worst_rank"]["reason"]
    assert "224 blocks" in reason
    assert "At least 288 ranks own none" in reason
    assert not report["even"]


def test_too_few_refreshes_per_step_are_the_reason_given():
    report = report_of("llama3-8b", {"dp_shard": 64, "tp": 8})
    rank, _, phase, ratio, reason = report["worst_rank"].values()
    assert ratio > 1.05
    assert f"rank {rank} has {ratio:.3f} x the mean load in refresh phase {phase}" in reason
    assert "Blocks are whole" in reason and "precondition_frequency (now 10)" in reason


def test_replicas_that_repeat_the_work_are_reported_once():
    report = report_of("llama3-8b", {"dp_replicate": 4, "dp_shard": 8}, owner_scope="shard")
    assert report["ranks"] == 8 and report["nodes"] == 1
    assert report["per_rank"]["blocks"]["mean"] == 6656 / 8
    assert report["per_rank"]["gib_sent_across_nodes"]["max"] == 0


def test_parts_of_a_pipeline_share_no_blocks():
    def stage(number: int, matrices: int) -> list[ParameterSpec]:
        ranks = (2 * number, 2 * number + 1)
        return [
            ParameterSpec(f"layers.{number}.{i}.w", (64, 64), ranks, (2,), (Sharded(0),))
            for i in range(matrices)
        ]

    config = ShampooConfig(max_preconditioner_dim=32, precondition_frequency=2)
    report = JobPlan("pipeline", [stage(0, 4), stage(1, 8)], config).figures
    assert report["per_rank"]["blocks"] == {"min": 8, "mean": 12, "max": 16}
    assert report["imbalance"]["blocks"] == pytest.approx(4 / 3)
    assert "cannot move between the 2 sets of ranks" in report["worst_rank"]["reason"]


def test_a_model_without_matrices_is_reported():
    spec = ParameterSpec("norm.weight", (64,), (0, 1), (2,), (Sharded(0),))
    report = JobPlan("norms", [[spec]], ShampooConfig()).figures
    assert report["worst_rank"]["reason"] == "nothing is preconditioned"
    assert report["per_rank"]["state_gib"] == report["per_rank"]["adamw_state_gib"]
    assert not math.isnan(sum(report["imbalance"].values()))


def test_tables_for_people(capsys):
    assert main(["plan", "--model", "llama3-8b", "--mesh", "dp_shard=16"]) == 0
    out = capsys.readouterr().out
    for words in ("max / mean", "1024 x 1024", "state with AdamW, GiB", "Balance: rank"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan --model llama3-8b --mesh dp_shard", "mesh 'dp_shard' is not understood"),
        ("plan --model llama3-8b --mesh tp=2,tp=2", "is not understood at 'tp=2'"),
        ("plan --model llama3-8b --mesh fsdp=2", "mesh dimension 'fsdp' of 2 cannot be"),
        ("plan --model llama3-8b --mesh pp=33", "pp = 33 stages cannot share the 32 layers"),
        ("plan --model llama3-8b --mesh tp=2 --buckets 0", "'buckets'"),
        (
            "plan --model llama3-8b --mesh tp=2 --split_heads wqkv --head_dim 128",
            "'split_heads' is 'wqkv'; allowed: what the name of a preconditioned parameter matches",
        ),
        ("plan --hf no.json --mesh dp_shard=2", "--hf 'no.json': there is no such file"),
        ("plan --module no.py:build --mesh dp_shard=2", "--module 'no.py:build'"),
        ("compare --model mine.py:build", "--model and --data: give both"),
        ("compare --model no.py:build --data mine.py:batches", "--model 'no.py:build'"),
        ("compare --lr adam=1", "--lr 'adam=1': write NAME=LR"),
        ("inspect nowhere", "there is no such folder"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, message):
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert message in line


def test_who_stops_reading_is_told_of_no_error():
    command = "-m shampoo_fsdp plan --model llama3-8b --mesh dp_shard=8 --json"
    command = [sys.executable, *command.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `| head` does
        assert process.stderr.read() == b""
    assert process.returncode == 0
