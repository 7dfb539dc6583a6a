"""The similarity of two maps against its definition, the class that is explained, true gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from captum_idexpo.attr import (
    InputXGradient,
    KernelShap,
    LayerGradCam,
    LayerGradientXActivation,
    Saliency,
    steps_first,
)
from captum_idexpo.regularizers import AttributionDistillation
from captum_idexpo.testing import assert_trainable
from tests.helpers import smooth_conv_net, smooth_net

G = torch.Generator().manual_seed(1)
X = torch.randn(5, 6, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 1, 2, 0, 1])
IMAGES = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=G)
LABELS = torch.tensor([0, 2, 1])
TERM = "attribution_distillation"


def other_net(make=smooth_net):
    """A network of the same form with other weights."""
    net = make()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(
                torch.randn(parameter.shape, dtype=parameter.dtype, generator=torch.Generator().manual_seed(9))
            )
    return net


def test_distillation_explains_the_class_that_the_teacher_predicts():
    student, teacher = smooth_net(), other_net()
    predicted = teacher(X).argmax(1)
    assert not torch.equal(predicted, Y)
    maps = [InputXGradient(net).attribute(X, target=predicted) for net in (student, teacher)]
    expected = (1 - cosine_similarity(*maps)).mean()
    regularizer = AttributionDistillation(InputXGradient(student), InputXGradient(teacher))
    for target in (Y, None, teacher(X).softmax(1).detach()):
        torch.testing.assert_close(regularizer(X, target)[TERM].detach(), expected.detach())


def test_distillation_explains_the_label_on_request():
    student, teacher = smooth_net(), other_net()
    maps = [InputXGradient(net).attribute(X, target=Y) for net in (student, teacher)]
    regularizer = AttributionDistillation(InputXGradient(student), InputXGradient(teacher), explain_class="label")
    expected = (1 - cosine_similarity(*maps)).mean()
    torch.testing.assert_close(regularizer(X, Y)[TERM].detach(), expected.detach())


def test_distillation_from_oneself_is_zero():
    net = smooth_net()
    value = AttributionDistillation(Saliency(net), Saliency(net))(X, Y)[TERM]
    assert value.item() == pytest.approx(0, abs=1e-12)


def test_distillation_has_the_true_gradient_in_the_student_alone():
    student, teacher = smooth_net(), other_net()
    regularizer = AttributionDistillation(InputXGradient(student), InputXGradient(teacher))
    assert_trainable(lambda: regularizer(X, Y), student)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_distillation_of_layer_maps_of_different_sizes_has_the_true_gradient():
    student, teacher = smooth_conv_net(), other_net(smooth_conv_net)
    deep, early = LayerGradCam(student, student[6]), LayerGradCam(teacher, teacher[0])
    regularizer = AttributionDistillation(deep, early)
    assert deep.attribute(IMAGES, target=0).shape != early.attribute(IMAGES, target=0).shape
    assert_trainable(lambda: regularizer(IMAGES, LABELS), student)


def test_distillation_of_a_layer_map_from_an_input_map_sums_its_channels():
    student, teacher = smooth_conv_net(), other_net(smooth_conv_net)
    predicted = teacher(IMAGES).argmax(1)
    small = LayerGradCam(student, student[6]).attribute(IMAGES, target=predicted)
    enlarged = nn.functional.interpolate(small, (6, 6), mode="nearest").flatten(1)
    summed = InputXGradient(teacher).attribute(IMAGES, target=predicted).sum(1).flatten(1)
    regularizer = AttributionDistillation(LayerGradCam(student, student[6]), InputXGradient(teacher))
    expected = (1 - cosine_similarity(enlarged, summed)).mean()
    torch.testing.assert_close(regularizer(IMAGES, LABELS)[TERM].detach(), expected.detach())


def test_distillation_does_not_depend_on_the_scale_of_either_map():
    student, teacher = smooth_net(), other_net()
    usual = AttributionDistillation(Saliency(student), Saliency(teacher))
    small, large = Saliency(lambda x: 1e-12 * student(x)), Saliency(lambda x: 1e9 * teacher(x))
    tiny = AttributionDistillation(small, large, model=student, teacher_model=teacher)
    torch.testing.assert_close(usual(X, Y), tiny(X, Y))


def test_distillation_leaves_the_teacher_in_its_mode_and_its_statistics_alone():
    teacher = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3)).double()
    regularizer = AttributionDistillation(InputXGradient(student := smooth_net()), InputXGradient(teacher))
    before = teacher[1].running_mean.clone()
    first, second = regularizer(X, Y)[TERM], regularizer(X, Y)[TERM]
    assert first == second
    assert teacher.training
    assert torch.equal(teacher[1].running_mean, before)
    assert student.training


def test_distillation_keeps_the_teacher_out_of_parameters_and_state():
    regularizer = AttributionDistillation(InputXGradient(smooth_net()), InputXGradient(other_net()))
    assert not list(regularizer.parameters())
    assert not regularizer.state_dict()


def test_distillation_of_one_logit_explains_the_same_column():
    student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    maps = [InputXGradient(net).attribute(X) for net in (student, teacher)]
    expected = (1 - cosine_similarity(*maps)).mean()
    for outputs, target in (("logits", Y.clamp_max(1)), ("raw", torch.randn(5))):
        regularizer = AttributionDistillation(InputXGradient(student), InputXGradient(teacher), outputs=outputs)
        torch.testing.assert_close(regularizer(X, target)[TERM].detach(), expected.detach())


@pytest.mark.filterwarnings("ignore:The attribution of")
def test_distillation_of_an_empty_student_map_is_one_and_finite():
    student = smooth_net()
    nn.init.zeros_(student[0].weight)
    value = AttributionDistillation(InputXGradient(student), InputXGradient(other_net()))(X, Y)[TERM]
    value.backward()
    assert value.item() == 1
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_distillation_gives_the_teacher_its_own_arguments_and_finds_its_generator():
    generator = torch.Generator().manual_seed(3)
    student, teacher = smooth_net(), other_net()
    regularizer = AttributionDistillation(
        InputXGradient(student),
        KernelShap(teacher),
        teacher_kwargs={"n_samples": 64, "sampling": "independent", "generator": generator},
    )
    assert regularizer.generators == [generator]
    assert regularizer(X, Y)[TERM].isfinite()


def test_distillation_refuses_unknown_classes_and_a_model_as_the_teacher():
    with pytest.raises(ValueError, match=r"explain_class must be 'predicted' or 'label', given: 'best'"):
        AttributionDistillation(Saliency(smooth_net()), Saliency(other_net()), explain_class="best")
    with pytest.raises(TypeError, match="explainer must be an attribution"):
        AttributionDistillation(Saliency(smooth_net()), other_net())


def test_distillation_holds_a_teacher_behind_a_function_in_eval_mode():
    teacher = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    explained = InputXGradient(lambda x: teacher(x))
    with pytest.warns(UserWarning, match="pass model="):
        AttributionDistillation(InputXGradient(smooth_net()), explained)
    regularizer = AttributionDistillation(InputXGradient(smooth_net()), explained, teacher_model=teacher)
    before = teacher[1].running_mean.clone()
    assert regularizer(X, Y)[TERM] == regularizer(X, Y)[TERM]
    assert torch.equal(teacher[1].running_mean, before)


def test_distillation_takes_the_students_arguments_for_the_teacher():
    student, teacher = smooth_net(), other_net()
    maps = [Saliency(net).attribute(X, target=Y, abs=False) for net in (student, teacher)]
    expected = (1 - cosine_similarity(*maps)).mean().detach()
    settings = {"explain_class": "label", "attribute_kwargs": {"abs": False}}
    regularizer = AttributionDistillation(Saliency(student), Saliency(teacher), **settings)
    torch.testing.assert_close(regularizer(X, Y)[TERM].detach(), expected)
    mixed = AttributionDistillation(Saliency(student), Saliency(teacher), teacher_kwargs={}, **settings)
    assert not torch.isclose(mixed(X, Y)[TERM], expected)


def test_distillation_explains_a_transformed_label():
    student, teacher = smooth_net(), other_net()
    settings = {"explain_class": "label"}
    plain = AttributionDistillation(InputXGradient(student), InputXGradient(teacher), **settings)
    regularizer = AttributionDistillation(
        InputXGradient(student), InputXGradient(teacher), target_transform=lambda y: 2 - y, **settings
    )
    torch.testing.assert_close(regularizer(X, Y), plain(X, 2 - Y))


def test_distillation_counts_zero_without_a_true_label():
    settings = {"outputs": "multilabel", "explain_class": "label"}
    regularizer = AttributionDistillation(InputXGradient(smooth_net()), InputXGradient(other_net()), **settings)
    labels = torch.zeros(5, 3)
    labels[0, 1] = labels[1, 2] = 1
    torch.testing.assert_close(regularizer(X, labels)[TERM], regularizer(X[:2], torch.tensor([1, 2]))[TERM] * 2 / 5)


def test_distillation_predicts_by_the_outputs_that_are_announced():
    student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    for outputs in ("logits", "multilabel", "log_probabilities"):
        regularizer = AttributionDistillation(InputXGradient(student), InputXGradient(teacher), outputs=outputs)
        maps = [InputXGradient(net).attribute(X, target=teacher(X).argmax(1)) for net in (student, teacher)]
        expected = (1 - cosine_similarity(*maps)).mean().detach()
        torch.testing.assert_close(regularizer(X, None)[TERM].detach(), expected)


class Scaled(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, scale):
        return self.net(x * scale)


def test_distillation_passes_side_inputs_to_both_and_the_teachers_own_constants():
    student, teacher = Scaled(smooth_net()), Scaled(other_net())
    scales = torch.rand(5, 1, dtype=torch.float64) + 0.5
    regularizer = AttributionDistillation(InputXGradient(student), InputXGradient(teacher))
    predicted = teacher(X, scales).argmax(1)
    maps = [
        InputXGradient(net).attribute(X, target=predicted, additional_forward_args=scales) for net in (student, teacher)
    ]
    expected = (1 - cosine_similarity(*maps)).mean().detach()
    found = regularizer(X, Y, additional_forward_args=scales)[TERM].detach()
    torch.testing.assert_close(found, expected)
    constant = AttributionDistillation(
        InputXGradient(student.net), InputXGradient(teacher), teacher_kwargs={"additional_forward_args": 1.0}
    )
    without = AttributionDistillation(InputXGradient(student.net), InputXGradient(teacher.net))
    torch.testing.assert_close(constant(X, Y), without(X, Y))


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.layer(x).tanh().mean(dim=1))


def test_distillation_has_a_transform_for_each_layer():
    torch.manual_seed(0)
    student, teacher = Steps().double(), Steps().double()
    series = torch.randn(3, 7, 4, dtype=torch.float64, generator=G)
    layers = [LayerGradientXActivation(net, net.layer) for net in (student, teacher)]
    regularizer = AttributionDistillation(
        *layers, reshape_transform=steps_first, teacher_reshape_transform=lambda map: map.mT
    )
    predicted = teacher(series).argmax(1)
    maps = [layer.attribute(series, target=predicted).sum(2) for layer in layers]
    torch.testing.assert_close(regularizer(series, None)[TERM].detach(), (1 - cosine_similarity(*maps)).mean().detach())
    own = AttributionDistillation(layers[0], InputXGradient(teacher), reshape_transform=steps_first)
    assert own(series, None)[TERM].isfinite()


def test_distillation_refuses_a_teacher_of_other_classes():
    teacher = nn.Linear(6, 4).double()
    regularizer = AttributionDistillation(InputXGradient(smooth_net()), InputXGradient(teacher))
    with pytest.raises(ValueError, match=r"student's explained output has 3 columns, the teacher's 4"):
        regularizer(X, Y)


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e-42])
@pytest.mark.filterwarnings("ignore:The attribution of")
def test_distillation_of_very_small_maps_has_finite_gradients(scale):
    student = smooth_net().float()
    small = InputXGradient(lambda x: scale * student(x))
    teacher = other_net().float()
    value = AttributionDistillation(small, InputXGradient(teacher), model=student)(X.float(), Y)[TERM]
    value.backward()
    assert value.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in student.parameters())
