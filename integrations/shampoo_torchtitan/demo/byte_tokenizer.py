"""A tokenizer of bytes, made on the spot, so that training needs no download.

python -m shampoo_torchtitan.demo.byte_tokenizer FOLDER
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

__all__ = ["VOCABULARY", "write_byte_tokenizer", "write_default"]

VOCABULARY = 260
"""Of a model for it: 256 bytes, the special tokens, and divisible by 4 for tensor parallelism."""

_DEFAULT_FOLDER = "./outputs/byte_tokenizer"  # where the demo job expects it
_BEGIN, _END = "<|begin_of_text|>", "<|end_of_text|>"


def write_default(folder: str | Path) -> None:
    """Writes the tokenizer if this is the folder of the demo job's, and it is not there yet."""
    if Path(folder) == Path(_DEFAULT_FOLDER) and not Path(folder).exists():
        write_byte_tokenizer(folder)


def write_byte_tokenizer(folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json: 256 bytes, begin and end of text.

    Several processes may write the same folder at the same time: each makes its own copy, and the
    first to finish moves it into place, whole.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_BEGIN, _END])

    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        tokenizer.save(str(scratch / "tokenizer.json"))
        settings = {"bos_token": _BEGIN, "eos_token": _END}
        (scratch / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        scratch.chmod(0o755)  # mkdtemp makes it private
        try:
            os.rename(scratch, folder)
        except OSError:
            if not (folder / "tokenizer.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m shampoo_torchtitan.demo.byte_tokenizer FOLDER")
    write_byte_tokenizer(sys.argv[1])
