"""A stand-in for TorchTitan 0.4, which no package index had when this was written.

    python -m tests.titan_04 FOLDER && PYTHONPATH=FOLDER pytest tests/shampoo_torchtitan

makes a TorchTitan in FOLDER that is the installed 0.3.0 but for its optimizers: those are the
classes of `optimizer.py`, written by us from what is public of 0.4:

- pytorch/torchtitan 058df672, torchtitan/components/optimizer/optimizer.py: `BaseOptimizer.Config`
  with a pattern, `Adam`, `AdamW`, `OptimizersContainer.Config(optimizers=[...])`;
- 276e0b9b, torchtitan/components/optimizer/utils.py: `init_optim_state`, which steps with zeros for
  the parameters without state. Its other functions are those that 0.3.0 has.

What else 0.4 has changed is not in it.
"""
