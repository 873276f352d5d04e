"""What TorchTitan, written for GPUs, needs on a machine that has none.

Nothing here runs where PyTorch finds an accelerator. `enable` must come before the first use of
TorchTitan's device (best: before TorchTitan is imported at all, which needs `triton` otherwise);
`fit` once the job is read; `MeshIndependentInit` around the making of the model.
"""

import importlib.util
import math
import os
import resource
import sys
import types
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_fsdp.plan.shards import placement_of, shard_rectangle
from shampoo_torchtitan.generation import file_of_titan

# The modules that want triton, in 0.2 and in 0.3.
_KERNELS = ("torchtitan.models.moe.kernels", "torchtitan.distributed.minimal_async_ep.kernels")
# `torch.cpu` with the functions that TorchTitan calls on an accelerator's module.
_DEVICE = types.SimpleNamespace(
    **vars(torch.cpu)
    | {
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: f"CPU with {os.cpu_count()} cores",
        "get_device_properties": lambda device=None: types.SimpleNamespace(
            total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        ),
        "memory_stats": lambda device=None: dict.fromkeys(
            ("active_bytes.all.peak", "reserved_bytes.all.peak"),
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        ),
        **dict.fromkeys(("reset_peak_memory_stats", "empty_cache"), lambda device=None: None),
    }
)
AT_LEAST_2_14 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


def needed() -> bool:
    """Whether this machine has no accelerator, so that TorchTitan must run on the CPU."""
    return not torch.accelerator.is_available()


def enable() -> None:
    """Makes TorchTitan run on the CPU with gloo. Calling it again changes nothing."""
    _load_moe_kernels()
    import torchtitan.tools.utils

    if torchtitan.tools.utils.device_module is _DEVICE:
        return
    # TorchTitan reads the device once, at import, and its modules copy the answer.
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan."):
            if hasattr(module, "device_type"):
                module.device_type = "cpu"
            if hasattr(module, "device_module"):
                module.device_module = _DEVICE
    _reduce_by_sums_only()
    _exchange_lists_of_any_sizes()
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def _load_moe_kernels() -> None:
    """Loads TorchTitan's MoE kernels, with a stand-in for `triton` where that is not installed.

    The stand-in is gone again before anybody can ask whether triton is there: torch would believe
    it, and remember.
    """
    triton: Any = types.ModuleType("triton")
    language: Any = types.ModuleType("triton.language")
    triton.language = language
    # Types, and functions that annotations call.
    language.__getattr__ = lambda name: lambda *_: None
    triton.jit = lambda kernel=None, **_: kernel or (lambda kernel: kernel)
    known = importlib.util.find_spec("triton")
    stand_ins = {} if known else {"triton": triton, "triton.language": language}
    sys.modules.update(stand_ins)
    for name in _KERNELS:
        path = file_of_titan(name.partition(".")[2].replace(".", "/") + ".py")
        if name not in sys.modules and path:
            sys.modules[name] = module = types.ModuleType(name)
            exec(compile(path.read_text(), path, "exec"), vars(module))
    for stand_in in stand_ins:
        del sys.modules[stand_in]
    # The token permutation of 0.2 has a slow form for the CPU, which nothing there asks for.
    if kernels := sys.modules.get(_KERNELS[0]):
        kernels.fill_indices_wrapper = kernels.fill_indices_cpu  # type: ignore[attr-defined]


def _reduce_by_sums_only() -> None:
    """Gloo lacks the reduction that multiplies first, which FSDP uses for a divide factor."""
    set_factor = FSDPModule.set_gradient_divide_factor

    def set_factor_and_sum(self: FSDPModule, factor: float) -> None:
        set_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = set_factor_and_sum


def _exchange_lists_of_any_sizes() -> None:
    """Gloo's all-to-all of lists wants tensors of one size; those of MoE tokens have others."""

    def all_to_all(
        output_tensor_list: list[torch.Tensor],
        input_tensor_list: list[torch.Tensor],
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        received, sent = output_tensor_list, input_tensor_list
        to, of = list(map(len, received)), list(map(len, sent))
        arriving = sent[0].new_empty(sum(to), *sent[0].shape[1:])
        work = dist.all_to_all_single(arriving, torch.cat(sent), to, of, group, async_op=True)
        if work is not None:  # None: this rank is not in the group
            work.wait()  # lists are filled here, so what is returned is done
            torch._foreach_copy_(received, arriving.split(to))
        return work if async_op else None

    dist.all_to_all = all_to_all


def _count_integers_in_histc() -> None:
    """`torch.histc` of integers exists on CUDA only; MoE routers count tokens with it."""
    histc = torch.histc

    def histc_of_any(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if input.is_floating_point():
            return histc(input, *args, **kwargs)
        return histc(input.float(), *args, **kwargs).to(input.dtype)

    torch.histc = histc_of_any
