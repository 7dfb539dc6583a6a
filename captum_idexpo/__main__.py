"""Print what a bug report needs: versions, platform and devices.

Example:
    $ python -m captum_idexpo
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from captum_idexpo import __version__

OPTIONAL = (
    "scikit-learn",
    "accelerate",
    "tqdm",
    "torchmetrics",
    "torchvision",
    "scikit-image",
    "matplotlib",
    "pandas",
)


def facts() -> Iterator[tuple[str, str]]:
    """Yield pairs (name, fact) in the order of the report."""
    yield "captum-idexpo", __version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "torch", torch.__version__
    for name in ("captum", "numpy", *OPTIONAL):
        yield name, _installed(name)
    yield "platform", platform.platform()
    yield "CPU", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    yield "built for", _gpu_build()
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield "mps", f"{memory / 2**30:.1f} GiB, shared with the CPU"
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        yield "GPU", "none that torch can use"


def main() -> None:
    """Print the facts, one per line."""
    for name, fact in facts():
        print(f"{name + ':':<15}{fact}")


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _gpu_build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}, MIOpen {torch.backends.cudnn.version()}"
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return "the CPU and MPS" if torch.backends.mps.is_built() else "the CPU"


if __name__ == "__main__":
    main()
