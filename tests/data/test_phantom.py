import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlvicx_hf.data.images.pictures import contact_sheet
from mlvicx_hf.data.synthetic import phantom as phantom_module
from mlvicx_hf.data.synthetic.drawing import Canvas, Pose, attenuate
from mlvicx_hf.data.synthetic.phantom import FINDINGS, Phantom, draw_phantom, phantom_labels

NUM_PATIENTS, SIZE = 320, 64


def digest(phantom: Phantom) -> str:
    masks = b"".join(phantom.masks[name].tobytes() for name in sorted(phantom.masks))
    return hashlib.sha256(phantom.image.tobytes() + masks).hexdigest()


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [draw_phantom(patient, size=SIZE, seed=3) for patient in range(NUM_PATIENTS)]


@pytest.fixture(scope="module")
def labels(phantoms: list[Phantom]) -> np.ndarray:
    return np.array([phantom.labels for phantom in phantoms])


def test_interface() -> None:
    phantom = draw_phantom(12, 1, size=48)
    assert phantom.patient_id == "phantom-000012"
    assert phantom.image_id == "phantom-000012-1"
    assert FINDINGS == ("Cardiomegaly", "Effusion", "Pneumothorax", "Nodule", "Consolidation")
    assert set(phantom.masks) == {"lungs", "heart", *FINDINGS}
    for picture in (phantom.image, *phantom.masks.values()):
        assert picture.shape == (48, 48)
        assert picture.dtype == np.uint8
    assert all(set(np.unique(mask)) <= {0, 255} for mask in phantom.masks.values())


def test_the_same_arguments_draw_the_same_picture_in_any_order_and_process() -> None:
    program = (
        "import hashlib; from mlvicx_hf.data.synthetic.phantom import draw_phantom\n"
        "phantom = draw_phantom(7, 2, size=64, seed=5)\n"
        "masks = b''.join(phantom.masks[name].tobytes() for name in sorted(phantom.masks))\n"
        "print(hashlib.sha256(phantom.image.tobytes() + masks).hexdigest())"
    )
    fresh = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    draw_phantom(8, 0, size=96, seed=5)
    draw_phantom(7, 1, size=64, seed=5)
    assert digest(draw_phantom(7, 2, size=64, seed=5)) == fresh.stdout.strip()


def test_seed_patient_and_image_each_change_the_picture() -> None:
    digests = {
        digest(draw_phantom(*numbers, size=64, seed=seed)) for numbers in ((0, 0), (0, 1), (1, 0)) for seed in (0, 1)
    }
    assert len(digests) == 6


def test_pictures_of_a_patient_share_labels_and_differ_in_view() -> None:
    for patient in range(6):
        first, second = (draw_phantom(patient, image, size=SIZE) for image in range(2))
        assert first.labels == second.labels
        assert np.abs(first.image.astype(float) - second.image).mean() > 5
        assert (first.masks["lungs"] != second.masks["lungs"]).mean() > 0.005


def test_the_anatomy_does_not_depend_on_the_size() -> None:
    large, small = (draw_phantom(3, size=size) for size in (256, 64))
    reduced = large.masks["lungs"].reshape(64, 4, 64, 4).mean(axis=(1, 3)) > 127
    both, either = (reduced & (small.masks["lungs"] > 0)).sum(), (reduced | (small.masks["lungs"] > 0)).sum()
    assert both / either > 0.93


def test_findings_are_common_and_so_are_normals(labels: np.ndarray) -> None:
    assert ((labels.mean(axis=0) > 0.22) & (labels.mean(axis=0) < 0.38)).all()
    assert (labels.sum(axis=1) == 0).mean() >= 0.15
    assert (labels.sum(axis=1) >= 2).mean() >= 0.15


