"""Measurements behind the numbers of docs/; run from the repository's root."""
