"""Checkpoints as a stranger could make them: real ones in which something is changed.

    python -m tests.hostile 2000

makes as many, one after the other, and says which of them ran something, hung or took memory when
they were inspected and resumed. `attack` is what the tests call.
"""

import contextlib
import io
import os
import pickle
import pickletools
import random
import shutil
import signal
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from shampoo_fsdp import Shampoo
from shampoo_fsdp.checkpoint import ShampooLoadPlanner
from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader
from shampoo_fsdp.tools.command import main

__all__ = ["Finding", "attack"]

SECONDS = 5
FLOOR = 48 * 2**20
"""Bytes of memory that any checkpoint may take, beyond four times its size."""
OLD = Path(__file__).parent / "data" / "checkpoint-0.1"
Finding = tuple[str, str]
"""What was changed, and what came of it."""


class Hung(BaseException):
    """After SECONDS."""


# ----------------------------------------------------------------------------- what is changed


def new_state() -> dict[str, Any]:
    """Of a job: what TorchTitan saves, but for the model's size."""
    weights = {"w": nn.Parameter(torch.ones(4, 6)), "b": nn.Parameter(torch.ones(3))}
    optimizer = Shampoo(weights.items(), max_preconditioner_dim=4)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    loader = {"epoch": 1, "order": [3, 1, 2], "generator": torch.ones(8, dtype=torch.uint8)}
    flat = {f"state.{n}.{e}": v for n, p in weights.items() for e, v in optimizer.state[p].items()}
    return {
        "model": {name: weight.detach() for name, weight in weights.items()},
        "optimizer": flat | {"param_groups.w.lr": 0.1, "param_groups.w.betas": (0.9, 0.99)},
        "dataloader": {"dp_rank_0": pickle.dumps(loader), "world_size": 1},
        "train_state": {"step": torch.tensor(3), "note": "text"},
    }


def call(ran: Path) -> bytes:
    return b"cposix\nmkdir\n\x8c" + bytes([len(str(ran))]) + str(ran).encode() + b"\x85R"


def snippets(ran: Path) -> dict[str, bytes]:
    """Opcodes; each leaves one more object on the stack, if it can be read at all."""
    name = f"\x8c{chr(len(str(ran)))}{ran}".encode()
    mkdir = b"\x8c\x05posix\x8c\x05mkdir\x93"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return {
        "GLOBAL, REDUCE": call(ran),
        "STACK_GLOBAL, REDUCE": mkdir + name + b"\x85R",
        "INST": b"(" + name + b"iposix\nmkdir\n",
        "OBJ": b"(" + mkdir + name + b"o",
        "NEWOBJ": mkdir + name + b"\x85\x81",
        "NEWOBJ_EX": mkdir + name + b"\x85}\x92",
        "eval": b"cbuiltins\neval\n\x8c\x031+1\x85R",
        "getattr": b"cbuiltins\ngetattr\ncposix\nstat\n\x8c\x08__call__\x86R",
        "BUILD on a class": b"ctorch.distributed.checkpoint.metadata\nMetadata\n}\x8c\x01xK\x01sb",
        "BUILD on torch's": b"ctorch.distributed.tensor\nDTensor\n}\x8c\x01xK\x01sb",
        "BUILD on OrderedDict": b"ccollections\nOrderedDict\n}\x8c\x01xK\x01sb",
        "EXT1": b"\x82\x01",
        "PERSID": b"Pstorage\n",
        "BINPERSID": b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuJ"
        + b"\xff\xff\xff\x7ftQ",
        "LONG1": b"\x8a\xff" + b"\x7f" * 255,
        "LONG1, cut": b"\x8a\xff\x01",
        "LONG4, huge": b"\x8b\xff\xff\xff\x7f\x01",
        "LONG4, negative": b"\x8b\xff\xff\xff\xff\x01",
        "BINUNICODE8, huge": b"\x8d" + struct.pack("<Q", 2**40) + b"x",
        "BINBYTES8, huge": b"\x8e" + struct.pack("<Q", 2**62) + b"x",
        "BYTEARRAY8, huge": b"\x96" + struct.pack("<Q", 2**36) + b"x",
        "FRAME, huge": b"\x95" + struct.pack("<Q", 2**60) + b"N",
        "FRAME, short": b"\x95" + struct.pack("<Q", 1) + b"N",
        "memo": b"Nr\xff\xff\xff\x7f",
        "DUP": b"K\x01" + b"2\x86" * 60,
        "tuples by BINGET": b"K\x01q\xfa" + b"h\xfa\x86q\xfa" * 60,
        "lists by BINGET": b"]q\xfa" + b"h\xfaq\xfb](h\xfbh\xfbeq\xfa\x86" * 60,
        "a key by BINGET": b"}K\x01q\xfa" + b"h\xfa\x86q\xfa" * 60 + b"Ns",
        "a set by BINGET": b"\x8f(K\x01q\xfa" + b"h\xfa\x86q\xfa" * 60 + b"\x90",
        "itself": b"]q\xfah\xfaa",
        "deep": b"]" * 20_000 + b"a" * 19_999,
        "deep tuples": b"N" + b"\x85" * 20_000,
        "marks": b"(" * 20_000 + b"t" * 20_000,
        "empty": b"](" + b"}" * 20_000 + b"e",
        "bytearray(2**40)": b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R",
        "bytearrays": b"X\x00\x80\x00\x00" + b"a" * 2**15
        + b"q\xfacbuiltins\nbytearray\nq\xfb)R\x86](" + b"h\xfbh\xfa\x8c\x06latin1\x86R" * 4000
        + b"e\x86",
        "deque": b"ccollections\ndeque\n)\x8a\x06\x00\x00\x00\x00\x00\x01\x86R",
        "one hash": b"}(" + b"".join(
            b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 3000)
        ) + b"u",
        "many arguments": b"(" + b"K\x01" * 5000 + b"tq\xfaccollections\nOrderedDict\nq\xfb)R"
        + b"\x86](" + b"h\xfbh\xfaR" * 4000 + b"e\x86",
        "many sets": b"](" + b"".join(b"M" + struct.pack("<H", i) for i in range(5000))
        + b"eq\xfacbuiltins\nset\nq\xfb)R\x86](" + b"h\xfbh\xfa\x85R" * 4000 + b"e\x86",
        "tensor of 2**40": tensor + b"(NK\x00\x8a\x06\x00\x00\x00\x00\x00\x01\x85K\x00\x85\x89NtR",
        "text": b"\x8c\x03\x1b[2",
    }  # fmt: skip


