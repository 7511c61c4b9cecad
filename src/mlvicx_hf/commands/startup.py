# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Prepare this process for commands that run a saved model."""

from __future__ import annotations


def start_inference(device: str | None) -> None:
    """Hide the bars of loading files; give torch its threads if the device of this name, or the default, is a CPU."""
    import transformers

    from mlvicx_hf.common.machine import choose_device, use_cpu_threads

    transformers.utils.logging.disable_progress_bar()
    if choose_device(device).type == "cpu":
        use_cpu_threads()
