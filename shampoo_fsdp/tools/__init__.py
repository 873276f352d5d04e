"""Looking before a run and after it: the plan of a model on a mesh, and what is in a checkpoint.

Nothing of the optimizer needs this room, and nothing here trains. `command.py` is
`python -m shampoo_fsdp`.
"""
