"""The protocol of fine-tuning (sections IV-B and IV-C of the paper), the same for every task.

Train a head on the encoder, frozen or not. The validation split chooses the epoch. The test split is looked at once,
at the end.
"""

import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from mlvicx_hf.common.arguments import check_values
from mlvicx_hf.common.errors import UserError, user_input
from mlvicx_hf.common.files import check_output, only_writer, write_json
from mlvicx_hf.common.machine import keep_freed_memory, refuse_other_launches, use_cpu_threads
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.provenance import package_commit
from mlvicx_hf.data.cache.cache import Cache
from mlvicx_hf.data.collections.base import SPLITS
from mlvicx_hf.data.reading.sampling import PatientBalancedSampler
from mlvicx_hf.data.split_files import SPLIT_FILE
from mlvicx_hf.encoders.inference import weights_of
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXPreTrainedModel

from .arguments import EncoderArguments, FinetuningArguments, LabelledDataArguments
from .data import select_training, used_images
from .linear_probe import LinearProbe, make_optimizer, order_seed
from .results import describe_run, score_subgroups

logger = logging.getLogger(__name__)
Split = Dataset[Any]
RESULTS = "results.json"
UNFINISHED = ".unfinished"  # folder in the output, of checkpoints, and of files until all of them are written


class FinetuningTask(ABC):
    """One run of a task. `finetune` follows the protocol; the other methods are what the tasks do differently.

    Raises:
        UserError: an argument of another type, or out of its range.
    """

    name: ClassVar[str]  # of the task, as in `results.json`
    keeps_norms: ClassVar[bool]  # whether fine-tuning keeps the encoder's batch normalisation by default
    cache: Cache  # the images that the run uses
    model: Any  # what is saved
    processor: MLVICXImageProcessor
    settings: TrainingArguments

    def __init__(self, encoder: EncoderArguments, data: LabelledDataArguments, arguments: FinetuningArguments) -> None:
        check_values(encoder, data, arguments)
        self.encoder, self.data, self.arguments = encoder, data, arguments
        self.learning_rate = 1e-3  # where the user gives none

    def finetune(self) -> dict[str, Any]:
        """Train, restore the best epoch, test it once, write model and predictions, and write and return the results.

        Raises:
            FileExistsError: an output folder that holds more than an interrupted run left, or another run writing it.
            UserError: a cache that does not suit the task, or a model that does not fit.
        """
        package_commit()
        output = Path(self.arguments.output_dir)
        unfinished = output / UNFINISHED
        if not _is_interrupted(output):
            check_output(output)
        self.settings = trainer_settings(self.arguments, self.learning_rate, unfinished)
        if self.settings.device.type == "cpu":
            use_cpu_threads()
            keep_freed_memory()
        self.cache = select_training(self._load_cache(), self.data, self.arguments.seed)
        self._check_training()
        set_seed(self.arguments.seed)
        self.weights = weights_of(Path(self.encoder.model))
        self.model, self.processor = self._load_model()
        splits = {split: self._images(split) for split in SPLITS}
        trained, prepare = self._prepare(splits["train"])
        with nullcontext() if self.settings.process_index else only_writer(unfinished):
            if not self.settings.process_index:
                if not _is_interrupted(output):  # another run may have ended since the first check
                    check_output(output)
                shutil.rmtree(unfinished, ignore_errors=True)
            return self._train_and_test(output, trained, prepare, splits)

    def _train_and_test(
        self, output: Path, trained: nn.Module, prepare: Callable[[Split], Split], splits: Mapping[str, Split]
    ) -> dict[str, Any]:
        chosen_on = {split: prepare(splits[split]) for split in ("train", "validation")}
        patients = self.cache.datasets["train"]["patient_id"][:] if self.data.patient_balanced else None
        trainer = self._train(trained, chosen_on, patients)
        validation = self._evaluate(trainer, chosen_on["validation"])
        chosen = self._choose(validation)
        # Everything is chosen. Only now is the test split looked at, once.
        test = self._evaluate(trainer, prepare(splits["test"]))
        self._complete(trained)
        frozen = self.encoder.freeze_backbone
        results: dict[str, Any] = {"task": self.name, "batch_norm_frozen": frozen or self._freezes_batch_norm}
        results |= self._results(validation, test) | chosen
        results["test"] |= {"subgroups": score_subgroups(self.cache.datasets["test"], test.scores)}
        run = describe_run(self.cache, self.encoder, self.data, self.arguments, self.settings, trainer.state)
        run["weights_sha256"] = self.weights
        run["model_commit"] = getattr(self.model.config, "_commit_hash", None)  # of the Hub
        # As asked for, so that cards compare random weights with pretrained ones of the same settings.
        run["hyperparameters"] |= {"freeze_batch_norm": self._norms_asked and not frozen, "augment": self._augments}
        run["hyperparameters"] |= results.pop("hyperparameters")
        results |= run
        if trainer.is_world_process_zero():
            final = output / UNFINISHED / "final"
            self.model.save_pretrained(final)
            self.processor.save_pretrained(final)
            self._write_test(final, test)
            (final / SPLIT_FILE).write_text(used_images(self.cache), encoding="utf-8")
            write_json(final / RESULTS, results)
            for file in sorted(final.iterdir(), key=lambda file: (file.name == RESULTS, file.name)):  # it says: done
                os.replace(file, output / file.name)
            shutil.rmtree(output / UNFINISHED, ignore_errors=True)
        return results

    @property
    def _augments(self) -> bool:
        """Whether training images are moved at random: by default."""
        return self.data.augment is not False

    @property
    def _norms_asked(self) -> bool:
        """Whether batch normalisation shall be kept: as the user says, or by default as the task does."""
        asked = self.encoder.freeze_batch_norm
        return self.keeps_norms if asked is None else asked

    @property
    def _freezes_batch_norm(self) -> bool:
        """As asked for, but by default random weights have no statistics to keep."""
        nothing_to_keep = self.encoder.freeze_batch_norm is None and self.encoder.model == "random"
        return self._norms_asked and not (self.encoder.freeze_backbone or nothing_to_keep)

    @abstractmethod
    def _load_cache(self) -> Cache:
        """Open the cache, and check that it can train, choose and test this task."""

    @abstractmethod
    def _check_training(self) -> None:
        """Refuse a chosen part of train from which the task cannot be learned."""

    @abstractmethod
    def _load_model(self) -> tuple[Any, MLVICXImageProcessor]:
        """Load the model with a new head for the cache, and its image processor."""

    @abstractmethod
    def _images(self, split: str) -> Split:
        """Model input and truth of a split."""

    @abstractmethod
    def _prepare(self, training: Split) -> tuple[nn.Module, Callable[[Split], Split]]:
        """Freeze what is frozen. Return what is trained, and a function that turns images into its input."""

    @abstractmethod
    def _train(self, trained: nn.Module, splits: Mapping[str, Split], patients: Sequence[str] | None) -> Any:
        """Train on "train" and restore the best epoch of "validation". Return the Trainer, or what acts like it."""

    @abstractmethod
    def _evaluate(self, trainer: Any, images: Split) -> Any:
        """Apply the trained model to a split. Return something with `scores(rows)`."""

    def _choose(self, validation: Any) -> dict[str, Any]:
        """Choose what else the validation split can choose. Return what of it belongs into `results.json`."""
        return {}

    def _complete(self, trained: nn.Module) -> None:
        """Fold what stands around the trained layers into them, so that the saved model gives what was scored."""
        if isinstance(trained, LinearProbe):
            trained.fold()

    @abstractmethod
    def _results(self, validation: Any, test: Any) -> dict[str, Any]:
        """Content of `results.json` that is this task's own: labels, validation, test, hyperparameters, …"""

    @abstractmethod
    def _write_test(self, folder: Path, test: Any) -> None:
        """Write one row for every test image."""


