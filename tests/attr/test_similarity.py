"""The batched kernels against Captum's function on the masked copies themselves."""

from __future__ import annotations

import pytest
import torch
from captum.attr._core.lime import get_exp_kernel_similarity_function

from captum_idexpo._core.features import FeatureLayout, MaskedInputs
from captum_idexpo.attr.similarity import InputKernel, MaskSimilarity


@pytest.mark.parametrize("mode", ["cosine", "euclidean"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("baselines", [(0.3, torch.tensor([[1.0, -2.0, 0.0, 0.5, 3.0]])), (0, 0.0)])
def test_input_kernel_equals_captums_kernel_on_the_masked_copies(mode, joint, baselines):
    torch.manual_seed(0)
    inputs = (torch.randn(3, 2, 4, 4), torch.randn(3, 5))
    mask = (torch.randint(6, (3, 1, 4, 4)), torch.randint(6, (1, 5)))
    layout = FeatureLayout.of_mask(mask, inputs)
    captums = get_exp_kernel_similarity_function(mode, 0.8)
    masks = torch.rand(1 if joint else 3, 7, layout.n_features) < 0.5
    ours = InputKernel.of(captums).weights(masks, layout, inputs, baselines, joint)
    for b in range(len(masks)):
        examples = slice(None) if joint else slice(b, b + 1)
        for m in range(7):
            chosen = masks[b : b + 1, m : m + 1]
            masked = MaskedInputs(inputs, baselines, layout)
            copies = tuple(copy[0] for copy in masked.copies(chosen, examples))
            original = tuple(tensor[examples] for tensor in inputs)
            assert float(ours[b, m]) == pytest.approx(float(captums(original, copies, None)), abs=1e-6)


def test_input_kernel_of_an_input_of_zeros_equals_captum():
    inputs = (torch.zeros(1, 4),)
    layout = FeatureLayout.of_positions([torch.Size([4])])
    captums = get_exp_kernel_similarity_function()
    ours = InputKernel.of(captums).weights(torch.ones(1, 1, 4), layout, inputs, (0,))
    assert float(ours) == pytest.approx(captums(inputs[0], inputs[0], None))


def test_input_kernel_recognises_only_captums_kernels():
    assert InputKernel.of(lambda *_, **__: 1.0) is None
    assert InputKernel.of(MaskSimilarity()) is None
    assert InputKernel.of(get_exp_kernel_similarity_function("cosine", 2.0)) == InputKernel("cosine", 2.0)
    assert InputKernel.of(get_exp_kernel_similarity_function("other")) is None  # Captum's own error, when called


def test_mask_similarity_is_the_cosine_kernel_on_masks():
    z = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    distance = 1 - torch.nn.functional.cosine_similarity(z, torch.ones(1, 4))
    torch.testing.assert_close(MaskSimilarity(0.5).weights(z), torch.exp(-(distance**2) / 0.5))
