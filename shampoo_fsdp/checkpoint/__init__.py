"""What is saved, and what of a checkpoint is loaded.

State is kept by the name of its parameter and by block, never by rank: `sharded.py` and `owned.py`
have its tensors. What of another checkpoint fits is decided in `fits.py`, from shapes and metadata;
a planner for `torch.distributed.checkpoint` and `load_state_dict` carry it out (`loading.py`).
Nothing here may run code that a file asks for (`safe_reader.py`).

    dcp.load(state, checkpoint_id=folder, planner=ShampooLoadPlanner(on_mismatch="rebuild"))
"""

from shampoo_fsdp.checkpoint.fits import CheckpointMismatch, LoadReport
from shampoo_fsdp.checkpoint.loading import ShampooLoadPlanner
from shampoo_fsdp.checkpoint.safe_reader import UnsafeCheckpoint, find_damage

__all__ = [
    "CheckpointMismatch",
    "LoadReport",
    "ShampooLoadPlanner",
    "UnsafeCheckpoint",
    "find_damage",
]
