"""The seam of objectives: MLVICX through it equals the model, and a new method is one small class and one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_config, unlabelled_cache
from runs import assert_same_bits, lines, start
from torch import Tensor, nn
from transformers import AutoModel

from mlvicx_hf import MLVICXForPreTraining, MLVICXModel
from mlvicx_hf.models.loss_mlvicx import invariance_loss
from mlvicx_hf.objectives import OBJECTIVES
from mlvicx_hf.objectives.base import Embeddings, LossOutput, Objective
from mlvicx_hf.pretraining.loop import train


class Invariance(Objective):
    """Only the invariance term: what a newcomer writes first."""

    def __init__(self, model: MLVICXModel) -> None:
        super().__init__(model)
        self.projector = nn.Linear(model.channels[-1], 8)

    def embed(self, view: Tensor) -> Embeddings:
        return {"embeddings": self.projector(self.model(view).pooler_output)}

    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        pair = embeddings_1["embeddings"], embeddings_2["embeddings"]
        loss = invariance_loss(*pair)
        return LossOutput(loss, {"invariance": loss}, {"embeddings": pair})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unlabelled_cache(tmp_path_factory.mktemp("seam"), 16)


def test_a_new_objective_trains_and_resumes_to_the_same_bits(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(OBJECTIVES, "mine", Invariance)
    flags = ("--objective", "mine", "--checkpoint_steps", 2)
    whole = start(cache, tmp_path / "whole", *flags, "--save_total_limit", 9)
    before = {name: value.clone() for name, value in whole.objective.state_dict().items()}
    train(whole)
    assert all(row["loss"] > 0 for row in lines(tmp_path / "whole"))
    after = whole.objective.state_dict()
    expected = ["model.backbone.conv1.0.weight", "projector.weight"]
    assert not [name for name in expected if torch.equal(after[name], before[name])]
    assert isinstance(AutoModel.from_pretrained(tmp_path / "whole"), MLVICXModel)

    (tmp_path / "killed").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "killed" / "checkpoint-2")
    (tmp_path / "killed" / "metrics.jsonl").write_bytes((tmp_path / "whole" / "metrics.jsonl").read_bytes())
    resumed = start(cache, tmp_path / "killed", *flags, "--resume")
    assert resumed.step == 2
    train(resumed)
    assert_same_bits(tmp_path / "killed", tmp_path / "whole")
    for name, value in resumed.objective.state_dict().items():
        assert torch.equal(value, after[name]), name


def test_an_unknown_objective_is_refused(cache: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="objective='magic' found; expected one of mlvicx"):
        start(cache, tmp_path / "run", "--objective", "magic")


@pytest.mark.parametrize("options", [{}, {"multi_level_weight": 0.0}, {"global_weight": 0.0}])
def test_mlvicx_through_the_seam_is_the_model(options: dict[str, float]):
    torch.manual_seed(0)
    model = MLVICXForPreTraining(tiny_config(**options)).eval()
    objective = OBJECTIVES["mlvicx"](model)
    views = torch.randn(2, 6, 1, 32, 32)
    expected, found = model(*views), objective(*views)
    assert torch.equal(found.loss, expected.loss)
    for name, value in (found.terms | found.embeddings).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert {"loss", *found.terms, *found.embeddings} == {name for name, value in expected.items() if value is not None}
    assert objective.encoder is model.mlvicx
    assert objective.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}
