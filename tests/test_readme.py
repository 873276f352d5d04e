"""The README's settings are those that there are."""

import dataclasses
import re
from pathlib import Path

from shampoo_fsdp import ShampooConfig

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_table_lists_every_setting_with_its_default():
    table = README.partition("\n## Settings")[2].partition("\n### ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE))
    config = ShampooConfig()
    assert list(rows) == [field.name for field in dataclasses.fields(ShampooConfig)]
    for name, default in rows.items():
        if name != "exclude":
            assert default.strip("`").replace('"', "'") == repr(getattr(config, name)), name


def test_every_setting_has_a_line_for_those_who_come_from_elsewhere():
    table = README.partition("### What the others call it")[2].partition("\n## ")[0]
    here = " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", here))
    assert not {field.name for field in dataclasses.fields(ShampooConfig)} - named


def test_every_file_that_it_names_exists():
    root = Path(__file__).parents[1]
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", README):
        assert list(root.glob(f"**/{name}")), name
