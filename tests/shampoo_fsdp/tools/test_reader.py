"""What a checkpoint claims must be there, and what it says fits the screen."""

import collections
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from shampoo_fsdp import Shampoo
from shampoo_fsdp.tools.command import main

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
        (lambda m: enlarge(m, 10**14, 10**14), "you tried to allocate 1200000000000000 bytes"),
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
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert main(["inspect", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'optimizer.state.w.exp_avg' is damaged, or holds" in line


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("exp_avg", None, "the state of 'w' is not of the form that Shampoo gives it (KeyError: "),
        ("step", "soon", "the state of 'w' is not of the form that Shampoo gives it"),
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
