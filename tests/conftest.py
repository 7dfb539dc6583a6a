import torch

# torch warns once a process; warnings are errors here, and which test fails must not depend on the order.
torch.set_warn_always(True)
torch.set_num_threads(2)
