"""W gloo processes with b images each equal one process with W·b: loss, embeddings' and parameters' gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import tiny_config
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mlvicx_hf import MLVICXForPreTraining
from mlvicx_hf.models.loss_mlvicx import gather_batch, variance_covariance_loss
from mlvicx_hf.objectives import OBJECTIVES, Objective

WORLDS = (2, pytest.param(3, marks=pytest.mark.thorough))


def embeddings(batch: int, dimension: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z_1, z_2 = (0.6 * torch.randn(batch, dimension, generator=generator, dtype=torch.float64) + 2 for _ in range(2))
    return z_1, z_2


def views() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    view_1, view_2 = (torch.randn(12, 1, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    return view_1, view_2


def objective() -> Objective:
    """In evaluation mode: in training each process has its own batch statistics, on the CPU at least."""
    torch.manual_seed(2)
    return OBJECTIVES["mlvicx"](MLVICXForPreTraining(tiny_config())).double().eval()


def share(tensor: Tensor, rank: int, world: int) -> Tensor:
    return tensor.chunk(world)[rank]


def process(rank: int, world: int, folder: str, shapes: list[tuple[int, int]]) -> None:
    """What one of the processes does; it leaves its results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for shape in shapes:
        z_1, z_2 = (share(z, rank, world).clone().requires_grad_() for z in embeddings(*shape))
        results[f"order {shape}"] = gather_batch(z_1.detach()[None])[0]
        loss = variance_covariance_loss(z_1, z_2).loss
        loss.backward()
        assert z_1.grad is not None
        assert z_2.grad is not None
        # Data parallel averages parameter gradients over the ranks, so each rank's share counts 1/W.
        results[f"{shape}"] = (loss.detach(), z_1.grad / world, z_2.grad / world)
    parallel = DistributedDataParallel(objective())
    output = parallel(*(share(view, rank, world) for view in views()))
    output.loss.backward()
    results["terms"] = {name: value.detach() for name, value in (output.terms | {"loss": output.loss}).items()}
    results["embeddings"] = output.embeddings["global_embeddings"][0].detach()
    results["gradients"] = {name: p.grad for name, p in parallel.module.named_parameters()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


SHAPES = [(12, 20), (12, 3), (6, 5), (6, 6)]  # through the Gram matrix and through the covariance


@pytest.fixture(scope="module", params=WORLDS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder, world = tmp_path_factory.mktemp("gloo"), request.param
    mp.spawn(process, (world, str(folder), SHAPES), nprocs=world)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_of_the_embeddings(results: list[dict[str, Any]], shape: tuple[int, int]):
    z_1, z_2 = (z.requires_grad_() for z in embeddings(*shape))
    loss = variance_covariance_loss(z_1, z_2).loss
    loss.backward()
    for rank, result in enumerate(results):
        assert torch.equal(result[f"order {shape}"], z_1.detach())
        found, gradient_1, gradient_2 = result[f"{shape}"]
        torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient_1, share(z_1.grad, rank, len(results)), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(gradient_2, share(z_2.grad, rank, len(results)), rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_loss_and_gradients_of_the_parameters(results: list[dict[str, Any]]):
    single = objective()
    output = single(*views())
    output.loss.backward()
    for rank, result in enumerate(results):
        expected = share(output.embeddings["global_embeddings"][0].detach(), rank, len(results))
        torch.testing.assert_close(result["embeddings"], expected)
        for name, value in result["terms"].items():
            expected = output.loss if name == "loss" else output.terms[name]
            torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=0, msg=name)
        for name, parameter in single.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(result["gradients"][name], parameter.grad, rtol=1e-8, atol=1e-12, msg=name)
