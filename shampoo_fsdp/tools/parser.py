"""The parser of all commands: dashes and underscores are alike in the names of options."""

import argparse
import re
import sys
from typing import Any

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """It knows options with underscores."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As that of argparse."""
        given = sys.argv[1:] if args is None else args
        known = [re.sub("^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), w) for w in given]
        return super().parse_known_args(known, namespace)
