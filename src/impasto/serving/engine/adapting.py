"""The adapters that are in force in an engine: one set at a time, fused into the weights, and undone bit by bit."""

from __future__ import annotations

from typing import Any

from ...pipelines.adapters import ChosenAdapter, load_adapters

Adapters = tuple[ChosenAdapter, ...]


class AdapterSwitch:
    """Brings sets of adapters in force on a pipeline."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.current: Adapters = ()

    def use(self, adapters: Adapters) -> None:
        """Let exactly these act.

        Raises:
            CheckpointError: one is missing, damaged or for another model; then none acts.
        """
        if adapters == self.current:
            return
        pipe = self.pipe
        if self.current:
            pipe.unfuse_lora()
            pipe.unload_lora_weights()
            self.current = ()
        if adapters:
            load_adapters(pipe, adapters)
            self.current = adapters
