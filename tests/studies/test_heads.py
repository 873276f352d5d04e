"""The study of blocks between heads: what it compares is what it says."""

import itertools

import pytest

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from studies.heads import __main__ as heads

if not JOBS_ARE_FUNCTIONS:
    pytest.skip("TorchTitan 0.2 has no fused projections", allow_module_level=True)

from studies.heads import training


@pytest.fixture
def small(monkeypatch):
    """A tiny model and little text, so that a training is a matter of a second."""
    tiny = {"dim": 128, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32}
    monkeypatch.setitem(heads._SIZES, "1M", tiny)
    texts = {False: ["def f(x):\n    return x\n" * 400], True: ["class C:\n    pass\n" * 100]}
    monkeypatch.setattr(
        training, "python_source", lambda _, validation: {"text": texts[validation]}
    )
    monkeypatch.setattr(training, "_HELD_OUT_BYTES", 512)
    training._windows.cache_clear()
    yield
    training._windows.cache_clear()


def losses(variant: str, **changes: object) -> list[float]:
    settings = heads.run_of("1M", variant, 8, seed=1).settings
    return training.train({**settings, **changes})["loss"]


def test_cut_at_heads_fused_projections_are_the_separate_ones(small):
    cut = heads.run_of("1M", "fused, a head", 8, seed=1).settings["shampoo"]
    cut |= {"matmul_precision": "highest"}  # products in bf16 would turn on how blocks are stacked
    separate = losses("separate", shampoo=cut | {"split_heads": [r"\.w[qkv]\."]})
    assert losses("fused, a head", shampoo=cut) == pytest.approx(separate, abs=2e-3)
    found = [losses(variant)[-1] for variant in heads.VARIANTS if "both" not in variant]
    assert min(abs(a - b) for a, b in itertools.combinations(found, 2)) > 4e-3
