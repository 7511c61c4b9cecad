"""Launches that no command can follow."""

from pathlib import Path

import pytest

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.finetuning.arguments import ClassificationArguments
from mlvicx_hf.finetuning.training import trainer_settings
from mlvicx_hf.pretraining.arguments import PretrainingArguments
from mlvicx_hf.pretraining.setup import _create_accelerator


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP found .*; expected data parallel processes: distributed_type MULTI_GPU"),
        ("ACCELERATE_USE_DEEPSPEED", "True", "DeepSpeed found .*; expected data parallel processes"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "Megatron-LM found"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism_config found"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps=4 found .*; expected 1 there"),
    ],
)
def test_launches_that_split_weights_are_refused_by_name(
    variable: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        _create_accelerator(PretrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(UserError, match=message):
        trainer_settings(ClassificationArguments(output_dir=str(tmp_path)), 1e-3, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("fsdp", "full_shard"), ("deepspeed", {"zero_optimization": {"stage": 3}})]
)
def test_arguments_that_split_weights_are_refused_by_name(name: str, value: object, tmp_path: Path):
    arguments = ClassificationArguments(output_dir=str(tmp_path))
    arguments.trainer_options[name] = value
    with pytest.raises(UserError, match=f"{name}=.* found; expected data parallel processes"):
        trainer_settings(arguments, 1e-3, tmp_path)
