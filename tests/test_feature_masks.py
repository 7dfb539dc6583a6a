"""Grids and superpixels as Captum feature masks."""

from __future__ import annotations

import sys

import pytest
import torch
from skimage import segmentation

from captum_idexpo import NonFiniteError
from captum_idexpo.attr import KernelShap
from captum_idexpo.feature_masks import felzenszwalb, grid, quickshift, slic
from tests.helpers import smooth_conv_net

IMAGES = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))


def test_grid_numbers_its_cells_row_by_row():
    mask = grid(IMAGES, (5, 8))
    assert mask.shape == (1, 1, 20, 24)
    for row in range(20):
        for column in range(24):
            assert mask[0, 0, row, column] == (row // 5) * 3 + column // 8
    assert grid(torch.zeros(1, 1, 5, 5), 2).unique().tolist() == list(range(9))  # smaller cells at the edges


@pytest.mark.parametrize("function", [slic, felzenszwalb, quickshift])
@pytest.mark.parametrize("channels", [1, 3])
def test_superpixels_equal_those_of_scikit_image_and_fit_captum(function, channels):
    images = IMAGES[:, :channels]
    mask = function(5 + 3 * images)  # units do not matter
    assert mask.shape == (2, 1, 20, 24)
    assert mask.dtype == torch.int64
    options = {
        slic: {"n_segments": 50, "start_label": 0},
        felzenszwalb: {"scale": 100},
        quickshift: {"convert2lab": channels == 3},
    }[function]
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    scaled = ((images - low) / (high - low)).movedim(1, -1).double().numpy()
    for image, ours in zip(scaled, mask, strict=True):
        theirs = torch.as_tensor(getattr(segmentation, function.__name__)(image, channel_axis=-1, **options))
        agreement = (ours[0] == theirs).double().mean()
        assert agreement > 0.95  # up to rounding of the rescaled units
        assert ours.unique().tolist() == list(range(int(ours.max()) + 1))


def test_superpixels_serve_as_feature_mask_of_kernel_shap():
    net, images = smooth_conv_net(), torch.rand(2, 2, 6, 6, dtype=torch.float64)
    attribution = KernelShap(net).attribute(images, target=0, feature_mask=slic(images, n_segments=4), n_samples=30)
    assert attribution.shape == images.shape


def test_slic_accepts_a_constant_image():
    assert slic(torch.ones(1, 1, 8, 8), n_segments=4).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("function", [lambda x: grid(x, 2), slic, felzenszwalb, quickshift])
def test_feature_masks_refuse_inputs_that_are_no_images(function):
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\)"):
        function(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="images"):
        function(torch.zeros(0, 1, 8, 8))
    with pytest.raises(ValueError, match="images"):
        function(IMAGES.numpy())


@pytest.mark.parametrize("function", [slic, felzenszwalb, quickshift])
def test_superpixels_refuse_images_with_nan(function):
    with pytest.raises(NonFiniteError, match=function.__name__):
        function(IMAGES * float("nan"))


def test_grid_refuses_an_invalid_cell_size():
    for cell_size in (0, 1.5, (2,), (2, 0)):
        with pytest.raises(ValueError, match="cell_size"):
            grid(IMAGES, cell_size)


def test_slic_names_the_extra_when_scikit_image_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r"captum-idexpo\[image\]"):
        slic(IMAGES)
    grid(IMAGES, 2)
