"""The two views: what they depend on, and every transform against another implementation."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from mlvicx_hf.pretraining.views import DRAWS, TwoViewAugmentation, view_draws

IDENTITY = TwoViewAugmentation(
    image_size=64,
    crop_area=(1.0, 1.0),
    crop_ratio=(1.0, 1.0),
    flip=0.0,
    rotation=0.0,
    jitter=0.0,
    blur=(0.0, 0.0),
    solarize=(0.0, 0.0),
    mean=0.0,
    std=1.0,
)


def smooth_images(count: int = 3, size: int = 64, seed: int = 0) -> Tensor:
    noise = np.random.default_rng(seed).normal(size=(count, size, size))
    smooth = np.stack([scipy.ndimage.gaussian_filter(plane, 3) for plane in noise])
    low, high = smooth.min((1, 2), keepdims=True), smooth.max((1, 2), keepdims=True)
    return torch.from_numpy(np.round((smooth - low) / (high - low) * 255).astype(np.uint8))[:, None]


def draws(count: int, **values: float) -> Tensor:
    table = torch.full((count, 2, len(DRAWS)), 0.5)
    for name, value in values.items():
        table[:, :, DRAWS.index(name)] = value
    return table


# -- what the views depend on -----------------------------------------------------------------------------------------


def test_draws_depend_on_seed_epoch_and_sample_alone():
    table = view_draws(7, 3, [5, 0, 1000, 2])
    assert table.shape == (4, 2, len(DRAWS))
    assert table.dtype == torch.float32
    for row, sample in zip(table, [5, 0, 1000, 2], strict=True):
        assert torch.equal(row, view_draws(7, 3, [sample])[0])
        assert torch.equal(row, view_draws(7, 3, np.array([1, sample, 9]))[1])
    assert (
        len({view_draws(*key).numpy().tobytes() for key in [(7, 3, [5]), (8, 3, [5]), (7, 4, [5]), (7, 3, [6])]}) == 4
    )
    assert not torch.equal(table[:, 0], table[:, 1])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 500), st.lists(st.integers(0, 2**31), min_size=1, max_size=8))
def test_draws_of_any_run(seed: int, epoch: int, samples: list[int]):
    table = view_draws(seed, epoch, samples)
    assert ((table >= 0) & (table < 1)).all()
    backwards = view_draws(seed, epoch, samples[::-1])
    assert torch.equal(backwards.flip(0), table)


def test_draws_are_uniform_and_uncorrelated():
    table = view_draws(0, 0, range(4000)).flatten(1).double()  # [4000, 2·12]
    assert (table.mean(0) - 0.5).abs().max() < 0.025
    assert (table.var(0) - 1 / 12).abs().max() < 0.006
    correlation = torch.corrcoef(table.T) - torch.eye(table.shape[1])
    assert correlation.abs().max() < 0.08
    between = torch.corrcoef(torch.stack([table[:-1].flatten(), table[1:].flatten()]))[0, 1]
    assert between.abs() < 0.02
    epochs = torch.corrcoef(torch.stack([table.flatten(), view_draws(0, 1, range(4000)).double().flatten()]))[0, 1]
    assert epochs.abs() < 0.02


def test_no_two_samples_share_a_part_of_the_stream():
    values = [table.numpy() for key in [(0, 0), (0, 1), (1, 0)] for table in view_draws(*key, range(300))]
    distinct = np.unique(np.concatenate([table.ravel() for table in values])).size
    assert distinct > 0.99 * len(values) * values[0].size  # of 24 bits, some agree by chance


def test_views_depend_on_no_other_sample():
    augment = TwoViewAugmentation(image_size=32)
    images = smooth_images(6)
    samples = [11, 5, 7, 3, 2, 13]
    together = augment(images, view_draws(1, 2, samples))
    order = [4, 0, 2]
    apart = augment(images[order], view_draws(1, 2, [samples[i] for i in order]))
    for all_views, some_views in zip(together, apart, strict=True):
        torch.testing.assert_close(some_views, all_views[order], rtol=0, atol=1e-6)
    other = augment(images, view_draws(1, 3, samples))
    assert all((a - b).abs().mean((1, 2, 3)).min() > 1e-3 for a, b in zip(together, other, strict=True))
    assert (together[0] - together[1]).abs().mean((1, 2, 3)).min() > 1e-3


# -- single transforms ------------------------------------------------------------------------------------------------


def test_nothing_chosen_is_the_image_itself():
    images = smooth_images()
    for view in IDENTITY(images, view_draws(0, 0, range(3))):
        torch.testing.assert_close(view, images / 255, rtol=0, atol=1e-5)


def test_nothing_chosen_resizes():
    images = smooth_images(size=128)
    for view in IDENTITY(images, view_draws(0, 0, range(3))):
        assert view.shape == (3, 1, 64, 64)
        expected = torch.nn.functional.avg_pool2d(images / 255, 2)
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)
    grown = replace(IDENTITY, image_size=96)(images[..., :64, :64], draws(3))[0]
    expected = torch.nn.functional.interpolate(images[..., :64, :64] / 255, size=96, mode="bilinear")
    torch.testing.assert_close(grown[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=0, atol=1e-4)


def test_a_large_image_is_not_aliased():
    stripes = torch.zeros(1, 1, 256, 256, dtype=torch.uint8)
    stripes[..., ::2] = 255
    view = IDENTITY(stripes, draws(1))[0]
    assert (view - 0.5).abs().max() < 0.01


def test_flip_mirrors():
    images = smooth_images()
    view_1, view_2 = replace(IDENTITY, flip=1.0)(images, view_draws(0, 0, range(3)))
    torch.testing.assert_close(view_1, (images / 255).flip(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(view_2, view_1)
    table = draws(3)
    table[:, 0, DRAWS.index("flip")] = torch.tensor([0.2, 0.299, 0.301])
    mixed = replace(IDENTITY, flip=0.3)(images, table)[0]
    torch.testing.assert_close(mixed[:2], (images / 255).flip(-1)[:2], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[2:], (images / 255)[2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("draw", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_rotation_equals_scipy(draw: float, flip: float):
    images = smooth_images()
    augment = replace(IDENTITY, rotation=15.0, flip=flip)
    view = augment(images, draws(3, angle=draw))[0][:, 0].numpy()
    angle = 15 * (2 * draw - 1)
    plain = (images / 255)[:, 0].numpy()
    signs = []
    for sign in (1, -1):  # which way is positive is of no concern: angles are drawn symmetrically
        turned = scipy.ndimage.rotate(plain, sign * angle, axes=(1, 2), reshape=False, order=1)
        turned = turned[..., ::-1] if flip else turned
        signs.append(np.abs(view - turned)[:, 14:-14, 14:-14].max())
    assert min(signs) < 0.01
    assert max(signs) > 0.05


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_crop_that_is_not_square_is_cut_then_turned(ratio: float):
    images = smooth_images()
    crop = replace(IDENTITY, crop_area=(0.4, 0.4), crop_ratio=(0.5, 2.0))
    table = draws(3, ratio=ratio, angle=1.0)
    plain, view = crop(images, table)[0][:, 0].numpy(), replace(crop, rotation=20.0)(images, table)[0][:, 0].numpy()
    turned = [scipy.ndimage.rotate(plain, angle, axes=(1, 2), reshape=False, order=1) for angle in (20, -20)]
    differences = [np.abs(view - other)[:, 16:-16, 16:-16].max() for other in turned]
    assert min(differences) < 0.01
    assert max(differences) > 0.05


def test_rotation_reaches_both_limits_and_fills_with_black():
    white = torch.full((1, 1, 64, 64), 255, dtype=torch.uint8)
    augment = replace(IDENTITY, rotation=45.0)
    for draw in (0.0, 1.0):
        view = augment(white, draws(1, angle=draw))[0]
        corners = view[..., [0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.max() == 0
        assert view[..., 32, 32] == pytest.approx(1)
        assert view.mean() == pytest.approx(2 * (math.sqrt(2) - 1), abs=0.02)  # the octagon in both squares


@pytest.mark.parametrize(("left", "top"), [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.0, 1.0)])
def test_a_crop_equals_cutting_and_resizing(left: float, top: float):
    images = smooth_images()
    augment = replace(IDENTITY, crop_area=(0.25, 0.25), image_size=32)  # half the side; a view pixel an image pixel
    view = augment(images, draws(3, left=left, top=top))[0]
    x, y = round(left * 32), round(top * 32)
    pooled = torch.nn.functional.avg_pool2d(images / 255, 2)
    expected = torch.nn.functional.interpolate(
        pooled[..., y // 2 : y // 2 + 16, x // 2 : x // 2 + 16], size=32, mode="bilinear"
    )
    torch.testing.assert_close(view[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], rtol=0, atol=0.01)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_scipy_and_torchvision(sigma: float):
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = replace(IDENTITY, blur=(1.0, 0.0), blur_sigma=(sigma, sigma))
    view_1, view_2 = augment(images, view_draws(0, 0, range(2)))
    plain = (images / 255)[:, 0].numpy()
    inside = (slice(None), slice(12, -12), slice(12, -12))
    expected = np.stack([scipy.ndimage.gaussian_filter(plane, sigma, truncate=6) for plane in plain])
    np.testing.assert_allclose(view_1[:, 0].numpy()[inside], expected[inside], atol=1e-5)
    second = tv.gaussian_blur(images / 255, [25, 25], [sigma, sigma])[:, 0].numpy()
    np.testing.assert_allclose(view_1[:, 0].numpy()[inside], second[inside], atol=1e-5)
    torch.testing.assert_close(view_2, images / 255, rtol=0, atol=1e-5)  # probability 0 there


def test_blur_range_and_choice():
    images = smooth_images(2)
    images[:] = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    augment = replace(IDENTITY, blur=(0.5, 0.5), blur_sigma=(0.5, 1.5))
    table = draws(2, sigma=0.25)
    table[0, :, DRAWS.index("blur")] = 0.49
    table[1, :, DRAWS.index("blur")] = 0.51
    view = augment(images, table)[0]
    expected = scipy.ndimage.gaussian_filter((images[0, 0] / 255).numpy(), 0.75, truncate=6)
    np.testing.assert_allclose(view[0, 0, 10:-10, 10:-10].numpy(), expected[10:-10, 10:-10], atol=1e-5)
    torch.testing.assert_close(view[1], images[1] / 255, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bright", "contrast"), [(0.0, 0.0), (1.0, 1.0), (0.3, 0.9), (0.9, 0.1)])
def test_jitter_is_brightness_and_contrast_about_the_mean(bright: float, contrast: float):
    images = smooth_images()
    augment = replace(IDENTITY, jitter=1.0, brightness=0.4, contrast=0.2)
    view = augment(images, draws(3, brightness=bright, contrast=contrast))[0]
    b, c = 1 + 0.4 * (2 * bright - 1), 1 + 0.2 * (2 * contrast - 1)
    for image, found in zip(images / 255, view, strict=True):
        brightened = image * b
        expected = ((brightened - brightened.mean()) * c + brightened.mean()).clamp(0, 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_jitter_by_probability():
    images = smooth_images(2)
    table = draws(2, brightness=1.0, contrast=1.0)
    table[:, 0, DRAWS.index("jitter")] = torch.tensor([0.79, 0.81])
    view = replace(IDENTITY, jitter=0.8)(images, table)[0]
    assert (view[0] - images[0] / 255).abs().mean() > 0.05
    torch.testing.assert_close(view[1], images[1] / 255, rtol=0, atol=1e-5)


def test_solarize_inverts_what_is_bright():
    images = smooth_images()
    view_1, view_2 = replace(IDENTITY, solarize=(0.0, 1.0))(images, draws(3))
    plain = images / 255
    torch.testing.assert_close(view_1, plain, rtol=0, atol=1e-5)
    bright = plain > 0.5  # no 8-bit value is one half
    torch.testing.assert_close(view_2[bright], (1 - plain)[bright], rtol=0, atol=1e-5)
    torch.testing.assert_close(view_2[~bright], plain[~bright], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        replace(IDENTITY, solarize=(1.0, 0.0), solarize_threshold=0.25)(images, draws(3))[0],
        torch.where(plain > 0.25, 1 - plain, plain),
        rtol=0,
        atol=1e-5,
    )


# -- geometry ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.02, 1.0),
    st.floats(0.02, 1.0),
    st.floats(0.2, 1.0),
    st.floats(1.0, 5.0),
    st.integers(0, 2**31),
)
def test_crops_keep_their_range_and_stay_inside(a: float, b: float, low: float, high: float, seed: int):
    areas = (min(a, b), max(a, b))
    augment = replace(IDENTITY, crop_area=areas, crop_ratio=(low, high), flip=0.5)
    table = view_draws(seed, 0, range(64))[:, 0].double()
    matrix = augment.geometry(dict(zip(DRAWS, table.unbind(1), strict=True)))  # [64, 2, 3]
    assert matrix.shape == (64, 2, 3)
    width, height = matrix[:, 0, 0].abs(), matrix[:, 1, 1].abs()
    area, ratio = width * height, width / height
    tolerance = 1e-9
    assert ((area >= areas[0] - tolerance) & (area <= areas[1] + tolerance)).all()
    assert ((ratio >= low - tolerance) & (ratio <= high + tolerance)).all()
    assert (matrix[:, 0, 2].abs() + width <= 1 + tolerance).all()
    assert (matrix[:, 1, 2].abs() + height <= 1 + tolerance).all()
    assert (matrix[:, 0, 1] == 0).all()
    assert (matrix[:, 1, 0] == 0).all()


def test_areas_and_ratios_are_spread_over_their_ranges():
    augment = replace(IDENTITY, crop_area=(0.2, 0.6), crop_ratio=(3 / 4, 4 / 3))
    table = view_draws(0, 0, range(3000))[:, 0].double()
    matrix = augment.geometry(dict(zip(DRAWS, table.unbind(1), strict=True)))
    width, height = matrix[:, 0, 0], matrix[:, 1, 1]
    area, ratio = width * height, (width / height).log() / math.log(4 / 3)
    quarter = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    torch.testing.assert_close(area.quantile(quarter), 0.2 + 0.4 * quarter, rtol=0, atol=0.02)
    torch.testing.assert_close(ratio.quantile(quarter), 2 * quarter - 1, rtol=0, atol=0.06)


# -- what comes out, and what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("size", [48, 64, 150])
def test_range_type_and_shape(num_channels: int, size: int):
    augment = TwoViewAugmentation(
        image_size=32, num_channels=num_channels, rotation=30, brightness=0.9, contrast=0.9, solarize=(0.5, 0.5)
    )
    images = torch.randint(0, 256, (16, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for view in augment(images, view_draws(3, 1, range(16))):
        assert view.shape == (16, num_channels, 32, 32)
        assert view.dtype == torch.float32
        assert view.min() >= (0 - 0.5) / 0.25 - 1e-5
        assert view.max() <= (1 - 0.5) / 0.25 + 1e-5
        assert all(torch.equal(view[:, 0], view[:, channel]) for channel in range(num_channels))


def test_normalised_at_the_end():
    images = smooth_images()
    plain = IDENTITY(images, draws(3))[0]
    view = replace(IDENTITY, mean=0.3, std=0.2)(images, draws(3))[0]
    torch.testing.assert_close(view, (plain - 0.3) / 0.2)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.uint8)],
)
def test_images_of_another_kind_are_refused(images: Tensor):
    with pytest.raises(ValueError, match=r"found; expected uint8 \[B, 1, S, S\]"):
        IDENTITY(images, draws(len(images)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_area": (0.0, 1.0)}, "crop_area"),
        ({"crop_area": (0.5, 0.2)}, "crop_area"),
        ({"crop_area": (0.5, 1.1)}, "crop_area"),
        ({"crop_ratio": (1.1, 2.0)}, "crop_ratio"),
        ({"crop_ratio": (0.0, 2.0)}, "crop_ratio"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"blur_sigma": (2.0, 1.0)}, "blur_sigma"),
        ({"flip": 1.5}, "flip"),
        ({"jitter": -0.1}, "jitter"),
        ({"blur": (0.5, 2.0)}, "blur"),
        ({"solarize": (-1.0, 0.5)}, "solarize"),
        ({"brightness": -0.5}, "brightness"),
        ({"contrast": 1.5}, "contrast"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_magnitudes_outside_their_range_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"{message}=.* found; expected"):
        TwoViewAugmentation(**values)


def test_channels_are_normalised_by_their_own_constants():
    """As ImageNet's colour networks expect a grey image that is repeated."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    plain, _ = TwoViewAugmentation(image_size=8, mean=0.0, std=1.0)(images, draws(4))
    colour, _ = TwoViewAugmentation(image_size=8, num_channels=3, mean=mean, std=std)(images, draws(4))
    expected = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(colour, expected)


def test_equal_constants_of_three_channels_are_one_number():
    """An image processor takes such lists for grey input."""
    grey = torch.rand(2, 1, 16, 16)
    listed = TwoViewAugmentation(image_size=16, mean=[0.4] * 3, std=[0.3] * 3)
    single = TwoViewAugmentation(image_size=16, mean=0.4, std=0.3)
    assert torch.equal(listed.normalise(grey.clone()), single.normalise(grey.clone()))
