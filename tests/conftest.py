import random

import numpy as np
import pytest
import torch

# torch warns once a process; warnings are errors here, and which test fails must not depend on the order.
torch.set_warn_always(True)
# The tests' tensors are small; pytest-xdist (make test) runs a test on each core instead.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """A test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)  # GradientShap and DeepLiftShap of Captum draw baselines from it
    random.seed(0)