def _is_interrupted(output: Path) -> bool:
    """Whether a folder holds what an interrupted run left, even one that was interrupted while it moved its files."""
    found = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    others = found - {UNFINISHED, f".{UNFINISHED}.writing"}
    return bool(found) and (not others or (UNFINISHED in found and RESULTS not in found))


def trainer_settings(arguments: FinetuningArguments, learning_rate: float, folder: Path) -> TrainingArguments:
    """Make the arguments of the Trainer; `learning_rate` is for a user who gives none, `folder` for checkpoints.

    Raises:
        UserError: arguments that the Trainer refuses, or a launch or arguments that split the weights.
    """
    refuse_other_launches()
    for name in ("fsdp", "fsdp_config", "deepspeed", "parallelism_config"):
        if arguments.trainer_options.get(name):
            raise UserError(
                f"{name}={arguments.trainer_options[name]!r} found; expected data parallel processes, as "
                "`accelerate launch --multi_gpu` starts them: every process saves and tests whole weights"
            )
    own = {each.name: getattr(arguments, each.name) for each in fields(arguments)}
    del own["patience"], own["trainer_options"]
    own["learning_rate"] = learning_rate if arguments.learning_rate is None else arguments.learning_rate
    # Else Accelerate takes the processes that torchrun starts without a GPU for independent runs.
    own["use_cpu"] = arguments.use_cpu or not torch.accelerator.is_available()
    known = {each.name for each in fields(TrainingArguments)}
    fixed = {name: value for name, (value, _) in arguments.protocol.items() if name in known}
    options = {"dataloader_pin_memory": torch.cuda.is_available()} | arguments.trainer_options
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no":  # the Trainer would take it, and results would tell another precision
        logger.warning("the launcher's mixed precision %s is not used; --bf16 or --fp16 asks for it", launched)
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    with user_input():
        settings = TrainingArguments(**options | own | fixed | {"output_dir": str(folder)})
    if not settings.optim_target_modules:  # such an optimiser asks for the model
        make_optimizer(settings, [{"params": [nn.Parameter(torch.zeros(1))]}], 1)  # a trial, before hours of work
    if settings.n_gpu > 1:  # else the Trainer would divide every batch by `nn.DataParallel`
        logger.warning("%d GPUs found, one of them is used; `accelerate launch` uses all", settings.n_gpu)
        settings._n_gpu = 1
    return settings


