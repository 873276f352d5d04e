"""Real text that is on every machine: the source of Python's own standard library.

TorchTitan has it as the data sets `python_source` and `python_source_validation` (every 20th file).
`training.dataset_path` names another folder of Python files.
"""

import hashlib
from pathlib import Path

from datasets import Dataset

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_VALIDATION_EVERY = 20


def python_source(folder: str, validation: bool = False) -> Dataset:
    """The Python files under a folder, one document each, the same order on every rank.

    Args:
        folder: Where to look, with all folders below but tests and installed packages.
        validation: Every 20th file, rather than all others.

    Returns:
        A data set in memory with the column `text`.

    Raises:
        FileNotFoundError: The folder has no Python files.
    """
    root = Path(folder)
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if not _NOT_LIBRARY.intersection(name.parts[:-1])]
    # Mixed, so that a file's neighbours, and so a rank's batches, come from all over the library.
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    if not names:
        raise FileNotFoundError(f"no Python files under {folder}: set training.dataset_path")
    chosen = [n for i, n in enumerate(names) if (i % _VALIDATION_EVERY == 0) == validation]
    texts = [(root / name).read_text("utf-8", errors="replace") for name in chosen]
    return Dataset.from_dict({"text": [text for text in texts if text]})
