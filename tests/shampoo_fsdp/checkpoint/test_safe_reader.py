"""Checkpoints from strangers: what their files ask for is refused by name, and never run."""

import enum
import io
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from shampoo_fsdp import Shampoo
from shampoo_fsdp.checkpoint import ShampooLoadPlanner, find_damage
from shampoo_fsdp.checkpoint.safe_reader import (
    SafeFileSystemReader,
    UnsafeCheckpoint,
    load_values,
    without_code,
)
from shampoo_fsdp.tools.command import main


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def dotted(module, name):
    """Protocol 4 finds an attribute of an attribute."""
    texts = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
    return b"\x80\x04" + texts + b"\x93."


HOSTILE = {
    "a command": lambda ran: pickle.dumps(Calls(os.system, f"touch {ran}")),
    "an expression": lambda ran: pickle.dumps(Calls(eval, f"open({str(ran)!r}, 'w')")),
    "in an entry": lambda ran: pickle.dumps(
        Metadata({"key": Calls(os.mkdir, str(ran))}, storage_data={})
    ),
    "of an allowed module": lambda ran: dotted("torch", "load"),
    "an attribute of an allowed class": lambda ran: dotted(
        "torch.distributed.checkpoint.metadata", "Metadata.__init__"
    ),
    "getattr": lambda ran: pickle.dumps(Calls(getattr, os, "system")),
}
NAMES = {
    "a command": "posix.system",
    "an expression": "builtins.eval",
    "in an entry": "posix.mkdir",
    "of an allowed module": "torch.load",
    "an attribute of an allowed class": "Metadata.__init__",
    "getattr": "getattr|posix",
}


@pytest.fixture
def folder(tmp_path):
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Shampoo([("w", weight)])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("what", HOSTILE)
def test_metadata_runs_nothing(what, folder, capsys, tmp_path):
    ran = tmp_path / "ran"
    try:
        data = HOSTILE[what](ran)
    except TypeError:  # modules cannot be pickled
        data = dotted("builtins", "getattr")[:-1] + b"cposix\nsystem\n\x8c\x01x\x86R."
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(UnsafeCheckpoint, match=NAMES[what]):
        SafeFileSystemReader(folder).read_metadata()
    assert "nothing was run" in find_damage(folder)
    assert main(["inspect", str(folder)]) != 0
    assert "nothing was run" in capsys.readouterr().err
    assert not ran.exists()


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"not a pickle", pickle.dumps({"a": 1})])
def test_damaged_metadata_is_said(data, folder):
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        SafeFileSystemReader(folder).read_metadata()
    assert "cannot be read" in find_damage(folder)


def test_a_folder_that_fsspec_reaches_is_read_as_safely(folder, tmp_path):
    far = pytest.importorskip("fsspec").filesystem("memory")
    for file in folder.iterdir():
        far.pipe(f"/far/{file.name}", file.read_bytes())
    ours = SafeFileSystemReader("memory://far").read_metadata()
    assert (
        ours.state_dict_metadata == SafeFileSystemReader(folder).read_metadata().state_dict_metadata
    )
    optimizer = Shampoo([("w", nn.Parameter(torch.ones(4, 4)))])
    state = {"optimizer": optimizer.state_dict()}
    dcp.load(
        state, storage_reader=SafeFileSystemReader("memory://far"), planner=ShampooLoadPlanner()
    )
    assert find_damage("memory://far") == ""
    (name,) = (file.name for file in folder.glob("*.distcp"))
    far.pipe(f"/far/{name}", b"torn")
    assert f"{name} has 4 bytes" in find_damage("memory://far")
    far.rm(f"/far/{name}")
    assert f"{name} is missing" in find_damage("memory://far")
    far.pipe("/far/.metadata", HOSTILE["a command"](tmp_path / "ran"))
    assert "nothing was run" in find_damage("memory://far")
    assert not (tmp_path / "ran").exists()
    assert find_damage("memory://nowhere") == "there is no such folder"


def test_a_key_that_would_take_days_is_not_hashed(folder):
    (folder / ".metadata").write_bytes(b"\x80\x04}K\x01" + b"2\x86" * 60 + b"K\x01s.")
    with pytest.raises(ValueError, match="DUP"):
        SafeFileSystemReader(folder).read_metadata()


