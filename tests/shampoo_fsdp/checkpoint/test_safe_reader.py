"""Checkpoints from strangers: what their files ask for is refused by name, and never run."""

import collections
import enum
import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from shampoo_fsdp import Shampoo
from shampoo_fsdp.checkpoint import ShampooLoadPlanner, UnsafeCheckpoint, find_damage
from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader, without_code
from shampoo_fsdp.tools.command import main
from tests.hostile import PICKLES, put_entry, saved_as


@pytest.fixture
def folder(tmp_path):
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Shampoo([("w", weight)])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "saved")
    return tmp_path / "saved"


def new_state():
    return {"optimizer": Shampoo([("w", nn.Parameter(torch.zeros(4, 4)))]).state_dict()}


def failure_of(folder, state, planner=ShampooLoadPlanner):
    reader = SafeFileSystemReader(folder)
    with pytest.raises(dcp.api.CheckpointException) as error:
        dcp.load(state, storage_reader=reader, planner=planner(), no_dist=True)
    ((failure, _),) = error.value.failures.values()
    return failure


@pytest.mark.parametrize("what", PICKLES)
def test_nothing_is_run(what, folder, capsys, tmp_path):
    """Of metadata, of entries, and of pickles in these, whoever plans."""
    ran = tmp_path / "ran"
    data = PICKLES[what](ran)
    for key in ("optimizer.param_groups.0.lr", "optimizer.state.0.exp_avg"):
        put_entry(folder, key, saved_as(data))
        for planner in (dcp.DefaultLoadPlanner, ShampooLoadPlanner):
            failure = failure_of(folder, new_state(), planner)
            assert isinstance(failure, ValueError)
            assert "0.lr" in str(failure) or "__0_0.distcp" in str(failure)
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match=r"\.metadata (is damaged, or holds|cannot be read)"):
        SafeFileSystemReader(folder).read_metadata()
    assert main(["inspect", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert find_damage(folder) in line
    if "planner" not in what:
        with pytest.raises(ValueError, match=r"'it' (is damaged, or holds|cannot be read)"):
            without_code(data, "it")
    assert not ran.exists() and Metadata.version is None


def test_what_it_asked_for_is_named(folder, tmp_path):
    """Also a mesh, which other ranks would have to join."""
    mesh = b"ctorch.distributed.device_mesh\nDeviceMesh\n(Vcpu\n(lI0\natR."
    command = PICKLES["a command"](tmp_path / "ran")
    for data, asked in ((command, "posix.system"), (mesh, "torch.distributed.device_mesh.Dev")):
        (folder / ".metadata").write_bytes(data)
        with pytest.raises(UnsafeCheckpoint, match=rf"nothing was run \(it asks for '{asked}"):
            SafeFileSystemReader(folder).read_metadata()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"not a pickle", pickle.dumps({"a": 1})])
def test_damaged_metadata_is_said(data, folder):
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match=r"\.metadata (is damaged|cannot be read)"):
        SafeFileSystemReader(folder).read_metadata()


def test_a_folder_that_fsspec_reaches_is_read_as_safely(folder, tmp_path):
    far = pytest.importorskip("fsspec").filesystem("memory")
    for file in folder.iterdir():
        far.pipe(f"/far/{file.name}", file.read_bytes())
    ours = SafeFileSystemReader("memory://far").read_metadata()
    assert (
        ours.state_dict_metadata == SafeFileSystemReader(folder).read_metadata().state_dict_metadata
    )
    reader = SafeFileSystemReader("memory://far")
    dcp.load(new_state(), storage_reader=reader, planner=ShampooLoadPlanner())
    assert find_damage("memory://far") == ""
    (name,) = (file.name for file in folder.glob("*.distcp"))
    far.pipe(f"/far/{name}", b"torn")
    assert f"{name} has 4 bytes" in find_damage("memory://far")
    far.rm(f"/far/{name}")
    assert f"{name} is missing" in find_damage("memory://far")
    far.pipe("/far/.metadata", PICKLES["a command"](tmp_path / "ran"))
    assert "nothing was run" in find_damage("memory://far")
    assert not (tmp_path / "ran").exists()
    assert find_damage("memory://nowhere") == "there is no such folder"


def test_a_file_is_no_folder(folder, capsys):
    assert main(["inspect", str(folder / ".metadata")]) != 0
    assert "it is a file; give the folder" in capsys.readouterr().err


def test_what_the_user_allows_is_read(tmp_path):
    dcp.save({"entry": Path("x")}, checkpoint_id=tmp_path)
    state = {"entry": 0}
    assert "PosixPath" in str(failure_of(tmp_path, state))
    with torch.serialization.safe_globals([type(Path("x"))]):
        dcp.load(state, storage_reader=SafeFileSystemReader(tmp_path))
        assert pickle.loads(without_code(pickle.dumps(Path("x")), "it")) == Path("x")
    assert state == {"entry": Path("x")}


class OldPickler(pickle.Pickler):
    """Pickles enums by their names, as early Python 3.11 did."""

    def reducer_override(self, obj):
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_metadata_of_any_pytorch_and_python_is_read_as_pytorch_does(folder):
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
    for pickled in (data, pickle.dumps(expected)):
        (folder / ".metadata").write_bytes(pickled)
        found = SafeFileSystemReader(folder).read_metadata()
        assert found.state_dict_metadata == expected.state_dict_metadata
        assert found.planner_data == expected.planner_data
        assert found.storage_data == expected.storage_data


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
    damage = find_damage(folder)
    if target == "inside":
        assert damage == ""
        return
    assert damage in str(failure_of(folder, new_state()))
    if target in ("outside", "/dev/zero"):
        assert name in damage and "outside of the folder, which was not read" in damage
    else:
        assert damage.startswith(f"{name} is missing" if name != ".metadata" else "it has no .meta")


def test_values_come_back_as_they_were_saved():
    values = {
        "a": [1, -(2**70), 2.5, None, True, 1j, "\xe9", b"\xff", bytearray(b"x"), bytearray()],
        (1, "b"): [{1, 2}, frozenset({3}), collections.deque([1], 3), collections.Counter("aab")],
        "t": torch.arange(24.0).view(2, 3, 4)[:, 1:, ::2],
        "kinds": [torch.tensor(3, dtype=kind) for kind in (torch.bool, torch.bfloat16, torch.int8)],
        "empty": torch.ones(0, 3),
        "none": [torch.Size((2, 3)), torch.float32, torch.device("cpu"), (), {}, []],
        "ordered": collections.OrderedDict(x=1),
    }  # fmt: skip
    values["again"] = values["a"]
    for protocol in (2, 4, 5):
        found = pickle.loads(without_code(pickle.dumps(values, protocol), "it"))
        assert str(found) == str(values) and found["again"] is found["a"]
