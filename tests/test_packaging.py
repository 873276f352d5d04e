"""What `pip` is told about the project."""

import importlib
import re
from pathlib import Path

import pytest
import setuptools
import tomli

import shampoo_fsdp

ROOT = Path(__file__).parents[1]
SETTINGS = tomli.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]


def test_there_is_one_version():
    assert (
        SETTINGS["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "shampoo_fsdp.__version__"
    )
    assert f"\nversion: {shampoo_fsdp.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_module_but_those_of_the_first_job_is_installed():
    find = SETTINGS["tool"]["setuptools"]["packages"]["find"]
    folders = {
        Path(where, *package.split("."))
        for where in find["where"]
        for package in setuptools.find_packages(
            str(ROOT / where), include=find["include"], exclude=find["exclude"]
        )
    }
    of_users = [ROOT / "shampoo_fsdp", ROOT / "integrations" / "shampoo_torchtitan"]
    modules = [path for root in of_users for path in root.rglob("*.py")]
    demo = Path("integrations", "shampoo_torchtitan", "demo")
    assert folders == {path.parent.relative_to(ROOT) for path in modules} - {demo}
    for path in modules:  # and nothing that is installed needs them
        needs = re.search(r"^ *(from|import) .*\bdemo\b", path.read_text(), re.MULTILINE)
        assert demo in path.relative_to(ROOT).parents or not needs, path


@pytest.mark.parametrize("package", ["shampoo_fsdp", "shampoo_torchtitan"])
def test_type_checkers_are_told_that_there_are_types(package):
    setuptools_of_it = SETTINGS["tool"]["setuptools"]
    assert "py.typed" in setuptools_of_it["package-data"][package]
    assert (ROOT / setuptools_of_it["package-dir"][package] / "py.typed").is_file()


def test_the_console_script_runs(capsys):
    module, _, function = PROJECT["scripts"]["shampoo-fsdp"].partition(":")
    main = getattr(importlib.import_module(module), function)
    assert main(["inspect", "/no/such/folder"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
