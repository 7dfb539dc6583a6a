"""Modes are changed for a while, module by module, and always restored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_idexpo._core.modes import eval_mode, module_of, training_mode


def net():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()).train()
    model[2].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_eval_mode_restores_each_module(fails):
    model, other = net(), net()
    before = modes(model)
    try:
        with eval_mode(model, None, other):
            assert not any(modes(model) + modes(other))
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert modes(model) == modes(other) == before == [True, True, True, False]


def test_eval_mode_switches_cudnn_off_for_recurrent_layers():
    enabled = torch.backends.cudnn.enabled
    with eval_mode(nn.LSTM(2, 2)):
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled == enabled
    with eval_mode(net()):
        assert torch.backends.cudnn.enabled == enabled


@pytest.mark.parametrize("freeze", [False, True])
def test_training_mode_may_leave_batch_norm_frozen(freeze):
    model = net().eval()
    with training_mode(model, freeze_batch_norm=freeze):
        assert modes(model) == [True, True, not freeze, True]
    assert not any(modes(model))


def test_module_of_finds_the_module_of_a_bound_method():
    model = net()
    assert module_of(model) is model
    assert module_of(model.forward) is model
    assert module_of(lambda x: model(x)) is None


def test_training_mode_calls_the_train_method_of_the_model():
    class Tuned(nn.Module):
        """A head on a backbone that stays in eval mode."""

        def __init__(self):
            super().__init__()
            self.backbone, self.head = net(), nn.Linear(2, 2)

        def train(self, mode=True):
            super().train(mode)
            self.backbone.eval()
            return self

    model = Tuned().eval()
    with training_mode(model, freeze_batch_norm=False):
        assert modes(model) == [True, False, False, False, False, True]
    assert not any(modes(model))
