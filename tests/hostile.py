"""Pickles as a stranger could put them into a checkpoint."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _opcodes(ran: Path) -> dict[str, bytes]:
    name = f"\x8c{chr(len(str(ran)))}{ran}".encode()
    mkdir = b"\x8c\x05posix\x8c\x05mkdir\x93"
    metadata = f"c{Metadata.__module__}\nMetadata\n".encode()
    return {
        "GLOBAL": b"cposix\nmkdir\n" + name + b"\x85R",
        "STACK_GLOBAL": mkdir + name + b"\x85R",
        "INST": b"(" + name + b"iposix\nmkdir\n",
        "OBJ": b"(" + mkdir + name + b"o",
        "NEWOBJ": mkdir + name + b"\x85\x81",
        "NEWOBJ_EX": mkdir + name + b"\x85}\x92",
        "getattr": b"cbuiltins\ngetattr\ncposix\nstat\n\x8c\x08__call__\x86R",
        "an allowed module": b"ctorch\nload\n" + name + b"\x85R",
        "an attribute of an allowed class": b"\x8c\x28" + Metadata.__module__.encode()[:40]
        + b"\x8c\x11Metadata.__init__\x93",
        "BUILD on a class": metadata + b"N}\x8c\x07versionK\x07s\x86b",
        "BUILD on what it got": b"cbuiltins\ngetattr\n)R}\x8c\x01xK\x01sb",
        "EXT1": b"\x82\x01",
        "PERSID": b"Pstorage\n",
        "itself, deep": b"]" * 2_000 + b"a" * 1_999 + b"cposix\nmkdir\n",
    }  # fmt: skip


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "a command": lambda ran: pickle.dumps(Calls(os.system, f"touch {ran}")),
    "an expression": lambda ran: pickle.dumps(Calls(eval, f"open({str(ran)!r}, 'w')")),
    "a planner's data": lambda ran: pickle.dumps(Metadata({}, Calls(os.mkdir, str(ran)), {})),
    **{
        name: lambda ran, name=name: b"\x80\x04" + _opcodes(ran)[name] + b"."
        for name in _opcodes(Path())
    },
}
"""By what they do, given what would be there if they did."""


def saved_as(pickled: bytes) -> bytes:
    """A file of `torch.save` with another pickle in it."""
    result, saved = io.BytesIO(), io.BytesIO()
    torch.save(0, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(result, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, pickled if name.endswith("/data.pkl") else source.read(name))
    return result.getvalue()


def put_entry(folder: Path, key: str, data: bytes) -> None:
    """Let all entries whose keys begin so be these bytes."""
    found = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in found.storage_data.items():
        if index.fqn.startswith(key):
            with (folder / info.relative_path).open("ab") as file:
                info.offset, info.length = file.tell(), len(data)
                file.write(data)
    (folder / ".metadata").write_bytes(pickle.dumps(found))
