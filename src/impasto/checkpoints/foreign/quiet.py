"""Transformers without progress bars and messages, for programs that have their own."""

from __future__ import annotations


def silence_transformers() -> None:
    """From here on. Bars of downloads are left as they are."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads_shown = not are_progress_bars_disabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if downloads_shown:  # the line above is meant for the loading of weights, but hides downloads too
        enable_progress_bars()