def test_a_mask_is_filled_exactly_where_the_label_is_positive(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        for name, label in zip(FINDINGS, phantom.labels, strict=True):
            assert phantom.masks[name].any() == bool(label), (phantom.image_id, name)
        assert (phantom.masks["lungs"] > 0).mean() > 0.08
        assert (phantom.masks["heart"] > 0).mean() > 0.01


@pytest.mark.parametrize(
    ("name", "share"), [("Effusion", 0.9), ("Pneumothorax", 0.9), ("Consolidation", 0.9), ("Nodule", 0.6)]
)
def test_findings_lie_in_the_lung_fields(phantoms: list[Phantom], name: str, share: float) -> None:
    found = [phantom for phantom in phantoms if phantom.masks[name].any()]
    assert len(found) > 50
    for phantom in found:
        chest = (phantom.masks["lungs"] > 0) | (phantom.masks["heart"] > 0)
        assert chest[phantom.masks[name] > 0].mean() >= share, phantom.image_id


def test_nodules_are_large_enough_to_see() -> None:
    for patient in range(40):
        phantom = draw_phantom(patient, size=256, seed=3)
        regions, count = ndimage.label(phantom.masks["Nodule"])
        for box in ndimage.find_objects(regions)[:count]:
            whole = all(side.start > 0 and side.stop < 256 for side in box)
            assert not whole or max(side.stop - side.start for side in box) / 2 >= 0.02 * 256


def cardiothoracic_ratio(phantom: Phantom) -> float:
    heart, lungs = (np.flatnonzero(phantom.masks[name].any(axis=0)) for name in ("heart", "lungs"))
    return float((np.ptp(heart) + 1) / (np.ptp(lungs) + 1))


def test_cardiomegaly_is_a_wide_heart_in_its_thorax(phantoms: list[Phantom], labels: np.ndarray) -> None:
    ratios = np.array([cardiothoracic_ratio(phantom) for phantom in phantoms])
    enlarged = labels[:, 0] == 1
    assert np.median(ratios[enlarged]) > 0.53
    assert np.median(ratios[~enlarged]) < 0.48
    assert roc_auc_score(enlarged, ratios) > 0.95


REMOVED = {
    "Effusion": {"effusions": ()},
    "Pneumothorax": {"pneumothorax": None},
    "Nodule": {"nodules": ()},
    "Consolidation": {"patches": ()},
}


@pytest.mark.parametrize("name", REMOVED)
def test_a_finding_changes_the_picture_where_its_mask_is(name: str) -> None:
    """Draws the same patient without the finding; the attenuation may differ in and near the mask only."""
    examined = 0
    for number in range(30):
        patient = phantom_module._sample_patient(number, 3)
        if not patient.labels[FINDINGS.index(name)]:
            continue
        visit = phantom_module._sample_visit(np.random.default_rng(number))
        canvas = Canvas(128, Pose())
        with_finding, masks = attenuate(canvas, patient, visit)
        without, _ = attenuate(canvas, replace(patient, **REMOVED[name]), visit)
        change = np.abs(with_finding - without)
        near = ndimage.binary_dilation(masks[name], iterations=5)
        assert change[masks[name]].mean() > 0.05, number
        assert change[near].sum() > 0.9 * change.sum(), number
        examined += 1
    assert examined >= 5


def test_pictures_use_the_grey_scale_without_saturating(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        low, high = np.percentile(phantom.image, (1, 99))
        assert high - low > 130, phantom.image_id
        assert (phantom.image == 255).mean() < 0.08, phantom.image_id


def test_brightness_says_nothing(phantoms: list[Phantom], labels: np.ndarray) -> None:
    means = np.array([phantom.image.mean() for phantom in phantoms])
    for column, name in enumerate(FINDINGS):
        assert 0.38 < roc_auc_score(labels[:, column], means) < 0.62, name


def test_thumbnails_say_little(phantoms: list[Phantom], labels: np.ndarray) -> None:
    """The measured figures for many images are in tools/phantom_baselines.py; this is the alarm."""
    pixels = np.stack([phantom.image.reshape(16, 4, 16, 4).mean(axis=(1, 3)).ravel() for phantom in phantoms])
    half, areas = NUM_PATIENTS // 2, []
    for column in range(len(FINDINGS)):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        model.fit(pixels[:half], labels[:half, column])
        areas.append(roc_auc_score(labels[half:, column], model.predict_proba(pixels[half:])[:, 1]))
    assert np.mean(areas) < 0.64, areas


@pytest.mark.parametrize(("argument", "value"), [("size", 31), ("seed", -1), ("patient", -1), ("image", -2)])
def test_draw_phantom_names_a_bad_argument(argument: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{argument}={value} found; expected (0|32) or more"):
        draw_phantom(**{"patient": 0, argument: value})


def test_contact_sheet_puts_images_in_rows() -> None:
    images = [np.full((20, 30), value, dtype=np.uint8) for value in (0, 100, 200)]
    sheet = np.asarray(contact_sheet(images, 2))
    assert sheet.shape == (2 * 24 + 4, 2 * 34 + 4)
    assert (sheet[4:24, 4:34] == 0).all()
    assert (sheet[4:24, 38:68] == 100).all()
    assert (sheet[28:48, 4:34] == 200).all()
    assert (sheet[28:48, 38:68] == 255).all()
    titled = contact_sheet(images, 2, ["a", "b\nc", "d"])
    assert titled.height == 52 + 2 * 24
    assert (np.asarray(titled)[4:28] < 128).any()


def test_labels_without_a_drawing_are_those_of_the_drawing() -> None:
    for patient in range(40):
        assert phantom_labels(patient, seed=5) == draw_phantom(patient, size=32, seed=5).labels
