"""The parser of all commands: dashes and underscores are alike in the names of options."""

import argparse
import sys
from typing import Any

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """It knows options with underscores."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As that of argparse."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(word) for word in given], namespace)


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name[:2] == "--" else word
