"""Launches that no command can follow; cores and memory on shared machines."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mlvicx_hf.common import machine
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


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of this process's control group, two below the root. There are cores and memory without end."""
    (tmp_path / "cgroup").write_text("4:memory:/old/kind\n0::/slice/job\n")
    monkeypatch.setattr(machine, "_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    folder = tmp_path / "groups" / "slice" / "job"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("quota", "outer", "slurm", "cores"),
    [
        (None, None, None, 64),
        ("max 100000", "max 100000", None, 64),
        ("400000 100000", "max 100000", None, 4),
        ("max 100000", "250000 100000", None, 2),
        ("50000 100000", None, None, 1),
        (None, None, "8", 8),
        ("400000 100000", None, "8", 4),
    ],
)
def test_cores_of_a_group_and_of_a_batch_job(
    group: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, outer: str | None, slurm: str | None, cores: int
):
    for folder, text in ((group, quota), (group.parent, outer)):
        if text is not None:
            (folder / "cpu.max").write_text(f"{text}\n")
    if slurm is not None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    assert machine.available_cores() == cores


@pytest.mark.parametrize("share", ["64", None])
def test_a_batch_script_gives_each_node_its_cores(tmp_path: Path, share: str | None):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node1\n")
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$SRUN_CPUS_PER_TASK"\n')
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node1"}
    environment |= {} if share is None else {"SLURM_CPUS_PER_TASK": share}
    script = Path(__file__).parents[2] / "scripts" / "accelerate" / "slurm.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{share or 1}\n"


def test_memory_of_a_group(group: Path):
    assert machine.available_memory() == 2**40
    (group.parent.parent / "memory.stat").write_text("inactive_file 0\n")  # the outermost group has no limits
    for folder, limit, used in ((group, "max", 2**30), (group.parent, str(2**34), 2**33)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon {2**29}\nfile {2**32}\ninactive_file {2**31}\n")
    assert machine.available_memory() == 2**34 - 2**33 + 2**31
    (group / "memory.max").write_text(f"{2**29}\n")
    (group / "memory.stat").write_text("inactive_file 0\n")
    assert machine.available_memory() == 0


@pytest.mark.parametrize(("chosen", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_wait_passively_unless_the_user_chose(chosen: dict[str, str], found: str):
    code = "import os, sys, mlvicx_hf.commands.pretrain; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | chosen
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found, "False"]


@pytest.mark.skipif(machine.platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory")
def test_a_worker_does_not_hold_the_memory_that_training_freed():
    code = """
import os, psutil, torch
from mlvicx_hf.common.machine import begin_worker, keep_freed_memory

keep_freed_memory()
freed, kept = [torch.ones(2**18) for _ in range(300)], torch.ones(1)  # 300 MiB
del freed
if os.fork() == 0:
    before = psutil.Process().memory_info().rss
    begin_worker(0)
    os._exit((before - psutil.Process().memory_info().rss) // 2**20 < 250)
raise SystemExit(os.wait()[1])
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_gpu_of_several_is_used_without_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    found = property(lambda settings: 1 if settings.__dict__.get("_n_gpu") == 1 else 2)
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", found)
    settings = trainer_settings(ClassificationArguments(output_dir=str(tmp_path)), 1e-3, tmp_path)
    assert settings.n_gpu == 1
    assert "2 GPUs found, one of them is used; `accelerate launch` uses all" in caplog.text
