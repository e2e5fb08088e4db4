"""The adapters that are in force in an engine: one set at a time, fused into the weights, and undone bit by bit."""

from __future__ import annotations

import logging
from typing import Any

from ...errors import ConfigurationError
from ...pipelines.adapters import ChosenAdapter

logger = logging.getLogger("impasto")

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
        if not adapters:
            return
        names = [f"{i}_{adapter.name.replace('.', '_')}" for i, adapter in enumerate(adapters)]
        try:
            for name, adapter in zip(names, adapters):
                pipe.load_lora_weights(adapter.source, adapter_name=name)
            pipe.set_adapters(names, [adapter.weight for adapter in adapters])
        except Exception:
            pipe.unload_lora_weights()
            raise
        try:
            pipe.fuse_lora()
        except ConfigurationError as error:  # quantized weights
            logger.info("adapters stay as they are: %s", error)
            pipe.unfuse_lora()
        except Exception:  # such as a lack of memory
            pipe.unfuse_lora()
            pipe.unload_lora_weights()
            raise
        self.current = adapters
