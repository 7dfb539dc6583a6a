"""The pages' code runs as a test (see testpaths in setup.cfg), each page in a folder of its own, with one seed."""

from __future__ import annotations

import pytest
import torch

from captum_idexpo._core.compiled import can_run_eagerly

# The trainer refuses compiled models on an older PyTorch.
collect_ignore = [] if can_run_eagerly() else ["howto/compiled.rst"]


@pytest.fixture(autouse=True)
def _own_folder_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
