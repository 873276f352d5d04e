"""What `pip` is told about the project."""

import importlib
from pathlib import Path

import tomli

PROJECT = tomli.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_an_index_can_show_what_it_is():
    assert (Path(__file__).parents[1] / PROJECT["readme"]).read_text().startswith("# shampoo_fsdp")
    assert PROJECT["urls"] and PROJECT["classifiers"]


def test_the_console_script_runs(capsys):
    module, _, function = PROJECT["scripts"]["shampoo-fsdp"].partition(":")
    main = getattr(importlib.import_module(module), function)
    assert main(["inspect", "/no/such/folder"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