def test_what_was_saved_is_read_as_pytorch_reads_it(folder):
    ours = SafeFileSystemReader(folder).read_metadata()
    theirs = dcp.FileSystemReader(folder).read_metadata()
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for key, value in theirs.state_dict_metadata.items():
        mine = ours.state_dict_metadata[key]
        assert type(mine) is type(value)
        if hasattr(value, "size"):
            assert (mine.size, mine.chunks) == (value.size, value.chunks)
            assert mine.properties.dtype == value.properties.dtype
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data == theirs.storage_data


def test_an_entry_that_is_code_is_not_loaded(tmp_path):
    ran = tmp_path / "ran"
    state = {"entry": Calls(os.mkdir, str(ran))}
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    assert not ran.exists()
    wanted = {"entry": 0}
    with pytest.raises(dcp.api.CheckpointException, match="mkdir"):
        dcp.load(
            wanted,
            storage_reader=SafeFileSystemReader(tmp_path / "saved"),
            planner=ShampooLoadPlanner(),
            no_dist=True,
        )
    assert not ran.exists()


def test_a_file_is_no_folder(folder, capsys):
    assert main(["inspect", str(folder / ".metadata")]) != 0
    assert "it is a file; give the folder" in capsys.readouterr().err


def test_a_pickle_in_an_entry_becomes_one_that_calls_nothing(tmp_path):
    plain = {"a": [1, 2.0, None, {3}], "b": torch.ones(2), "c": b"x", "d": (True, "y")}
    assert str(pickle.loads(without_code(pickle.dumps(plain), "it"))) == str(plain)
    hostile = pickle.dumps({"a": Calls(os.mkdir, str(tmp_path / "ran"))})
    with pytest.raises(UnsafeCheckpoint, match=r"'it' asks for 'posix\.mkdir'.*nothing was run"):
        without_code(hostile, "it")
    assert not (tmp_path / "ran").exists()


def test_what_the_user_allows_is_read():
    saved = io.BytesIO()
    torch.save(Path("x"), saved)
    for read in (
        lambda: load_values(io.BytesIO(saved.getvalue()), "it"),
        lambda: pickle.loads(without_code(pickle.dumps(Path("x")), "it")),
    ):
        with pytest.raises(UnsafeCheckpoint, match=r"PosixPath.*add_safe_globals"):
            read()
        with torch.serialization.safe_globals([type(Path("x"))]):
            assert read() == Path("x")


def test_a_pickle_cannot_change_the_classes_that_it_names(folder):
    name = f"c{Metadata.__module__}\nMetadata\n".encode()
    set_version = b"N}\x8c\x07versionK\x07s\x86b"
    (folder / ".metadata").write_bytes(b"\x80\x04" + name + set_version + b".")
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        SafeFileSystemReader(folder).read_metadata()
    assert Metadata.version is None


class OldPickler(pickle.Pickler):
    """Pickles enums by their names, as early Python 3.11 did."""

    def reducer_override(self, obj):
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_metadata_of_older_pytorch_and_python_is_known(folder):
    """The properties of its tensors came from another module."""
    expected = dcp.FileSystemReader(folder).read_metadata()
    text = io.BytesIO()
    OldPickler(text, protocol=3).dump(expected)  # with names as text
    data = text.getvalue()
    for name in ("TensorProperties", "_MEM_FORMAT_ENCODING"):
        now = f"c{Metadata.__module__}\n{name}\n".encode()
        assert now in data
        old = f"ctorch.distributed._shard.sharded_tensor.metadata\n{name.lstrip('_')}\n"
        data = data.replace(now, old.encode())
    (folder / ".metadata").write_bytes(data)
    found = SafeFileSystemReader(folder).read_metadata()
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data


def test_a_few_bytes_take_no_memory(folder):
    """An entry of the pickle's table of objects, far behind its end."""
    (folder / ".metadata").write_bytes(b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".")
    tracemalloc.start()
    with pytest.raises(ValueError, match="it numbers more objects than it has bytes"):
        SafeFileSystemReader(folder).read_metadata()
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
