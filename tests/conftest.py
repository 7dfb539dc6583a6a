import torch

# torch warns once a process; warnings are errors here, and which test fails must not depend on the order.
torch.set_warn_always(True)
# The tests' tensors are small; pytest-xdist (make test) runs a test on each core instead.
torch.set_num_threads(1)