def put_in(data: bytes, snippet: bytes, rng: random.Random) -> bytes:
    """Between two opcodes of a pickle, instead of an object, or as all of it."""
    at = [place for _, _, place in pickletools.genops(data)]
    start = rng.choice(at[1:])
    how = rng.choice((0, 1, 2, 3, 3, 3, 3))
    if how == 0:
        return data[:2] + snippet + b"."
    if how == 1:
        return data[:start] + snippet + b"0" + data[start:]
    if how == 2:
        return data[:start] + snippet + data[start:]
    pushes = [
        (a, b)
        for (op, _, a), b in zip(list(pickletools.genops(data))[:-1], at[1:], strict=True)
        if op.stack_before == [] and len(op.stack_after) == 1 and op.name != "MARK"
    ]
    begin, end = rng.choice(pushes)
    return data[:begin] + snippet + data[end:]


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice((data[:begin], data[end:], data[:begin] + data[end:], data + data[begin:end]))


def changed_pickle(data: bytes, rng: random.Random, ran: Path) -> tuple[str, bytes]:
    if rng.random() < 0.7:
        name, snippet = rng.choice(list(snippets(ran).items()))
        return name, put_in(data, snippet, rng)
    change = rng.choice((flipped, cut))
    return change.__name__, change(data, rng)


