"""Under transformers' Trainer: however a batch of 16 is split, loss, gradient and evaluation loss are those of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import in_two_processes, tiny_config
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from mlvicx_hf import MLVICXForImageClassification, MLVICXForPreTraining, MLVICXForSemanticSegmentation
from mlvicx_hf.models.modeling_mlvicx import MLVICXPreTrainedModel

HEADS = ["multi_label", "single_label", "segmentation"]
SPLITS = [(16, 1), (4, 4), (1, 16)]  # images a step, steps
# The Dice loss of a batch is not the mean of those of its parts.
TOLERANCE = {"multi_label": 1e-5, "single_label": 1e-5, "segmentation": 0.01, "pretraining": 0.5}


class Images(Dataset[dict[str, Tensor]]):
    """Sixteen images with the labels of a head."""

    def __init__(self, head: str) -> None:
        draw = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(16, 1, 32, 32, generator=draw)
        self.labels = {
            "multi_label": torch.randint(0, 2, (16, 3), generator=draw).float(),
            "single_label": torch.randint(0, 3, (16,), generator=draw),
            "segmentation": torch.randint(0, 2, (16, 32, 32), generator=draw),
        }.get(head)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.labels is None:
            return {"view_1": self.pixels[index], "view_2": self.pixels[index].flip(0) + 0.1}
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def model_of(head: str) -> MLVICXPreTrainedModel:
    """With batch normalisation by running statistics: those of a batch depend on how it is split."""
    torch.manual_seed(1)
    model: Any
    if head == "pretraining":
        model = MLVICXForPreTraining(tiny_config())
    elif head == "segmentation":
        model = MLVICXForSemanticSegmentation(tiny_config(num_labels=1))
    else:
        model = MLVICXForImageClassification(tiny_config(num_labels=3, problem_type=f"{head}_classification"))
    model.freeze_backbone()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train = lambda mode=True, module=module: module  # type: ignore[assignment]
            module.training = False
    return model


def one_step(head: str, images: int, steps: int, folder: Path, **more: Any) -> dict[str, float]:
    """Train one step, then evaluate."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=images,
        per_device_eval_batch_size=images,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=1e9,
        learning_rate=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **more,
    )
    trainer = Trainer(model=model_of(head), args=arguments, train_dataset=Images(head), eval_dataset=Images(head))
    trainer.train()
    first = trainer.state.log_history[0]
    return {"loss": first["loss"], "gradient": first["grad_norm"], "eval": trainer.evaluate()["eval_loss"]}


def assert_equal(found: dict[str, float], expected: dict[str, float], head: str) -> None:
    assert found == pytest.approx(expected, rel=TOLERANCE[head], abs=1e-6), (found, expected)


@pytest.mark.parametrize("head", HEADS)
def test_accumulation_does_not_multiply(head: str, tmp_path: Path):
    whole = one_step(head, 16, 1, tmp_path)
    model, images = model_of(head), Images(head)
    with torch.no_grad():
        expected = float(model(images.pixels, labels=images.labels).loss)
    assert whole["loss"] == pytest.approx(expected, rel=1e-4)
    assert whole["eval"] == pytest.approx(expected, rel=1e-4)
    for split in SPLITS[1:]:
        assert_equal(one_step(head, *split, tmp_path), whole, head)


def test_accumulation_does_not_multiply_the_loss_of_pretraining(tmp_path: Path):
    """Its terms are statistics of a batch, so those of parts differ, but not by the number of the parts."""
    whole = one_step("pretraining", 16, 1, tmp_path)
    found = one_step("pretraining", 4, 4, tmp_path)
    for name in ("loss", "eval"):
        assert found[name] == pytest.approx(whole[name], rel=TOLERANCE["pretraining"])


def _two_processes(rank: int, folder: str) -> None:
    results = {
        f"{head} {images} {steps}": one_step(head, images, steps, Path(folder), ddp_backend="gloo")
        for head in [*HEADS, "pretraining"]
        for images, steps in ((8, 1), (4, 2), (2, 4))
    }
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.thorough
def test_two_processes_do_not_multiply(tmp_path: Path):
    in_two_processes(_two_processes, tmp_path)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for head in HEADS:
        whole = one_step(head, 16, 1, tmp_path)
        for found in both:
            for name, values in found.items():
                if name.startswith(head):
                    assert_equal(values, whole, head)
    whole = one_step("pretraining", 16, 1, tmp_path)
    assert both[0]["pretraining 8 1"]["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    for name in ("pretraining 4 2", "pretraining 2 4"):
        assert both[0][name]["loss"] == pytest.approx(whole["loss"], rel=TOLERANCE["pretraining"])
