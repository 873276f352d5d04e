"""What runs on the ranks: one object per parameter, on its way through a step.

`parameters.py` and `groups.py` take what the optimizer is given, `ranks.py` lets ranks agree,
`team.py` takes the step of all, `bucket.py` and `exchange.py` move gradients to the owners of their
blocks and updates back, `excluded.py` updates the other parameters. Here stand all collectives of
the step: every rank must make the same ones, whatever it has seen, and nothing may make the host
wait for the device.
"""
