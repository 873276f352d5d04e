"""Keywords that type checkers know are those that there are (tests/typed_use.py misspells some)."""

import typing

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.keywords import Keywords
from shampoo_fsdp.validation import TORCH_OPTIONS


def test_they_are_the_settings_and_the_options_that_change_nothing():
    known, settings = typing.get_type_hints(Keywords), typing.get_type_hints(ShampooConfig)
    assert {name: known.get(name) for name in settings} == settings
    # Of those two no value changes nothing.
    assert known.keys() - settings.keys() == TORCH_OPTIONS - {"beta1", "beta2"}