def changed_zip(data: bytes, rng: random.Random, ran: Path) -> tuple[str, bytes]:
    """A file of torch.save: what is in it, or what its directory says."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    (inside,) = (name for name in files if name.endswith("/data.pkl"))
    what = rng.choice(("pickle", "pickle", "pickle", "directory", "compressed", "flips", "swapped"))
    if what == "flips":
        return rng.choice((("flipped", flipped(data, rng)), ("cut", cut(data, rng))))
    if what == "directory":
        changed = bytearray(data)
        begin = data.index(b"PK\x01\x02")
        for _ in range(rng.choice((1, 2, 3))):
            # Sizes, offsets, counts, kinds of compression.
            place = rng.randrange(begin, len(data) - 4)
            value = rng.choice((0, 1, 8, 2**16 - 1, 2**31, 2**32 - 1, len(data)))
            changed[place : place + 4] = struct.pack("<I", value)
        return what, bytes(changed)
    packing, name = zipfile.ZIP_STORED, what
    if what == "pickle":
        name, files[inside] = changed_pickle(files[inside], rng, ran)
    elif what == "compressed":
        packing = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
        files[rng.choice([*files, f"{inside[:-8]}data/0"])] = bytes(2**26)
    else:
        names, values = list(files), list(files.values())
        rng.shuffle(values)
        files = dict(zip(names, values, strict=True))
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", packing) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return name, result.getvalue()


def put_entry(folder: Path, found: Metadata, key: str, data: bytes) -> None:
    for index, info in found.storage_data.items():
        if index.fqn == key:
            with (folder / info.relative_path).open("ab") as file:
                info.offset, info.length = file.tell(), len(data)
                file.write(data)
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def entry_of(folder: Path, found: Metadata, key: str) -> bytes:
    info = next(info for index, info in found.storage_data.items() if index.fqn == key)
    return (folder / info.relative_path).read_bytes()[info.offset :][: info.length]


HUGE = (-1, 0, 1, 7, 2**20, 2**31, 2**40, 2**63 - 1, 2**63, 2**200)


def lie(folder: Path, found: Metadata, rng: random.Random) -> str:
    """Changes what the metadata says."""
    info = rng.choice(list(found.storage_data.values()))
    tensors = [e for e in found.state_dict_metadata.values() if hasattr(e, "chunks")]
    entry = rng.choice(tensors)
    what = rng.choice(
        ("offset", "length", "same", "path", "link", "size", "chunk", "dtype", "chunks", "name",
         "entries", "kinds", "swapped", "extension"),
    )  # fmt: skip
    if what in ("offset", "length"):
        setattr(info, what, rng.choice(HUGE))
    elif what == "same":
        other = rng.choice(list(found.storage_data.values()))
        info.offset, info.length, info.relative_path = (
            other.offset + rng.choice((0, 1)), other.length, other.relative_path,
        )  # fmt: skip
    elif what == "path":
        info.relative_path = rng.choice(
            ("/etc/passwd", "../x", "", ".", "/dev/zero", "a/../../b", "pipe", "x" * 100_000, "\0",
             ".metadata", "~/x", "no", None, 3),
        )  # fmt: skip
        os.mkfifo(folder / "pipe")
    elif what == "link":
        file = folder / info.relative_path
        file.unlink()
        file.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", "nothing", file.name, "/")))
    elif what in ("size", "chunk"):
        size = torch.Size(rng.choice(((2**40,), (2**62, 2), (), (0,) * 70, (2**31, 0), (1,))))
        if what == "size":
            entry.size = size
        if what == "chunk" or rng.random() < 0.5:
            entry.chunks[0].sizes = size
    elif what == "dtype":
        kinds = (torch.uint8, torch.float64, torch.complex128, torch.bool, torch.int64)
        entry.properties.dtype = rng.choice(kinds)
    elif what == "chunks":
        entry.chunks = entry.chunks * rng.choice((0, 2, 5000))
    elif what == "name":
        keys = list(found.state_dict_metadata)
        key = rng.choice(keys)
        name = rng.choice(("\x1b[2J", "state." * 20_000 + "x ", 3, None, "optimizer.state.w", ""))
        found.state_dict_metadata[name] = found.state_dict_metadata.pop(key)
    elif what == "entries":
        entry.chunks = entry.chunks * 500
        for i in range(3000):
            found.state_dict_metadata[f"optimizer.state.p{i}.exp_avg"] = entry
    elif what == "kinds":
        key = rng.choice(list(found.state_dict_metadata))
        found.state_dict_metadata[key] = rng.choice((entry, info, None, 3, "x", found))
    elif what == "swapped":
        entries = list(found.state_dict_metadata.values())
        rng.shuffle(entries)
        found.state_dict_metadata = dict(zip(found.state_dict_metadata, entries, strict=True))
    else:
        info.transform_descriptors = rng.choice((["zstd"], "x", 5))
    return what


TARGETS = ("metadata", "metadata", "lie", "lie", "entry", "entry", "loader", "file")


def make_hostile(folder: Path, rng: random.Random, ran: Path, target: str) -> str:
    """Changes something in a checkpoint.

    Returns:
        What.
    """
    file = folder / ".metadata"
    found = pickle.loads(file.read_bytes())
    if target == "metadata":
        what, data = changed_pickle(file.read_bytes(), rng, ran)
        file.write_bytes(data)
    elif target == "lie":
        what = lie(folder, found, rng)
        with contextlib.suppress(AttributeError, TypeError):  # it cannot be pickled
            file.write_bytes(pickle.dumps(found))
    elif target == "file":
        path = rng.choice(sorted(folder.glob("*.distcp")))
        change = rng.choice((flipped, cut))
        what = change.__name__
        path.write_bytes(change(path.read_bytes(), rng))
    else:
        keys = [key for key in found.state_dict_metadata if not key.startswith("model.")]
        key, loader = rng.choice(keys), "dataloader.dp_rank_0"
        data = entry_of(folder, found, key)
        if target == "loader" and loader in found.state_dict_metadata:
            key = loader
            held = pickle.dumps(rng.choice(({"a": torch.ones(2), "b": [1, {2}, b"x"]}, [1] * 9)))
            what, held = changed_pickle(held, rng, ran)
            stream = io.BytesIO()
            torch.save(rng.choice((bytes, bytearray, lambda x: [x]))(held), stream)
            data = stream.getvalue()
        else:
            what, data = changed_zip(data, rng, ran)
        what = f"{key}, {what}"
        put_entry(folder, found, key, data)
    return f"{target}: {what}"


# ------------------------------------------------------------------------------- what comes of it


class Consumer(pickle.Unpickler):
    """As TorchTitan's data loader, which unpickles what it is given, but watched."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in {
            ("torch._utils", "_rebuild_tensor_v2"), ("torch.storage", "_load_from_bytes"),
            ("collections", "OrderedDict"), ("collections", "deque"), ("torch", "Size"),
        } or module == "builtins", f"{module}.{name} was in the data loader's state"  # fmt: skip
        return super().find_class(module, name)


