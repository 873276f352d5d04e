"""Who owns which block, and what moves where.

Names, shapes and placements in, blocks, owners and rectangles out. No tensors and no process group,
so that any mesh can be planned on one machine, and every rank computes the same plan by itself.
What a block costs comes in as a function of its shape. A new placement is taught to
`shards.py`; how blocks are cut stands in `grid.py`, how they are dealt out in `owners.py`.
"""
