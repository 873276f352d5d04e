"""A GPU and its network as a few rates: what a step would take by them."""

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["add_rates", "machine_of"]


@dataclass(frozen=True)
class Machine:
    """What is assumed, an H100 in a node of 8: rates that are reached, not those that are
    advertised. Those of products in 16 bits and TF32, of memory and of the host were measured in
    steps of a Llama of 665 million parameters on one, those of decompositions at n = 1024."""

    bf16: float = 600.0
    """TFLOP/s of matrix products in bf16 or fp16, ..."""
    tf32: float = 190.0
    """... in TF32, ..."""
    fp32: float = 50.0
    """... in fp32."""
    eigh: float = 12.0
    """Milliseconds of a decomposition of 1024 x 1024; of n x n they go with n^1.5, ..."""
    qr: float = 4.7
    """... and of a QR decomposition."""
    training: float = 400.0
    """TFLOP/s of forward and backward, 6 per parameter and token."""
    bandwidth: float = 2.4
    """TB/s of device memory."""
    node: float = 300.0
    """GB/s that a rank sends to ranks of its node."""
    network: float = 45.0
    """GB/s that it sends to those of other nodes."""
    launch: float = 3.0
    """Microseconds that the smallest kernel takes."""
    host_launch: float = 18.0
    """Microseconds that the host takes for a kernel, while the GPU is busy with others."""
    tokens: float = 8192.0
    """Of a step, for each data-parallel rank, as a trainer's batch says it: its sequences times
    their length, over all microbatches."""
    active: float = 1.0
    """The part of all parameters that a token uses; mixtures of experts use less than all."""
    gpu_memory: float = 79.1
    """GiB that programs can have."""

    def milliseconds(self, work: Mapping[str, float]) -> float:
        """Time of a kernel, or of some that are alike, by FLOPs by precision, decompositions, bytes
        and launches (see `Work.counts`): the longest of what units, memory and launches take."""
        rates = {"bf16": self.bf16, "tf32": self.tf32, "fp32": self.fp32}
        products = 1e-9 * sum(work.get(kind, 0) / rate for kind, rate in rates.items())
        decomposed = (self.eigh * work.get("eigh", 0) + self.qr * work.get("qr", 0)) / 2**15
        moved = 1e-9 * work.get("bytes", 0) / self.bandwidth
        return max(products + decomposed, moved, 1e-3 * self.launch * work.get("launches", 0))

    def transfer(self, near: float, far: float) -> float:
        """Milliseconds of a transfer, given the bytes that go to ranks of the node and to others;
        both ways are used at once."""
        return max(near / self.node, far / self.network) * 1e-6

    def training_step(self, parameters: float, sharing: int = 1) -> float:
        """Milliseconds of forward and backward of a model.

        Args:
            sharing: GPUs that share the work on a data-parallel rank's tokens, by tensor, context
                and pipeline parallelism.
        """
        flops = 6.0 * parameters * self.active * self.tokens
        return flops / (sharing * 1e9 * self.training)

    def __str__(self) -> str:
        return ", ".join(f"{name} {rate:,g}" for name, rate in dataclasses.asdict(self).items())


GPUS: dict[str, dict[str, float]] = {
    "h100-80gb": {},
    "h200-141gb": {"bandwidth": 3.4, "gpu_memory": 139.8},
    "a100-40gb": {
        "bf16": 190.0, "tf32": 60.0, "fp32": 15.0, "training": 126.0, "bandwidth": 1.1,
        "node": 200.0, "network": 22.0, "gpu_memory": 39.4,
    },
    "a100-80gb": {
        "bf16": 190.0, "tf32": 60.0, "fp32": 15.0, "training": 126.0, "bandwidth": 1.4,
        "node": 200.0, "network": 22.0, "gpu_memory": 79.1,
    },
    "b200-180gb": {
        "bf16": 1360.0, "tf32": 430.0, "fp32": 60.0, "training": 910.0, "bandwidth": 5.7,
        "node": 600.0, "gpu_memory": 178.0,
    },
}  # fmt: skip
"""By name what differs from an H100: its rates, by the ratio of what is advertised. Those of
decompositions and launches are not known."""


def add_rates(parser: argparse.ArgumentParser) -> None:
    """An option for each of them, and `--gpu`."""
    parser.add_argument("--gpu", default="h100-80gb", choices=GPUS, help="default: h100-80gb")
    options = parser.add_argument_group(
        "of a GPU, its network and its host (TFLOP/s, TB/s, ms, GB/s, microseconds, GiB)"
    )
    for field in dataclasses.fields(Machine):
        options.add_argument(
            f"--{field.name}", type=float, default=None, help=f"of an H100: {field.default}"
        )


def machine_of(options: dict[str, Any]) -> Machine:
    """Takes the options of :func:`add_rates` out of those that a parser has found.

    Raises:
        ValueError: names a rate that is not positive.
    """
    given = {field.name: options.pop(field.name) for field in dataclasses.fields(Machine)}
    rates = {name: rate for name, rate in given.items() if rate is not None}
    for name, rate in rates.items():
        if not rate > 0.0:
            raise ValueError(f"--{name} is {rate}; it must be positive.")
    return Machine(**GPUS[options.pop("gpu")] | rates)
