"""The similarity of two maps against its definition, the class that is explained, true gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from captum_idexpo.attr import InputXGradient, KernelShap, LayerGradCam, Saliency
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
    tiny = AttributionDistillation(small, large, model=student)
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
