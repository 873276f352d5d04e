"""What is saved, and what of a checkpoint is loaded.

State is kept by the name of its parameter and by block, never by rank: `sharded.py` and `owned.py`
are its tensors, `entries.py` makes them from blocks. What of another checkpoint fits is decided in
`fits.py`, from shapes and metadata, and `reasons.py` has the words; a planner for
`torch.distributed.checkpoint` and `load_state_dict` carry it out. Nothing here may run code that a
file asks for (`safe_reader.py`, `safe_values.py`, `safe_pickle.py`).

    dcp.load(state, checkpoint_id=folder, planner=ShampooLoadPlanner(on_mismatch="rebuild"))
"""

from shampoo_fsdp.checkpoint.fits import LoadReport
from shampoo_fsdp.checkpoint.planner import ShampooLoadPlanner, find_damage
from shampoo_fsdp.checkpoint.reasons import CheckpointMismatch

__all__ = ["CheckpointMismatch", "LoadReport", "ShampooLoadPlanner", "find_damage"]
