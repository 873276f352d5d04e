"""What a block costs a GPU, from the code of the step."""

from collections import Counter
from collections.abc import Sequence

import torch

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.kernels.language import kernels
from shampoo_fsdp.rules import Step
from shampoo_fsdp.rules.stack import BlockStack
from shampoo_fsdp.tools.pretended_gpu import CUDA, pretended_gpu
from shampoo_fsdp.tools.work import Work


def work_of_block(shape: Sequence[int], config: ShampooConfig) -> tuple[Counter[str], Counter[str]]:
    """FLOPs by precision, decompositions and bytes (see :class:`Work`), of a step without a refresh
    and of a refresh.

    Args:
        shape: of the block, without batch dimensions.
        config: that of a GPU.
    """
    values = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    group = GroupSettings.of(values, config)
    with pretended_gpu(), kernels(config.kernels):
        stack = BlockStack(shape, [0], config, torch.empty(1, *shape, device=CUDA))
        # The refresh period's phase is 0: a step of its multiple refreshes.
        count = 1000 * config.precondition_frequency
        step = stack.begin(Step(group, [count], [count], [True], [True], [False]))
        with Work() as work:
            work.part = "factors"
            stack.accumulate(step)
            work.part = "roots"
            stack.refresh(step)
            work.part = "direction"
            stack.direct(step)
    return work.counts["factors"] + work.counts["direction"], work.counts["roots"]
