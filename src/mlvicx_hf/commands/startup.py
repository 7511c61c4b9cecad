"""What commands that run a saved model share: options, and how their process starts."""

from mlvicx_hf.common.arguments import CommandParser


def add_inference_options(made: CommandParser, batch_size: int, workers: bool = True) -> None:
    """Add the advanced options of a forward pass, with this default size of a batch."""
    add = made.advanced.add_argument
    add("--batch_size", type=int, default=batch_size, metavar="N", help=f"images a forward pass (default {batch_size})")
    if workers:
        add("--num_workers", type=int, default=2, metavar="N", help="processes that read images (default 2)")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default a GPU where there is one)")
    add("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")


def start_inference(device: str | None) -> None:
    """Hide the bars of loading files; give torch its threads if the device of this name, or the default, is a CPU."""
    import transformers

    from mlvicx_hf.common.machine import choose_device, use_cpu_threads

    transformers.utils.logging.disable_progress_bar()
    if choose_device(device).type == "cpu":
        use_cpu_threads()
