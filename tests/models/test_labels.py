"""Labels that no head can learn from are an error that says what was found and what was expected."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_config
from torch import Tensor

from mlvicx_hf import MLVICXForImageClassification, MLVICXForSemanticSegmentation
from mlvicx_hf.models import modeling_mlvicx
from mlvicx_hf.models.loss_mlvicx import _is_to_check, multi_label_loss, segmentation_loss, single_label_loss

NAN = float("nan")
PIXELS = torch.zeros(2, 1, 32, 32)


def classifier(kind: str, labels: int = 3) -> MLVICXForImageClassification:
    torch.manual_seed(0)
    return MLVICXForImageClassification(tiny_config(num_labels=labels, problem_type=f"{kind}_label_classification"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        (
            "multi",
            torch.tensor([[1.0, -1, 0], [0, 0, 0]]),
            r"values \[-1\] found; expected 0 for absent, 1 for present",
        ),
        ("multi", torch.tensor([[1.0, -100, 0], [NAN, 0, 0]]), r"values \[-100\] found; .* NaN for unknown"),
        ("multi", torch.tensor([[1, 2, 0], [-1, 0, 0]]), r"values \[-1, 2\] found"),
        ("multi", torch.tensor([[1.0, float("inf"), 0], [NAN, 0, 0]]), r"values \[inf\] found"),
        ("multi", torch.full((2, 3), 255, dtype=torch.uint8), r"values \[255\] found"),
        ("multi", torch.tensor([0, 2]), r"shape \(2,\) found; expected \(2, 3\), as the logits"),
        ("single", torch.tensor([0, 3]), r"values \[3\] found; expected class indices from 0 to 2, or -100"),
        ("single", torch.tensor([0, -1]), r"values \[-1\] found; expected class indices from 0 to 2, or -100"),
        ("single", torch.tensor([0, 255], dtype=torch.uint8), r"values \[255\] found"),
        ("single", torch.eye(3)[:2], r"shape \(2, 3\) found; expected \(2,\), .*argmax"),
        ("single", torch.eye(3, dtype=torch.long)[:2], r"shape \(2, 3\) found; expected \(2,\), .*argmax"),
        ("single", torch.tensor([[0], [2]]), r"shape \(2, 1\) found; expected \(2,\)"),
        ("single", torch.tensor([0.0, 1.0]), r"type torch.float32 found; expected an integer type, class indices"),
        ("single", torch.tensor([0.0, NAN]), r"type torch.float32 found"),
        ("single", torch.tensor(1), r"shape \(\) found; expected \(2,\)"),
    ],
)
def test_labels_of_a_classifier(kind: str, labels: Tensor, message: str, training: bool, gradients: bool):
    model = classifier(kind).train(training)
    for _ in range(2):  # not in the first batch alone
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=message):
            model(PIXELS, labels=labels)


@pytest.mark.parametrize("labels", [torch.full((2, 32, 32), 0.5), torch.ones(2, 32, 32), torch.full((2, 32, 32), NAN)])
def test_masks_are_of_whole_numbers(labels: Tensor):
    model = MLVICXForSemanticSegmentation(tiny_config(num_labels=1))
    with pytest.raises(ValueError, match=r"type torch.float32 found; expected an integer type, a class index a pixel"):
        model(PIXELS, labels=labels)


def test_masks_of_0_and_255_alone_are_told_of_once(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(modeling_mlvicx.logger, "warning", said.append)
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[:, 8:16] = 255
    for labels, warned in ((masks, 1), (masks // 255, 0), (masks * 0, 0)):
        model = MLVICXForSemanticSegmentation(tiny_config(num_labels=1))
        for _ in range(2):
            model(PIXELS, labels=labels)
        assert len(said) == warned
        said.clear()
    model = MLVICXForSemanticSegmentation(tiny_config(num_labels=3, semantic_loss_ignore_index=-100))
    model(PIXELS, labels=torch.full((2, 32, 32), -100))  # which is no value of a mask file
    assert said == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool])
def test_labels_of_any_type_that_fit(dtype: torch.dtype):
    logits = torch.tensor([[0.3, -2.0, 1.0], [4.0, 0.0, -1.0]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 1]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
    torch.testing.assert_close(multi_label_loss(logits, labels.to(dtype)), expected)
    if not dtype.is_floating_point:
        classes = torch.tensor([1, 0])
        expected = torch.nn.functional.cross_entropy(logits, classes)
        torch.testing.assert_close(single_label_loss(logits, classes.to(dtype)), expected)


def test_probabilities_are_labels_and_unknown_classes_do_not_count():
    logits = torch.tensor([[0.3, -2.0, 1.0], [4.0, 0.0, -1.0]])
    soft = torch.tensor([[0.9, NAN, 0.0], [0.1, 0.5, 1.0]])
    known = ~soft.isnan()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[known], soft[known])
    torch.testing.assert_close(multi_label_loss(logits, soft), expected)
    expected = torch.nn.functional.cross_entropy(logits[1:], torch.tensor([2]))
    torch.testing.assert_close(single_label_loss(logits, torch.tensor([-100, 2])), expected)


def test_a_batch_of_unknown_classes_adds_nothing():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = single_label_loss(logits, torch.tensor([-100, -100]))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_labels_without_a_column_of_one_finding_are_told_how_to_have_it():
    with pytest.raises(ValueError, match=r"expected \(2, 1\), as the logits \(of one finding: labels\[:, None\]\)"):
        classifier("multi", 1)(PIXELS, labels=torch.tensor([0.0, 1.0]))


WRONG: list[tuple[Callable[..., Tensor], Tensor, Tensor]] = [
    (multi_label_loss, torch.zeros(2, 3), torch.tensor([[1.0, -1, 0], [0, 0, 0]])),
    (single_label_loss, torch.zeros(2, 3), torch.tensor([1, 3])),
    (segmentation_loss, torch.zeros(2, 1, 4, 4), torch.full((2, 4, 4), 2)),
    (segmentation_loss, torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), -1)),
]


@pytest.mark.parametrize(("loss", "logits", "labels"), WRONG)
def test_a_wrong_label_that_is_not_looked_at_shows(loss: Any, logits: Tensor, labels: Tensor):
    """As in the later training steps on a GPU: NaN in loss and gradients, and no number that looks right."""
    logits = logits.clone().requires_grad_()
    found = loss(logits, labels, check=False)
    found.backward()
    assert found.isnan()
    assert logits.grad is not None
    assert logits.grad.isnan().any()


def test_on_a_gpu_only_the_first_batch_and_evaluation_wait_for_the_device():
    labels: Any = SimpleNamespace(device=torch.device("cuda"), is_meta=False)
    assert not _is_to_check(labels, None)
    assert _is_to_check(labels, True)
    with torch.no_grad():
        assert _is_to_check(labels, None)
    model = classifier("multi")
    assert model._check_labels(labels) is True
    assert model._check_labels(labels) is None


@pytest.mark.parametrize(("loss", "logits", "labels"), WRONG)
def test_a_compiler_sees_no_check(loss: Any, logits: Tensor, labels: Tensor):
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert compiled(logits, labels).isnan()


def test_a_classifier_without_a_kind_of_problem_has_no_loss():
    model = classifier("multi")
    object.__setattr__(model.config, "problem_type", "regression")
    with pytest.raises(ValueError, match="problem_type='regression' found; expected 'multi_label_classification' or"):
        model(PIXELS, labels=torch.zeros(2, 3))
