"""What a checkpoint claims must be there, and what it says fits the screen."""

import collections
import dataclasses
import itertools
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from shampoo_fsdp import Shampoo
from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.grid import BlockGrid
from shampoo_fsdp.rules.layout import settings_marker
from shampoo_fsdp.tools.command import main
from shampoo_fsdp.tools.inspection import inspect_checkpoint

KEY = "optimizer.state.w.exp_avg"


def saved(folder: Path, **settings: Any) -> Path:
    state = {"state.w.exp_avg": torch.ones(2, 3), "state.w.step": torch.ones(())}
    groups = {f"param_groups.w.{name}": value for name, value in settings.items()}
    dcp.save({"optimizer": state | groups}, checkpoint_id=folder)
    return folder


def move_files(found: Metadata, path: str) -> None:
    for info in found.storage_data.values():
        info.relative_path, info.offset, info.length = path, 0, 0


def rename(found: Metadata, new: str) -> None:
    found.state_dict_metadata[new] = found.state_dict_metadata.pop(KEY)
    index = MetadataIndex(KEY, (0, 0))
    found.storage_data[MetadataIndex(new, (0, 0))] = found.storage_data.pop(index)


def enlarge(found: Metadata, whole: int, piece: int) -> None:
    entry = found.state_dict_metadata[KEY]
    entry.size = torch.Size((whole, 3))
    entry.chunks[0].sizes = torch.Size((piece, 3))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: move_files(m, "../secret"), "secret', outside of the folder, which was not"),
        (lambda m: move_files(m, "/etc/passwd"), "'/etc/passwd', outside of the folder, which was"),
        (lambda m: move_files(m, "pipe"), "pipe is missing or no file"),
        (lambda m: rename(m, "optimizer.state.\x1b]0;x\x07.exp_avg"), "is no printable text"),
        (lambda m: enlarge(m, 10**14, 10**14), f"a piece of '{KEY}' takes 1,200,000,000,000,000"),
        (lambda m: enlarge(m, 10**14, 2), f"the pieces of '{KEY}' are not the whole of"),
    ],
)
def test_what_is_claimed_must_be_there(
    tmp_path: Path, capsys: Any, change: Callable[[Metadata], None], said: str
) -> None:
    folder = saved(tmp_path / "step-1")
    os.mkfifo(folder / "pipe")
    found = pickle.loads((folder / ".metadata").read_bytes())
    change(found)
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    assert main(["inspect", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_files_that_hold_something_else_are_said_in_a_line(tmp_path, capsys):
    folder = saved(tmp_path / "step-1")
    (file,) = folder.glob("*.distcp")
    file.write_bytes(os.urandom(file.stat().st_size))
    assert main(["inspect", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'optimizer.state.w.step' is damaged, or holds" in line


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("exp_avg", None, "the state of 'w' is not of the form that Shampoo gives it (KeyError: "),
        ("step", "soon", "invalid literal"),
        ("exp_avg", torch.ones(10**12, 0), "'optimizer.state.w.exp_avg' is empty."),
        ("factors", torch.ones(7), "no choice of factors has the 7 elements"),
    ],
)
def test_state_of_another_form_is_said_in_a_line(tmp_path, capsys, entry, value, said):
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Shampoo([("w", weight)])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    (state,) = optimizer.state_dict()["state"].values()
    keys = {f"state.w.{name}": x for name, x in state.items() if name != entry}
    if value is not None:
        keys[f"state.w.{entry}"] = value
    dcp.save({"optimizer": keys}, checkpoint_id=tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        ([range(121), range(121)], "cut into 14,400 blocks"),
        ([[n * (n - 1) // 2 for n in range(1, 16)]] * 2, "cut into 196 blocks"),
    ],
)
def test_more_blocks_than_there_is_room_for_are_refused(tmp_path, capsys, cuts, said):
    cuts = tuple(tuple(c) for c in cuts)
    shape = tuple(c[-1] for c in cuts)
    marker = settings_marker(ShampooConfig(), BlockGrid(shape, 0, cuts).fingerprint)
    state = {"exp_avg": torch.ones(shape), "max_preconditioner_dim": torch.empty(marker)}
    keys = {f"state.w.{name}": value for name, value in state.items()}
    dcp.save({"optimizer": keys}, checkpoint_id=tmp_path, no_dist=True)
    found = pickle.loads((tmp_path / ".metadata").read_bytes())
    entry = found.state_dict_metadata[KEY]
    (place,) = (v for k, v in found.storage_data.items() if k.fqn == KEY)
    entry.chunks = []
    for row, column in itertools.product(*map(itertools.pairwise, cuts)):
        offsets = torch.Size((row[0], column[0]))
        sizes = torch.Size((row[1] - row[0], column[1] - column[0]))
        entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
        length = sizes.numel() * 4
        found.storage_data[MetadataIndex(KEY, offsets)] = dataclasses.replace(place, length=length)
        place = dataclasses.replace(place, offset=place.offset + length)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(found))
    assert main(["inspect", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


class Twice:
    """Pickled, a few bytes more for a value of twice the size."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return collections.OrderedDict, ((1, self.value), (2, self.value))


def test_values_that_are_none_for_people_are_not_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    huge: object = "x" * 1000
    for _ in range(40):
        huge = Twice(huge)
    folder = saved(tmp_path / "step-1", lr=huge, eps="\x1b[2J", foreach="[/red] [link=x]y")
    for form in ([], ["--json"]):  # [x] is markup of the tables
        assert main(["inspect", str(folder), *form]) == 0
        out = capsys.readouterr().out
        assert "(no plain value)" in out and "\x1b" not in out and len(out) < 10_000
        assert "[/red] [link=x]y" in out


@pytest.mark.parametrize("whole", [True, False])
def test_many_blocks_are_read_a_few_times_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Also where the factors of all of them were saved in one piece."""
    weight = torch.nn.Parameter(torch.ones(32, 32))
    optimizer = Shampoo([("w", weight)], max_preconditioner_dim=4)
    state = {
        f"state.w.{entry}": value.whole() if whole and hasattr(value, "whole") else value
        for entry, value in optimizer.state[weight].items()
    }
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path)
    read: collections.Counter[Any] = collections.Counter()
    entry_of = SafeFileSystemReader.entry

    def entry(reader: SafeFileSystemReader, *key: Any) -> Any:
        read[key] += 1
        return entry_of(reader, *key)

    monkeypatch.setattr(SafeFileSystemReader, "entry", entry)
    (found,) = inspect_checkpoint(tmp_path)["parameters"]
    assert [len(block["factors"]) for block in found["blocks"]] == [2] * 64
    assert max(read.values()) <= 2
