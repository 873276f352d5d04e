"""Says in a sentence why a checkpoint cannot be loaded, instead of one traceback per rank."""

import re

from torch.distributed.checkpoint import CheckpointException

from shampoo_fsdp.state import CAP

__all__ = ["explain"]

_OTHER_SIZE = re.compile(r"saved torch\.Size\((.*?)\) and current: torch\.Size\((.*?)\) for (\S+)")
_MISSING_KEY = re.compile(r"Missing key in checkpoint state_dict: (\S+?)\.?$")
_ELSEWHERE = "or start anew with another --job.dump_folder"


def explain(error: CheckpointException, folder: str) -> str:
    """What is wrong with a checkpoint, and what to do.

    Args:
        error: What loading it raised; every rank has the failures of all.
        folder: The checkpoint, or the folder of the job's checkpoints.
    """
    rank, (failure, _) = min(error.failures.items())
    said = str(failure)
    if size := _OTHER_SIZE.search(said):
        saved, current, key = size.groups()
        if key.endswith(CAP):
            then, now = (shape.strip("[]").split(",")[0] for shape in (saved, current))
            return (
                f"{folder} was saved with optimizer.shampoo.{CAP} = {then}, but the job says "
                f"{now}: set it to {then}, {_ELSEWHERE}."
            )
        return (
            f"{folder} has {key} with shape {saved}, here it is {current}: is it of another model, "
            f"or of another optimizer.shampoo.block_alignment? {_ELSEWHERE.capitalize()}."
        )
    if missing := _MISSING_KEY.search(said):
        return (
            f"{folder} lacks {missing[1]}: was it saved without the optimizer "
            "(checkpoint.last_save_model_only), by another optimizer, or with other parameters "
            f"preconditioned (optimizer.shampoo.exclude)? Set that as it was, {_ELSEWHERE}."
        )
    return (
        f"{folder} is damaged or incomplete; rank {rank} found: {type(failure).__name__}: "
        f"{said.splitlines()[0] if said else ''} An older one is loaded with "
        "--checkpoint.load_step."
    )
