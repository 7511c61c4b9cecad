"""Batch normalisation over several GPUs: the conversion keeps weights and names."""

import pytest
import torch
from helpers import tiny_config
from methods import small_objective
from timm.layers import BatchNormAct2d
from torch import nn

from mlvicx_hf import MLVICXForPreTraining, MLVICXModel
from mlvicx_hf.models.modeling_mlvicx import batch_norms
from mlvicx_hf.objectives import OBJECTIVES
from mlvicx_hf.pretraining.model import synchronise_norms


def test_queries_must_not_be_told_by_the_statistics_of_their_keys():
    apart = {name for name, kind in OBJECTIVES.items() if not kind.synchronise_norms}
    assert apart == {"moco_v2", "inter_moco", "caid", "pcrl_v1"}
    found = synchronise_norms(small_objective("moco_v2"))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in found.modules())


@pytest.mark.parametrize("name", ["simclr", "simsiam", "byol", "barlow_twins", "pcrl_v2"])
def test_norms_of_other_methods_are_converted(name: str):
    objective = small_objective(name)
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    found = synchronise_norms(objective)
    assert not any(type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) for module in found.modules())
    assert found.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in found.state_dict().items())


def test_frozen_norms_stay_frozen_through_the_conversion():
    objective = small_objective("byol")
    for encoder in objective.modules():
        if isinstance(encoder, MLVICXModel):
            encoder.freeze_batch_norm("backbone")
    found = batch_norms(synchronise_norms(objective).train())
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in found)
    encoders = [part for part in objective.modules() if isinstance(part, MLVICXModel)]
    still = {norm for encoder in encoders for norm in batch_norms(encoder.backbone)}
    assert {norm for norm in found if not norm.training} == still
    assert 0 < len(still) < len(found)


@pytest.mark.parametrize("final_norm", [False, True])
def test_norms_are_converted_with_their_shifts(final_norm: bool):
    torch.manual_seed(0)
    objective = OBJECTIVES["mlvicx"](MLVICXForPreTraining(tiny_config(expander_final_norm=final_norm)))
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    trained = {name for name, _ in objective.named_parameters()}
    found = synchronise_norms(objective)
    assert not any(type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) for module in found.modules())
    assert found.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.state_dict().items())
    assert {name for name, _ in found.named_parameters()} == trained


def test_activations_inside_norms_survive_the_conversion():
    """EfficientNet, DenseNet, RegNet and others of timm have norm and activation in one module."""
    torch.manual_seed(0)
    objective = OBJECTIVES["mlvicx"](MLVICXForPreTraining(tiny_config(backbone="test_efficientnet"))).eval()
    assert any(isinstance(module, BatchNormAct2d) for module in objective.modules())
    view = torch.randn(2, 1, 64, 64)
    before, keys = objective.embed(view), objective.state_dict().keys()
    found = synchronise_norms(objective).eval()
    assert not any(type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d) for module in found.modules())
    assert found.state_dict().keys() == keys
    for name, embedding in found.embed(view).items():
        torch.testing.assert_close(embedding, before[name])
