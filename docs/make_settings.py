"""Makes docs/settings.md from the docstrings of ShampooConfig: python -m docs.make_settings

With --check it writes nothing and fails if the file is out of date.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

from shampoo_fsdp.config import FIELD_TEXTS, ShampooConfig

FILE = Path(__file__).with_name("settings.md")
_TYPES = {
    "PositiveInt": "integer >= 1",
    "NonNegativeInt": "integer >= 0",
    "PositiveFloat": "number > 0",
    "NonNegativeFloat": "number >= 0",
    "Share": "0 <= number < 1",
    "str": "string",
    "bool": "true or false",
}
_HEAD = """# Settings

<!-- Made by `python -m docs.make_settings` from the docstrings in shampoo_fsdp/config.py. -->

`[optimizer.shampoo]` in a job file, `--optimizer.shampoo.NAME` on the command line of a job
(switches: `--optimizer.shampoo.nesterov`, `--optimizer.shampoo.no-nesterov`), keyword arguments of
`Shampoo` in Python, `--NAME` of `python -m shampoo_fsdp plan`. `lr`, `betas`, `eps` and
`weight_decay` are those of AdamW. Which to change, and when:
[Running it](running.md#when-to-change-a-setting); what others call them:
[Coming from another optimizer](migrating.md#what-the-others-call-it).

| setting | values | default | meaning |
|---|---|---|---|
"""


def settings_page() -> str:
    """The text of the file."""
    config, rows = ShampooConfig(), []
    for field in ast.parse(inspect.getsource(ShampooConfig)).body[0].body:
        if isinstance(field, ast.AnnAssign):
            name = field.target.id
            meaning = FIELD_TEXTS[name]
            default = repr(getattr(config, name)).replace("'", '"').replace("\\\\", "\\")
            cells = f"`{name}`", _values(field.annotation), f"`{default}`", meaning
            rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n")
    return _HEAD + "".join(rows)


def _values(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.BinOp):  # ... | None
        return _values(annotation.left)
    if isinstance(annotation, ast.Subscript):
        if ast.unparse(annotation.value) == "list":
            return "list of " + re.sub(r"(string|number)", r"\1s", _values(annotation.slice))
        return ", ".join(f'`"{choice}"`' for choice in ast.literal_eval(annotation.slice))
    return _TYPES[ast.unparse(annotation)]


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        FILE.write_text(settings_page())
    elif FILE.read_text() != settings_page():
        sys.exit(f"{FILE} is out of date; run: python -m docs.make_settings")
