"""A simulated accelerator, for tests of what depends on the device where there is no GPU; see device.cpp.

It is compiled at first use, in half a minute, which takes a C++ compiler and ninja. Written against PyTorch 2.14.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

NAME = "npu"  # one that accelerate lets train in half precision


def register() -> torch.device:
    """The device, which ``.to(...)`` and ``device=`` take from now on."""
    source, folder = Path(__file__).with_name("device.cpp"), Path(sys.prefix) / f"simulated-{torch.__version__}"
    folder.mkdir(exist_ok=True)
    extension = load("simulated_accelerator", [str(source)], extra_cflags=["-O1"], build_directory=str(folder))
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    functions = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda *_: None,
        "manual_seed_all": lambda seed: extension.manual_seed(seed % 2**63),
        "get_rng_state": lambda *_: extension.get_rng_state(),
        "set_rng_state": lambda state, *_: extension.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "_is_in_bad_fork": lambda: False,
    }
    for name, function in functions.items():
        setattr(module, name, function)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.device(NAME, 0)
