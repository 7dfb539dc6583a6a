"""What `python -m captum_idexpo` tells for a bug report."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

import captum_idexpo
from captum_idexpo.__main__ import OPTIONAL, facts, main
from tests.helpers import EXTRAS, project


def test_facts_give_the_installed_versions():
    told = dict(facts())
    assert told["captum-idexpo"] == captum_idexpo.__version__
    assert told["Python"].startswith(platform.python_version())
    assert told["torch"] == torch.__version__
    for name in ("captum", "numpy", *OPTIONAL):
        assert told[name] == version(name)


def test_facts_say_what_is_not_installed(monkeypatch):
    monkeypatch.setattr("captum_idexpo.__main__.OPTIONAL", ("a-package-that-does-not-exist",))
    assert dict(facts())["a-package-that-does-not-exist"] == "not installed"


def test_facts_list_every_package_of_the_extras():
    extras = project()["optional-dependencies"]
    assert set(OPTIONAL) == {requirement.split(">=")[0] for name in EXTRAS for requirement in extras[name]}


def test_facts_list_every_device():
    told = dict(facts())
    gpus = [name for name in told if name.startswith(("cuda:", "mps"))]
    assert len(gpus) == torch.cuda.device_count() + torch.backends.mps.is_available()
    assert ("GPU" in told) == (not gpus)
    assert f"{torch.get_num_threads()} of" in told["CPU"]


def test_main_prints_a_line_for_each_fact(capsys):
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [name for name, _ in facts()]
