"""Checkpoints from strangers: what their files ask for is refused by name, and never run."""

import collections
import contextlib
import dataclasses
import enum
import io
import os
import pickle
import shutil
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from shampoo_fsdp import Shampoo
from shampoo_fsdp.checkpoint import ShampooLoadPlanner, find_damage
from shampoo_fsdp.checkpoint.safe_pickle import UnsafeCheckpoint
from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader
from shampoo_fsdp.checkpoint.safe_values import load_values, without_code
from shampoo_fsdp.tools.command import main
from tests import hostile
from tests.hostile import alarm
from tests.ranks import run_ranks


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


NESTED = b"K\x01q\xfa" + b"h\xfa\x86q\xfa" * 60  # a tuple of 2^60 numbers
HASH = sys.hash_info.modulus  # all multiples of it have one hash


@pytest.mark.parametrize(
    "data",
    [
        b"}" + NESTED + b"Ns.",
        b"\x8f(" + NESTED + b"\x90.",
        b"Nr" + struct.pack("<I", 2**31 - 1) + b"a.",
        b"\x96" + struct.pack("<Q", 2**36) + b"x.",
        b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
        b"]" * 50_000 + b"a" * 49_999 + b".",
        b"}(" + b"".join(b"\x8a\x0a%bN" % (i * HASH).to_bytes(10, "little") for i in range(9999))
        + b"u.",
    ],
)  # fmt: skip
def test_few_bytes_take_neither_time_nor_memory(folder, data):
    with small():
        with pytest.raises(ValueError, match=r"'it' (cannot be read|asks for)") as error:
            without_code(b"\x80\x04" + data, "it")
        assert len(str(error.value)) < 400
        (folder / ".metadata").write_bytes(b"\x80\x04" + data)
        with pytest.raises(ValueError, match=r"\.metadata (cannot be read|asks for)"):
            SafeFileSystemReader(folder).read_metadata()


@contextlib.contextmanager
def small():
    tracemalloc.start()
    with alarm(hostile.SECONDS):
        yield
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_one_list_of_pieces_for_many_entries_is_refused(folder):
    """Each would be made for each of them."""
    found = pickle.loads((folder / ".metadata").read_bytes())
    (entry, *_) = (e for e in found.state_dict_metadata.values() if hasattr(e, "chunks"))
    shared = entry.chunks * 2000
    for i in range(2000):
        found.state_dict_metadata[f"{i}"] = dataclasses.replace(entry, chunks=shared)
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    with small(), pytest.raises(ValueError, match="more pieces of tensors than are stored"):
        SafeFileSystemReader(folder).read_metadata()


def test_compressed_entries_are_refused():
    saved = io.BytesIO()
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(bytes(2**26)))
    with small(), pytest.raises(ValueError, match=r"'it' cannot be read.*compressed"):
        load_values(saved, "it")


@pytest.mark.parametrize("target", ["outside", "nothing", "/dev/zero", "pipe", "inside"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_links_out_of_the_folder_are_not_followed(tmp_path, folder, name, target):
    """Nor is a pipe waited for."""
    file = folder / name
    file.rename(folder / "inside")
    shutil.copy(folder / "inside", tmp_path / "outside")
    if target == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"outside": tmp_path / "outside"}.get(target, target))
    weight = torch.zeros(4, 4)
    state = {"optimizer": Shampoo([("w", nn.Parameter(weight))]).state_dict()}
    reader = SafeFileSystemReader(folder)
    with alarm(60):
        damage = find_damage(folder)
        if target == "inside":
            dcp.load(state, storage_reader=reader, planner=ShampooLoadPlanner(), no_dist=True)
            assert damage == ""
            return
        with pytest.raises(dcp.api.CheckpointException) as error:
            dcp.load(state, storage_reader=reader, planner=ShampooLoadPlanner(), no_dist=True)
    said = str(error.value)
    if target in ("outside", "/dev/zero"):
        assert f"{name} is a link to " in damage and f"{name} is a link to " in said
        assert "outside of the folder, which was not read" in damage
    else:
        assert f"{name} is missing" in said
        assert damage.startswith(f"{name} is missing" if name != ".metadata" else "it has no .meta")


@pytest.mark.parametrize("planner", [dcp.DefaultLoadPlanner, ShampooLoadPlanner])
def test_no_planner_is_given_code(tmp_path, planner):
    dcp.save({"entry": Calls(os.mkdir, str(tmp_path / "ran"))}, checkpoint_id=tmp_path / "saved")
    reader = SafeFileSystemReader(tmp_path / "saved")
    with pytest.raises(dcp.api.CheckpointException, match=r"'entry' asks for 'posix\.mkdir'"):
        dcp.load({"entry": 0}, storage_reader=reader, planner=planner())
    assert not (tmp_path / "ran").exists()


def test_values_come_back_as_they_were_saved():
    values = {
        "a": [1, -(2**70), 2.5, None, True, 1j, "\xe9", b"\xff", bytearray(b"x"), bytearray()],
        (1, "b"): [{1, 2}, frozenset({3}), collections.deque([1], 3), collections.Counter("aab")],
        "t": torch.arange(24.0).view(2, 3, 4)[:, 1:, ::2],
        "kinds": [torch.tensor(3, dtype=kind) for kind in (torch.bool, torch.bfloat16, torch.int8)],
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "empty": torch.ones(0, 3),
        "none": [torch.Size((2, 3)), torch.float32, torch.device("cpu"), (), {}, []],
        "ordered": collections.OrderedDict(x=1),
    }  # fmt: skip
    values["again"] = values["a"]
    saved = io.BytesIO()
    torch.save(values, saved)
    pairs = [(values, load_values(saved, "it"))]
    values = {k: v for k, v in values.items() if k != "float8"}  # as PyTorch cannot pickle it
    for protocol in (2, 4, 5):
        pickled = pickle.dumps(values, protocol)
        pairs.append((values, pickle.loads(without_code(pickled, "it"))))
    for expected, found in pairs:
        assert str(found) == str(expected) and found["again"] is found["a"]
        assert [type(x) for x in found["a"]] == [type(x) for x in expected["a"]]


def test_what_strangers_make_of_real_checkpoints():
    """More of them: `python -m tests.hostile 2000`."""
    assert run_ranks(1, hostile.attack, init=False, number=100, seed=1) == [[]]
