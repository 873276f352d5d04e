"""Which TorchTitan is installed."""

from importlib.metadata import version

__all__ = ["JOBS_ARE_FUNCTIONS"]

JOBS_ARE_FUNCTIONS = tuple(int(n) for n in version("torchtitan").split(".")[:2]) >= (0, 3)
"""From 0.3 on a job is a Python function that returns its configuration, and TOML files are one
kind of them here; before, a job is a TOML file."""
