"""Self-supervised pretraining: the loop.

One process, several on one node, or several nodes run the same code. Nothing random is carried from step to step:
the order of samples is a function of (seed, epoch) and the views are a function of (seed, epoch, sample), so a run
that was killed and resumed ends in the same weights as one that was not.
"""

from contextlib import nullcontext
from pathlib import Path

from mlvicx_hf.common.files import only_writer
from mlvicx_hf.common.signals import StopSignals
from mlvicx_hf.objectives.base import LossOutput

from .accumulation import accumulate
from .arguments import DataArguments, ModelArguments, PretrainingArguments
from .optimizer import set_learning_rate
from .reporting import Reporter
from .run import Run
from .setup import set_up


def pretrain(model_arguments: ModelArguments, data_arguments: DataArguments, arguments: PretrainingArguments) -> Path:
    """Set up a run and train it; see `set_up` and `train`.

    Raises:
        FileExistsError: another process writes the run.
    """
    run = set_up(model_arguments, data_arguments, arguments)
    with only_writer(run.output / "run") if run.accelerator.is_main_process else nullcontext():
        return train(run)


def train(run: Run) -> Path:
    """Train to the last epoch, save model and image processor, loadable by `AutoModel`, and return their folder.

    Raises:
        FloatingPointError: a loss that is not finite.
        OSError: a file that cannot be written; names the checkpoint that is still good.
        StoppedError: SIGTERM or SIGINT came; the step is finished and its checkpoint saved.
    """
    accelerator, objective, optimizer, arguments = run.accelerator, run.wrapped, run.optimizer, run.arguments
    reporter = Reporter(run)
    reporter.begin()
    objective.train()
    score = None
    with StopSignals() as signals:
        with reporter.bar:
            for batch in run.remaining_batches():
                rate = run.learning_rate(run.step)
                set_learning_rate(optimizer, rate, run.backbone_ratio(run.step), run.peak_rate)
                views = run.make_views(batch)
                run.objective.start_step(run.step)
                if arguments.gradient_accumulation_steps == 1:
                    output: LossOutput = objective(*views)
                    accelerator.backward(output.loss)
                else:
                    steps = arguments.gradient_accumulation_steps
                    output = accumulate(accelerator, objective, views, steps)  # runs backward, too
                run.note_loss(output.loss)
                optimizer.step()
                optimizer.zero_grad()
                run.step += 1
                run.objective.update(run.step)
                score = reporter.step_done(output, views[0], rate, batch.epoch)
                if run.step == run.total_steps:  # the last checkpoint belongs to the end of the run
                    continue
                stopped_by = signals.agreed(accelerator)
                # The checkpoint of every probe is written, or the best one could not be kept. Only the main process has
                # a score, and all processes save together.
                probed = run.settings.data.probe_dataset is not None and run.step % arguments.probe_steps == 0
                if stopped_by or probed or run.step % arguments.checkpoint_steps == 0:
                    run.save_checkpoint(score)
                if stopped_by:
                    accelerator.end_training()
                    raise run.stopped(stopped_by)
        run.save_checkpoint(score)
        run.save_model()
        reporter.end()
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return run.output
