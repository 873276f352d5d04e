"""The kernels without a GPU: interpreted, and compiled for three generations of them."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from shampoo_fsdp.kernels.adamw import _adamw_masked
from shampoo_fsdp.kernels.gram import _update_factors
from shampoo_fsdp.kernels.language import jit, tiles
from shampoo_fsdp.kernels.momenta import _momenta
from shampoo_fsdp.kernels.product import _product
from shampoo_fsdp.kernels.refresh import _keep, _line, _two_sums

triton = pytest.importorskip("triton", reason="kernels are in Triton, which is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def test_they_do_in_the_interpreter_what_their_references_do():
    file = Path(__file__).with_name("against_references.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_triton_the_references_do_it():
    code = """if True:
        import sys
        import torch
        import shampoo_fsdp
        from shampoo_fsdp.kernels import adamw, gram, momenta, product, refresh

        assert "triton" not in sys.modules
        sys.modules["triton"] = None  # as if it were missing
        factors = torch.full((1, 2, 2), 1.5)
        assert not gram.can_update(factors, torch.ones(1, 2, 3))
        (square,) = product.product(factors, factors, product.Sum())
        assert (square == 4.5).all()
    """
    subprocess.run([sys.executable, "-c", code], check=True)


INSTRUCTIONS = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
"""Of tensor cores, by the GPU's generation."""
FACTORS = ["alpha", "beta", "gamma", "alpha2", "beta2", "gamma2"]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def momenta_case(generation):
    pointers = dict.fromkeys(["gradient", "usable", "exp_avg", "moment"], "*fp32")
    pointers |= {"mixed": "*bf16", "squares": "*fp32", "eps": "*fp32"}
    numbers = dict.fromkeys(["rate1", "rate2", "share", "factor"], "fp32")
    return _momenta, pointers | numbers, {"CHUNK": 1024, "TURNS": 4, "SUMS": False}


def adamw_case(generation):
    numbers = dict.fromkeys(["step_size", "lost", "rate1", "rate2", "eps", "root"], "fp32")
    pointers = {"weights": "*fp32", "gradient": "*bf16", "exp_avg": "*fp32", "exp_avg_sq": "*fp32"}
    types = pointers | {"skipped": "*i64"} | numbers | {"largest": "fp32"}
    return _adamw_masked, types, {"CHUNK": 1024, "TURNS": 4}


def factors_case(generation, transposed, packed):
    cut = tiles(1024, 2, not packed and generation >= 90)
    tile, depth = cut["TILE"], cut["DEPTH"]
    rows, columns = (depth, tile) if transposed else (tile, depth)
    types = {
        "blocks": f"tensordesc<bf16[1,{rows},{columns}]>",
        "factors": "*fp32" if packed else f"tensordesc<fp32[1,{tile},{tile}]>",
        "rate": "*fp32",
        "share": "fp32",
    }
    known = {"TRANSPOSED": transposed, "PACKED": packed, "SUMS": False, "UPCAST": False}
    return _update_factors, types, cut | known


def two_sums_case(generation):
    tensors = dict.fromkeys(["square", "matrices", "inner", "slope", "offset"], "*fp32")
    numbers = dict.fromkeys(["middle", "half", "a", "b", "c"], "fp32")
    return _two_sums, tensors | numbers, {"CHUNK": 2048}


def line_case(generation):
    pointers = dict.fromkeys(["squares", "unit", "ridge", "divisor", "results"], "*fp32")
    return _line, pointers | {"slack": "fp32", "exponent": "fp32"}, {"MOST": 64}


def keep_case(generation):
    types = {"new": "*fp32", "kept": "*bf16", "bad": "*i1", "changes": "*fp32"}
    return _keep, types, {"CHUNK": 4096}


def product_case(generation, dtype, symmetric, second):
    cut = tiles(1024, dtype.itemsize, generation >= 90)
    tile, depth = cut["TILE"], cut["DEPTH"]
    name = NAMES[dtype]
    rows = f"tensordesc<{name}[1,{tile},{depth}]>"
    types = dict.fromkeys(FACTORS, "*fp32") | {
        "a": rows,
        "b": rows if symmetric else f"tensordesc<{name}[1,{depth},{tile}]>",
        "c": f"tensordesc<{name}[1,{tile},{tile}]>",
        "out": f"tensordesc<{name}[1,{tile},{tile}]>",
        # The first polynomial gives a symmetric one in fp16, too.
        "second": f"tensordesc<{'fp16' if symmetric else name}[1,{tile},{tile}]>",
        "squares": "*fp32",
    }
    known = {} if second else {"c": None, "second": None}
    known |= {"squares": None} if second else {}
    return _product, types, cut | known | {"SYMMETRIC": symmetric, "INTERPRETED": False}


CASES = {
    "adamw": adamw_case,
    "momenta": momenta_case,
    "factors": partial(factors_case, transposed=False, packed=False),
    "factors_packed": partial(factors_case, transposed=True, packed=True),
    "two_sums": two_sums_case,
    "line": line_case,
    "keep": keep_case,
    "product_split": partial(product_case, dtype=torch.float32, symmetric=True, second=False),
    "product_split_two": partial(product_case, dtype=torch.float32, symmetric=True, second=True),
    "product_split_whole": partial(product_case, dtype=torch.float32, symmetric=False, second=True),
    "product": partial(product_case, dtype=torch.float16, symmetric=False, second=True),
}


@pytest.mark.parametrize("generation", INSTRUCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_they_compile_without_spills_to_tensor_cores(case, generation, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, known = CASES[case](generation)
    options = {name: known.pop(name) for name in list(known) if name.startswith("num_")}
    kernel = jit(kernel)
    signature = {n: "constexpr" if n in known else types.get(n, "i32") for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, type_ in enumerate(signature.values())
        if type_[0] in "*i"
    }
    source = ASTSource(kernel, signature, known, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    wanted = INSTRUCTIONS[generation] if "TILE" in known else r"st\.global[a-z0-9_.:]*"
    wanted += r"\.v4" if "CHUNK" in known else ""
    assert re.search(wanted, compiled.asm["ptx"])
    cubin = tmp_path / "cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [BIN / "cuobjdump", "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(case, generation, compiled.metadata.shared, usage)
    # Triton 3.8, PyTorch 2.14's, keeps 8 bytes of one kernel in memory on an A100.
    assert re.search(r" STACK:0 " if triton.__version__ < "3.8" else r" STACK:[08] ", usage)
