"""Batch normalisation over several GPUs: the conversion keeps weights and names."""

import pytest
import torch
from helpers import tiny_config
from torch import nn

from mlvicx_hf import MLVICXForPreTraining
from mlvicx_hf.objectives import OBJECTIVES
from mlvicx_hf.pretraining.setup import synchronise_norms


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
