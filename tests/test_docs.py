"""The documentation names what there is: settings, files, pages and their headings."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.make_settings import FILE, settings_page
from shampoo_fsdp import ShampooConfig

ROOT = Path(__file__).parents[1]


def _files() -> Iterator[Path]:
    for folder, folders, names in os.walk(ROOT):
        # Of what is hidden (environments, caches) and made, nothing is ours.
        made = {"outputs", "build"} if Path(folder) == ROOT else set()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in made]
        yield from (Path(folder) / name for name in names)


FILES = sorted(_files())
PAGES = [path for path in FILES if path.suffix == ".md"]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def _prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """Those that GitHub gives to headings."""
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#+ +(.+?) *$", _prose(page), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return anchors


def test_the_pages_are_found():
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert names >= {"README.md", "docs/settings.md", "studies/pretrain/README.md"}


def test_the_page_of_settings_is_up_to_date():
    assert FILE.read_text() == settings_page(), "run: python -m docs.make_settings"


def test_every_setting_has_a_line_for_those_who_come_from_elsewhere():
    page = (ROOT / "docs" / "migrating.md").read_text()
    table = page.partition("## What the others call it")[2].partition("\n## ")[0]
    here = " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", here))
    hyperparameters = {"lr", "betas", "eps", "weight_decay"}
    assert named - hyperparameters == {field.name for field in dataclasses.fields(ShampooConfig)}


@each_page
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), target
            assert not anchor or anchor in _anchors(there), target


@each_page
def test_every_file_and_folder_that_it_names_exists(page):
    prose = _prose(page)
    named = re.findall(r"`(?:\./)?([\w./-]+(?:/|\.(?:md|toml|sh|jsonl|png)))`", prose)
    for name in [*named, *re.findall(r"[\w/-]+\.py\b", prose)]:
        assert any(_is_in(name, path) for path in FILES), name


def _is_in(name: str, path: Path) -> bool:
    """Whether a path ends in a name, or has it as a folder."""
    whole = "/" + path.relative_to(ROOT).as_posix()
    return f"/{name}" in whole if name.endswith("/") else whole.endswith("/" + name)


@each_page
def test_every_command_of_ours_that_it_names_exists(page):
    for module in re.findall(r" -m ((?!torchtitan\.)[\w.]+)", page.read_text()):
        files = [module.replace(".", "/") + end for end in (".py", "/__main__.py")]
        assert any(_is_in(name, path) for name in files for path in FILES), module
