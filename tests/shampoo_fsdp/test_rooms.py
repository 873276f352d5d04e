"""What import-linter cannot say: which parts of PyTorch each room may know."""

import ast
from pathlib import Path

import pytest

import shampoo_fsdp

ROOT = Path(shampoo_fsdp.__file__).parent
FORBIDDEN = {
    "plan": "torch",
    "rules": "torch.distributed",
    "config.py": "torch",
    "hyperparameters.py": "torch",
}


def imported(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize(("room", "forbidden"), FORBIDDEN.items())
def test_a_room_does_not_know(room, forbidden):
    files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).glob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            assert f"{name}.".find(f"{forbidden}.") != 0, f"{file.name} imports {name}"