class EpochProgress(TrainerCallback):
    """A bar over the epochs with the validation score, instead of the Trainer's bar and printed dictionaries."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.bar = progress_bar(int(args.num_train_epochs), "training", "epoch", show=state.is_world_process_zero)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the score of the epoch that ended."""
        score = kwargs["metrics"].get(f"eval_{args.metric_for_best_model}")
        if score is not None:  # the test pass comes after the bar
            self.bar.set_postfix({f"validation_{args.metric_for_best_model}": f"{score:.4f}"}, refresh=False)
            self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


class BalancedTrainer(Trainer):
    """A Trainer that draws all patients equally often; `patients` are those of the training images."""

    def __init__(self, *args: Any, patients: Sequence[str], **kwargs: Any) -> None:
        self.patients = patients
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> PatientBalancedSampler:
        return PatientBalancedSampler(self.patients, order_seed(self.args))


def train_with_trainer(
    model: nn.Module,
    splits: Mapping[str, Split],
    settings: TrainingArguments,
    patience: int,
    compute_metrics: Callable[..., dict[str, float]],
    patients: Sequence[str] | None = None,
    **options: Any,
) -> Trainer:
    """Train with early stopping and restore the best epoch.

    Args:
        model: what is trained.
        splits: "train" and "validation".
        settings: of the Trainer.
        patience: epochs without a better score, after which training stops.
        compute_metrics: scores of the validation split, `metric_for_best_model` among them.
        patients: patient of each training image, to draw all of them equally often; None draws every image once.
        options: further ones of the Trainer.
    """
    if isinstance(model, MLVICXPreTrainedModel):  # faster; others would have to be made contiguous for every checkpoint
        model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # transformers' wrapper hides the signature
        if settings.gradient_checkpointing or getattr(settings, "activation_checkpointing", False):
            with user_input():
                model.require_gradient_checkpointing()
    make = Trainer if patients is None else partial(BalancedTrainer, patients=patients)
    try:
        trainer = make(
            model=model,
            args=settings,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            compute_metrics=compute_metrics,
            callbacks=[EarlyStoppingCallback(patience), EpochProgress()],
            **options,
        )
    except RuntimeError as error:
        if "to be installed" not in str(error):  # of a tracker
            raise
        raise UserError(f"report_to={settings.report_to} found: {error}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.remove_callback(EarlyStoppingCallback)  # what is evaluated from now on stops nothing
    return trainer
