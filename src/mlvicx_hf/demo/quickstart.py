"""The whole of MLVICX in one go: prepare, pretrain, load, classify against random weights, report."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import StrictUndefined, Template
from transformers import AutoImageProcessor, AutoModel

from mlvicx_hf.common.errors import MissingExtraError, UserError
from mlvicx_hf.common.files import read_json, write_json
from mlvicx_hf.common.provenance import code_version
from mlvicx_hf.common.text import markdown_table, number
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.encoders.features import encode, prepared_images
from mlvicx_hf.encoders.neighbours import neighbour_sheet
from mlvicx_hf.finetuning.classification import load_labelled_cache
from mlvicx_hf.pretraining.curves import LOSS_AND_RANK, plot_curves, view_sheet
from mlvicx_hf.pretraining.views import TwoViewAugmentation
from mlvicx_hf.scoring.embeddings import rankme

PROTOCOLS = {"frozen": "Frozen encoder", "finetuned": "Fine-tuned"}
STARTS = ("pretrained", "random")
STARTED = ".quickstart"  # marks a folder that a quick start made


class Quickstart:
    """One quick start.

    Args:
        command: runs a command of `mlvicx` in this process; its argument are the words behind `mlvicx`.
        output: folder of the report; an earlier one is kept as `OUTPUT.previous`.
        images: the user's folder; None draws synthetic radiographs.
        metadata: table of the folder, None for the one in it.
        seed: of everything.
        pretraining_images: how many images are seen, epochs times images, in pretraining.
    """

    def __init__(
        self,
        command: Callable[[Sequence[str]], None],
        output: Path,
        images: Path | None = None,
        metadata: Path | None = None,
        seed: int = 0,
        pretraining_images: int = 8500,
    ) -> None:
        self.command, self.output, self.images, self.metadata = command, output, images, metadata
        self.seed, self.pretraining_images = seed, pretraining_images
        self.model_folder = output / "model"
        self.started = time.monotonic()

    def run(self) -> None:
        """All steps in order."""
        self._clear()
        self._say("1/4 Prepare: radiographs to a cache")
        cache = self._prepare()
        lacking = _what_is_lacking(cache)
        self._say(f"2/4 Pretrain on {len(cache.datasets['train'])} images, without labels")
        self._pretrain(cache)
        self._say('3/4 Load the backbone: AutoModel.from_pretrained("' + str(self.model_folder) + '")')
        report = self._describe(cache)
        report |= self._pictures(cache)
        if lacking is None:
            self._say("4/4 Classify test images: pretrained against random weights")
            report |= self._classify()
        else:
            self._say(f"4/4 Nearest neighbours instead of a classifier: {lacking}")
            neighbour_sheet(self.features, self.encoded, self.output / "neighbours.png")
            report |= {"neighbours": "neighbours.png", "lacking": lacking}
        report["seconds"] = round(time.monotonic() - self.started)
        write_json(self.output / "report.json", report)
        text = markdown(report)
        (self.output / "report.md").write_text(text)
        print(f"\n{text}\nReport: {self.output / 'report.md'} ({report['seconds']} s)", flush=True)

    def _clear(self) -> None:
        """Keep an earlier report as OUTPUT.previous. Move and remove nothing but folders of quick starts."""
        place = self.output.resolve()  # `.` has no name
        previous = place.with_name(place.name + ".previous")
        if place == Path.cwd():
            raise UserError(f"output {self.output} is the working folder; expected another one, new or empty")
        if self.images is not None and not self.images.is_dir():
            raise FileNotFoundError(f"{self.images}: no such folder; expected the radiographs")
        for given in filter(None, (self.images, self.metadata)):
            if any(given.resolve().is_relative_to(folder) for folder in (place, previous)):
                raise UserError(
                    f"{given} lies in {place} or {previous}, which are made anew; expected another --output"
                )
        for folder in (place, previous):
            ours = (folder / STARTED).is_file()
            if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not ours):
                raise UserError(f"{folder} holds other files; expected a new folder, or one of an earlier quick start")
        if place.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(place, previous)
        place.mkdir(parents=True)
        (place / STARTED).touch()

    def _prepare(self) -> Cache:
        words: list[Any] = ["--size", 128, "--seed", self.seed, "--output", self.output / "cache"]
        if self.images is None:
            words += ["--collection", "phantom", "--num_patients", 600, "--images_per_patient", 2]
        else:
            words += ["--collection", "folder", "--root", self.images, "--drop_duplicates", "near"]
            words += ["--metadata", self.metadata] if self.metadata else []
        self._command("prepare", *words)
        return load_cache(self.output / "cache")

    def _pretrain(self, cache: Cache) -> None:
        images = len(cache.datasets["train"])
        processes = max(1, torch.cuda.device_count())
        if processes > images // 2:  # each needs two images
            processes = 1
        batch = min(32, images) // processes * processes
        epochs = max(2, min(50, round(self.pretraining_images / images)))
        words = ["--recipe", "quickstart", "--dataset", self.output / "cache", "--output_dir", self.model_folder]
        words += ["--epochs", epochs, "--batch_size", batch, "--seed", self.seed]
        run = self._launch if processes > 1 else self._command
        run("pretrain", *words)

    def _describe(self, cache: Cache) -> dict[str, Any]:
        """Encode images with the loaded backbone, and say what the report is about."""
        model = AutoModel.from_pretrained(self.model_folder)
        processor = AutoImageProcessor.from_pretrained(self.model_folder)
        split = "test" if "test" in cache.datasets else "train"
        self.features = encode(model, prepared_images(cache.datasets[split], processor))["features"]
        self.encoded = cache.datasets[split]
        return {
            "model": str(self.model_folder),
            "synthetic": cache.manifest["synthetic"],
            "data": "synthetic radiographs (phantoms)" if self.images is None else str(self.images),
            "images": {name: len(images) for name, images in cache.datasets.items()},
            "data_hash": cache.manifest["data_hash"],
            "split_hash": cache.manifest["split_hash"],
            "patients_known": cache.manifest["patients_known"],
            "rankme": {"value": rankme(self.features), "split": split, "of": self.features.shape[1]},
            "seed": self.seed,
            "code": code_version(),
        }

    def _pictures(self, cache: Cache) -> dict[str, str]:
        """Draw two views of some images, and the loss if matplotlib is installed. Return the picture of the loss."""
        drawn = {}
        title = "synthetic radiographs" if self.images is None else self.images.name
        try:
            plot_curves(self.model_folder / "metrics.jsonl", self.output / "loss.png", title, LOSS_AND_RANK)
            drawn["loss"] = "loss.png"
        except MissingExtraError as error:  # the rest of the report does without
            print(f"no loss.png: {error}", flush=True)
        train = cache.datasets["train"]
        samples = [train[i]["image"] for i in range(0, len(train), max(1, len(train) // 8))][:8]
        view_sheet(samples, TwoViewAugmentation(image_size=64), self.output / "views.png", self.seed)
        return drawn

    def _classify(self) -> dict[str, Any]:
        report: dict[str, Any] = {}
        for protocol in PROTOCOLS:
            report[protocol] = {}
            for start in STARTS:
                folder = self.output / f"{protocol}-{start}"
                words: list[Any] = ["--dataset", self.output / "cache", "--output_dir", folder, "--seed", self.seed]
                words += ["--model", self.model_folder if start == "pretrained" else "random"]
                words += ["--architecture", self.model_folder] if start == "random" else []
                words += ["--freeze_backbone"] if protocol == "frozen" else ["--num_train_epochs", 6]
                self._command("classify", *words)
                test = read_json(folder / "results.json")["test"]
                report[protocol][start] = {key: test[key] for key in ("auroc_macro", "auroc", "accuracy")}
        return report

    def _command(self, *words: Any) -> None:
        """Show a command, as a user would give it, and run it in this process."""
        shown = [str(word) for word in words]
        print("$ " + shlex.join(["mlvicx", *shown]), flush=True)
        self.command(shown)

    def _launch(self, name: str, *words: Any) -> None:
        """Show a command, and run it on all GPUs, a process each."""
        options = ["--num_machines", 1, "--num_processes", torch.cuda.device_count(), "--mixed_precision", "no"]
        options += ["--dynamo_backend", "no", "-m", f"mlvicx_hf.commands.{name}"]
        shown = [str(word) for word in (*options, *words)]
        print("$ " + shlex.join(["accelerate", "launch", *shown]), flush=True)
        environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *shown], env=environment, check=False
        )
        if done.returncode:
            raise SystemExit(done.returncode)

    def _say(self, text: str) -> None:
        print(f"\n== {text} ({time.monotonic() - self.started:.0f} s)", flush=True)


def _what_is_lacking(cache: Cache) -> str | None:
    """Why no classifier can be trained on a cache; None if one can."""
    try:
        load_labelled_cache(str(cache.path))
    except UserError as error:
        return str(error)
    return None


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    source = (files(__package__) / "report.md.j2").read_text(encoding="utf-8")
    template = Template(source, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    counts = ", ".join(f"{count} {split}" for split, count in report["images"].items())
    tables = {title: _table(report[protocol]) for protocol, title in PROTOCOLS.items() if protocol in report}
    return template.render(report=report, counts=counts, tables=tables)


def _table(results: dict[str, Any]) -> str:
    scores = [results[start]["auroc"] | {"**macro**": results[start]["auroc_macro"]} for start in STARTS]
    rows = [[label, *(number(found[label], ".3f") for found in scores)] for label in scores[0]]
    return markdown_table(["label", "pretrained", "random weights"], rows)
