"""The plan of a TorchTitan job before it runs: what each rank computes, keeps and sends.

python -m shampoo_torchtitan.plan --job.config_file my.toml --world-size 1024

Takes any setting of the job. The model is built without memory (on PyTorch's meta device) and cut
by TorchTitan itself, on a process group that only pretends to have so many ranks, so that any
machine will do and nothing is read but the job file.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from shampoo_torchtitan.train import BAD_SETTINGS  # isort: skip  first: TorchTitan runs without a GPU
from torchtitan.tools.logging import logger

from shampoo_fsdp.model_groups import typed_parameters
from shampoo_fsdp.plan.shards import ParameterSpec
from shampoo_fsdp.runtime.choice import with_embeddings
from shampoo_fsdp.runtime.groups import FromEmbedding, plain_name
from shampoo_fsdp.runtime.parameters import describe
from shampoo_fsdp.tools.parser import Parser
from shampoo_fsdp.tools.plan_figures import JobPlan
from shampoo_fsdp.tools.plan_report import add_plan_options, report_plan
from shampoo_torchtitan.container import with_heads
from shampoo_torchtitan.generation import parallel_dims, titan

_DEGREES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line about what is wrong with the job."""
    parser = Parser(
        prog="python -m shampoo_torchtitan.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--world_size", type=int, required=True, help="ranks")
    add_plan_options(parser)
    options, of_job = parser.parse_known_args(arguments)
    logger.disabled = True  # TorchTitan tells how it goes; the report is all that is wanted
    try:
        job = read_job(of_job)
        models = job_specs(job, options.world_size)
        plan = job_plan(job, models, options.world_size, options.device)
        dims = parallel_dims(job, options.world_size)
        ranks = dims.dp_replicate * dims.dp_shard  # others share the work on the tokens of one
        if options.tokens is None:
            options.tokens = _tokens(job, ranks)
        report_plan(plan, vars(options), options.world_size // ranks)
    except BAD_SETTINGS as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        logger.disabled = False
    return 0


def read_job(arguments: Sequence[str]) -> Any:
    """TorchTitan's configuration for its command line arguments.

    Raises:
        ValueError, TypeError, OSError: names the setting or the file.
    """
    return titan().Reader().parse_args(list(arguments))


def job_plan(
    config: Any, models: Sequence[Sequence[ParameterSpec]], world_size: int, device: str = "cuda"
) -> JobPlan:
    """The plan of a job.

    Args:
        models: as :func:`job_specs` returns them.

    Raises:
        ValueError: about a parameter that cannot be planned.
    """
    dims = parallel_dims(config, world_size)
    degrees = {name: getattr(dims, name, 1) for name in _DEGREES}
    mesh = ", ".join(f"{name}={n}" for name, n in degrees.items() if n > 1)
    title = f"{titan().model_of(config)} on {world_size:,} ranks" + (f" ({mesh})" if mesh else "")
    names = [spec.name for specs in models for spec in specs]
    return JobPlan(title, models, titan().shampoo_of(config, names), device)


def _tokens(config: Any, ranks: int) -> float:
    """Of a step, for each of these data-parallel ranks."""
    training = config.training
    if hasattr(training, "num_tokens_per_train_step"):  # since August 2026
        whole = training.num_tokens_per_train_step
        return whole / ranks if whole > 0 else training.num_tokens_per_microbatch_per_dp_rank
    sequences = training.local_batch_size
    if training.global_batch_size > 0:
        sequences = training.global_batch_size / ranks
    return float(sequences * training.seq_len)


def job_specs(config: Any, world_size: int) -> list[list[ParameterSpec]]:
    """The parameters of each part of a job's model; more than one under pipeline parallelism.

    Args:
        config: TorchTitan's JobConfig; settings that change no parameter are switched off in it.

    Raises:
        ValueError, AssertionError, NotImplementedError: ours and TorchTitan's, about degrees of
            parallelism that cannot be, or a memory cap.
    """
    titan().keep_parameters_alone(config)
    parallel_dims(config, world_size)  # before anything else sees what cannot be
    stages = config.parallelism.pipeline_parallel_degree
    specs: list[list[ParameterSpec]] = []
    for stage in range(stages):
        # Stages are the outermost dimension of TorchTitan's meshes.
        with (
            _pretended_ranks(world_size, rank=stage * world_size // stages),
            warnings.catch_warnings(),
        ):
            # A stage lacks modules that TorchTitan's plan of tensor parallelism names.
            warnings.filterwarnings("ignore", message="Parallelize plan key")
            dims = parallel_dims(config, world_size)
            dims.build_mesh()
            parts = titan().model_parts(config, dims)
            if hasattr(config.optimizer, "shampoo"):
                found = [pair for part in parts for pair in typed_parameters(part)]
                named = [plain_name(p.name) for p in found if isinstance(p, FromEmbedding)]
                for of in [config.optimizer, *getattr(config.optimizer, "optimizers", ())]:
                    if settings := getattr(of, "shampoo", None):
                        of.shampoo = with_embeddings(with_heads(settings, parts), named)
            specs += [_specs(part, dims) for part in parts]
    return specs


@contextmanager
def _pretended_ranks(world_size: int, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _specs(part: nn.Module, dims: Any) -> list[ParameterSpec]:
    # DDP keeps plain tensors, which do not say with whom they are replicated.
    ddp = dims.dp_replicate_enabled and not dims.fsdp_enabled
    replicas = dims.get_mesh("dp_replicate").get_group() if ddp else None
    return [describe(plain_name(n), p, replicas) for n, p in part.named_parameters()]


if __name__ == "__main__":
    sys.exit(main())
