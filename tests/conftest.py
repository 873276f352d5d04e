"""Settings of the whole test session."""

import torch

# The tests' tensors are small: threads cost more than they give, and one thread makes the
# rounding of sums independent of the machine's number of cores.
torch.set_num_threads(1)