def inspected(folder: Path) -> str:
    """What was said."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(["inspect", str(folder), "--json"])
    said = errors.getvalue()
    assert (code, len(said.splitlines())) in ((0, 0), (2, 1)), f"{code}: {said}"
    return said


def resumed(folder: Path, state: dict[str, Any], planner: Callable[[], Any]) -> str:
    """What was said."""
    reader = SafeFileSystemReader(folder)
    try:
        dcp.load(state, storage_reader=reader, planner=planner(), no_dist=True)
    except dcp.api.CheckpointException as error:
        (failure, _) = error.failures[0]
        assert isinstance(failure, ValueError | OSError | AssertionError), repr(failure)
        said = str(failure)
        assert len(said.splitlines()) == 1 and said.isprintable() and len(said) < 2000, said
        return said
    held = state.get("dataloader", {}).get("dp_rank_0")
    if held is not None and planner is not ShampooLoadPlanner:
        Consumer(io.BytesIO(held)).load()
    return ""


def memory(what: str) -> int:
    """Of this process, in bytes; VmHWM is the peak since `reset_peak`."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raises after so many seconds of work, or a minute of waiting."""

    def stop(*_: Any) -> None:
        raise Hung

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def attack(
    number: int,
    seed: int = 0,
    planner: Callable[[], Any] = ShampooLoadPlanner,
    targets: Sequence[str] = TARGETS,
) -> list[Finding]:
    """Makes checkpoints hostile, and inspects and resumes each.

    Returns:
        Those that ran something, hung, took memory or were refused in another way than by a line.
    """
    torch.set_num_threads(1)
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        dcp.save(new_state(), checkpoint_id=place / "new", no_dist=True)
        for case in range(-2, number):
            rng = random.Random(f"{seed} {case}")
            source = place / "new" if case % 4 else OLD
            folder, ran = place / "hostile", place / "ran"
            shutil.copytree(source, folder)
            what = make_hostile(folder, rng, ran, rng.choice(targets)) if case >= 0 else "nothing"
            size = sum(f.lstat().st_size for f in folder.iterdir())
            state = new_state() if source != OLD else {}
            reset_peak()
            before = memory("VmRSS")
            said: list[str] = []
            try:
                with alarm(SECONDS):
                    said += [inspected(folder), resumed(folder, state, planner)]
            except Hung:
                findings.append((f"{case} {what}", f"it took more than {SECONDS} s"))
            except Exception as error:
                findings.append((f"{case} {what}", repr(error)))
            taken = memory("VmHWM") - before
            if taken > FLOOR + 4 * size:
                findings.append((f"{case} {what}", f"{taken:,} bytes of memory for {size:,}"))
            if ran.exists():
                ran.rmdir()
                findings.append((f"{case} {what}", "it ran"))
            if case < 0 and any(said):
                findings.append((what, str(said)))
            if "--say" in sys.argv:
                print(case, what, said, f"{taken:,}")
            shutil.rmtree(folder)
    if hasattr(Metadata, "x"):
        findings.append(("BUILD", "a class of torch was changed"))
    return findings


if __name__ == "__main__":
    for what, came in attack(int(sys.argv[1])):
        print(what, "->", came)
