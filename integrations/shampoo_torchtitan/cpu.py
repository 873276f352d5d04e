"""What TorchTitan, written for GPUs, needs on a machine that has none.

Nothing here runs where PyTorch finds an accelerator. `enable` must come before the first use of
TorchTitan's device (best: before TorchTitan is imported at all, which needs `triton` otherwise);
`fit` once the job is read; `MeshIndependentInit` around the making of the model.
"""

import importlib.util
import itertools
import math
import os
import resource
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_fsdp.plan.shards import placement_of, shard_rectangle

__all__ = ["AT_LEAST_2_14", "MeshIndependentInit", "enable", "fit", "needed"]

# The modules that want triton, in 0.2 and in 0.3.
_KERNELS = (
    "torchtitan.models.moe.kernels",
    "torchtitan.distributed.minimal_async_ep.kernels",
)
AT_LEAST_2_14 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


def needed() -> bool:
    """Whether this machine has no accelerator, so that TorchTitan must run on the CPU."""
    return not torch.accelerator.is_available()


def enable() -> None:
    """Makes TorchTitan run on the CPU with gloo. Calling it again changes nothing."""
    _load_moe_kernels()
    import torchtitan.tools.utils

    if isinstance(torchtitan.tools.utils.device_module, _Cpu):
        return
    cpu = _Cpu()
    # TorchTitan reads the device once, at import, and its modules copy the answer.
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan."):
            if hasattr(module, "device_type"):
                module.device_type = "cpu"
            if hasattr(module, "device_module"):
                module.device_module = cpu
    _reduce_by_sums_only()
    if not hasattr(dist, "set_timeout"):  # TorchTitan 0.3 wants torch 2.14's
        dist.set_timeout = lambda timeout, group=None: None  # type: ignore[attr-defined]
    _count_integers_in_histc()
    # There is none to measure against, and looking for a GPU's only prints warnings.
    torchtitan.tools.utils.get_peak_flops = lambda device_name: math.inf
    # The random numbers are those of `MeshIndependentInit`; meshes of one rank have no timeout.
    warnings.filterwarnings("ignore", message="DTensor (random operators|manual_seed)")
    warnings.filterwarnings("ignore", message="Set timeout is now only supported")


def fit(config: Any, wanted: dict[tuple[str, str], Any]) -> list[str]:
    """Changes what cannot work, or only very slowly, without a GPU.

    Args:
        config: Of a job, changed in place.
        wanted: Values by table and key, of what not all versions of TorchTitan have.

    Returns:
        One `table.key = value` for each change.

    Raises:
        ValueError: The job asks for what has no substitute.
    """
    degree = config.parallelism.context_parallel_degree
    if degree > 1:
        raise ValueError(
            f"parallelism.context_parallel_degree = {degree}: must be 1 without a GPU, where "
            "PyTorch cannot split attention over ranks"
        )
    wanted = wanted | {
        ("training", "mixed_precision_param"): "float32",  # bfloat16 is emulated: many times slower
        ("comm", "trace_buf_size"): 0,  # NCCL's flight recorder
        ("training", "enable_cpu_offload"): False,  # everything is on the CPU already
    }
    if getattr(config.checkpoint, "async_mode", "") == "async_with_pinned_mem":
        wanted["checkpoint", "async_mode"] = "async"
    changes = []
    for (table, key), value in wanted.items():
        if getattr(getattr(config, table), key) != value:
            setattr(getattr(config, table), key, value)
            changes.append(f"{table}.{key} = {value}")
    return changes


class MeshIndependentInit(TorchDispatchMode):
    """Within it, random initial values of DTensors do not depend on the mesh.

    On the CPU, DTensor draws each shard from the same seed, so that the ranks' shards repeat each
    other. Here every rank draws the whole tensor, as one process would, and keeps its rectangle.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        draws_in_place = torch.Tag.nondeterministic_seeded in func.tags and func._schema.is_mutable
        if not (draws_in_place and args and isinstance(args[0], DTensor)):
            return func(*args, **kwargs)
        target = args[0]
        local = target.to_local()
        whole = torch.empty(target.shape, dtype=local.dtype, device=local.device)
        func(whole, *args[1:], **kwargs)
        mesh = target.device_mesh
        coordinate = mesh.get_coordinate()
        if coordinate is not None and local.device.type != "meta":
            placements = tuple(map(placement_of, target.placements))
            rectangle = shard_rectangle(target.shape, mesh.shape, placements, coordinate)
            local.copy_(whole[tuple(slice(start, stop) for start, stop in rectangle)])
        return target


class _Cpu(types.ModuleType):
    """`torch.cpu` with the functions that TorchTitan calls on an accelerator's module."""

    def __init__(self) -> None:
        super().__init__("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return f"CPU with {os.cpu_count()} cores"

    def get_device_properties(self, device: Any = None) -> types.SimpleNamespace:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return types.SimpleNamespace(total_memory=memory)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def _load_moe_kernels() -> None:
    """Loads TorchTitan's MoE kernels, with a stand-in for `triton` where that is not installed.

    The stand-in is gone again before anybody can ask whether triton is there: torch would believe
    it, and remember.
    """
    found = importlib.util.find_spec("torchtitan")
    folders = (found and found.submodule_search_locations) or ()
    stand_ins = {} if importlib.util.find_spec("triton") else _stand_ins_for_triton()
    sys.modules.update(stand_ins)
    for name, folder in itertools.product(_KERNELS, folders):
        path = Path(folder, *name.split(".")[1:]).with_suffix(".py")
        if name not in sys.modules and path.exists():
            spec: Any = importlib.util.spec_from_file_location(name, path)
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    for stand_in in stand_ins:
        del sys.modules[stand_in]
    # The token permutation of 0.2 has a slow form for the CPU, which nothing there asks for.
    if kernels := sys.modules.get(_KERNELS[0]):
        kernels.fill_indices_wrapper = kernels.fill_indices_cpu  # type: ignore[attr-defined]


def _stand_ins_for_triton() -> dict[str, types.ModuleType]:
    triton: Any = types.ModuleType("triton")
    triton.language = types.ModuleType("triton.language")
    # Types, and functions that annotations call.
    triton.language.__getattr__ = lambda name: lambda *_: None
    triton.jit = lambda kernel=None, **_: kernel or (lambda kernel: kernel)
    return {"triton": triton, "triton.language": triton.language}


def _reduce_by_sums_only() -> None:
    """Gloo lacks the reduction that multiplies first, which FSDP uses for a divide factor."""
    set_factor = FSDPModule.set_gradient_divide_factor

    def set_factor_and_sum(self: FSDPModule, factor: float) -> None:
        set_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = set_factor_and_sum


def _count_integers_in_histc() -> None:
    """`torch.histc` of integers exists on CUDA only; MoE routers count tokens with it."""
    histc = torch.histc

    def histc_of_any(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if input.is_floating_point():
            return histc(input, *args, **kwargs)
        return histc(input.float(), *args, **kwargs).to(input.dtype)

    torch.histc = histc_of_any
