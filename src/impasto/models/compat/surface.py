"""The rest of the documented surface of models: switches and facts that their mathematics does not need."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...errors import ConfigurationError, InputError
from ...nn.attention import check_backend, kernels
from ...nn.changes import of
from ...nn.fused_linear import FusedLinear
from ...nn.precision import checkpointed, checkpointed_by
from .attention_processor import ProcessedAttention, check_processor, giving_again


def _public(name: str) -> Callable[..., Any]:
    """A public function of the package: for methods that are other names of functions on higher floors."""
    function: Callable[..., Any] = getattr(sys.modules[__name__.partition(".")[0]], name)
    return function


@contextmanager
def attention_backend(backend: str = "native") -> Iterator[None]:
    """Let attention inside of the ``with`` block, in this thread, prefer a backend's kernels, by its name in diffusers.

    Raises:
        InputError: there is no such backend.
    """
    with kernels(check_backend(backend)):
        yield


class ModelSurface(nn.Module):
    """What all models have."""

    _supports_gradient_checkpointing: ClassVar[bool] = False
    _supports_group_offloading: ClassVar[bool] = True
    _no_split_modules: ClassVar[Sequence[str] | None] = None
    _keep_in_fp32_modules: ClassVar[Sequence[str] | None] = None
    _skip_layerwise_casting_patterns: ClassVar[Sequence[str] | None] = None
    _repeated_blocks: ClassVar[Sequence[str]] = ()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters hold."""
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else ()
        counted = (p for p in self.parameters() if id(p) not in embeddings and (p.requires_grad or not only_trainable))
        return sum(parameter.numel() for parameter in counted)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters and, unless ``return_buffers`` is False, of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile each block by itself; arguments are those of ``torch.compile``."""
        blocks = [module for module in self.modules() if type(module).__name__ in self._repeated_blocks]
        if not blocks:
            raise ConfigurationError(f"{type(self).__name__} has no repeated blocks; use its compile() method")
        for block in blocks:
            block.compile(*args, **kwargs)

    def dequantize(self) -> None:
        """Restore the layers that ``impasto.quantize`` has replaced."""
        _public("dequantize")(self)

    def enable_parallelism(self, *, config: Any = None, cp_plan: Any = None) -> None:
        """Sequence-parallel on the processes of torchrun: ``impasto.parallelize(model, sequence=ulysses_degree)``.

        Args:
            config: an object with ``ulysses_degree`` (diffusers' ``ContextParallelConfig``), or one with it as
                ``context_parallel_config``.
            cp_plan: accepted without effect: the model's own plan is used.

        Raises:
            ConfigurationError: another kind of parallelism.
        """
        config = getattr(config, "context_parallel_config", None) or config
        degree = getattr(config, "ulysses_degree", None)
        if degree is None or (getattr(config, "ring_degree", None) or 1) != 1:
            raise ConfigurationError(
                "enable_parallelism takes ContextParallelConfig(ulysses_degree=...) here; to shard weights, call "
                "torch.distributed.fsdp.fully_shard on the blocks and on the model"
            )
        _public("parallelize")(self, sequence=degree)

    # Attention

    @property
    def _attentions(self) -> Iterator[tuple[str, ProcessedAttention]]:
        return ((name, m) for name, m in self.named_modules() if isinstance(m, ProcessedAttention))

    def set_attention_backend(self, backend: str) -> None:
        """Let torch's attention prefer the kernels of a backend, by its name in diffusers; "native": the fastest.

        Raises:
            InputError: there is no such backend.
        """
        name = check_backend(backend)
        self.reset_attention_backend()
        for _, attention in self._attentions if name != "native" else ():
            attention._backend = name

    def reset_attention_backend(self) -> None:
        """Let attention be computed by whatever is fastest."""
        for _, attention in self._attentions:
            vars(attention).pop("_backend", None)

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Accepted without effect: attention is already memory-efficient."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Accepted without effect: attention is already memory-efficient."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Accepted without effect: attention stays memory-efficient."""

    def set_use_npu_flash_attention(self, valid: bool) -> None:
        """Accepted without effect: torch chooses the kernel."""

    def enable_npu_flash_attention(self) -> None:
        """Accepted without effect: torch chooses the kernel."""

    def disable_npu_flash_attention(self) -> None:
        """Accepted without effect: torch chooses the kernel."""

    def set_use_xla_flash_attention(
        self, use_xla_flash_attention: bool, partition_spec: Any = None, **kwargs: Any
    ) -> None:
        """Accepted without effect: torch chooses the kernel."""

    def enable_xla_flash_attention(self, partition_spec: Any = None, **kwargs: Any) -> None:
        """Accepted without effect: torch chooses the kernel."""

    def disable_xla_flash_attention(self) -> None:
        """Accepted without effect: torch chooses the kernel."""

    # Memory

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: Sequence[str] | None = None,
        skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Store weights in a narrow dtype, and cast those of each layer when it is called.

        ``disable_layerwise_casting`` undoes it.

        Args:
            compute_dtype: that of the model unless given.
            skip_modules_pattern: regular expressions of names of layers that stay as they are; by default embeddings
                of positions, normalizations and the last layer. What the model's class names stays in any case.
        """
        default: Sequence[str] = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$", "lora_")
        own = (*(self._keep_in_fp32_modules or ()), *(self._skip_layerwise_casting_patterns or ()))
        skipped = (*(default if skip_modules_pattern is None else skip_modules_pattern), *own)
        dtype: torch.dtype = cast(Any, self).dtype if compute_dtype is None else compute_dtype
        _public("apply_layerwise_casting")(self, storage_dtype, dtype, skipped, skip_modules_classes, non_blocking)

    def disable_layerwise_casting(self) -> None:
        """Cast weights that are stored in a narrow dtype back to theirs; their lost digits stay lost."""
        for module in self.modules():
            for change in of(module):
                if change.change == "stored in a narrow dtype":
                    cast(Any, change).remove()

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
        block_modules: Sequence[str] | None = None,
        exclude_kwargs: Sequence[str] | None = None,
    ) -> None:
        """Keep the weights on the host, and bring a group of blocks at a time; see ``apply_group_offloading``."""
        arguments = {name: value for name, value in locals().items() if name != "self"}
        _public("apply_group_offloading")(self, **arguments)


class GradientCheckpointing:
    """The switch of gradient checkpointing."""

    _supports_gradient_checkpointing: ClassVar[bool] = True
    gradient_checkpointing = False
    checkpoint: Callable[..., Any] = staticmethod(checkpointed)  # calls a block with its arguments

    def in_training(self, block: nn.Module) -> Callable[..., Any]:
        """What computes a block: itself, or in training with checkpoints what also recomputes it."""
        recomputed = self.gradient_checkpointing and torch.is_grad_enabled()
        return partial(self.checkpoint, giving_again(block)) if recomputed else block

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Recompute each block in the backward pass, to save memory.

        Args:
            gradient_checkpointing_func: calls a block with its arguments, ``func(block, *arguments)``, in place of
                torch's non-reentrant checkpointing.
        """
        self._set_checkpointing(True, gradient_checkpointing_func)

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for the backward pass."""
        self._set_checkpointing(False, None)

    def _set_checkpointing(self, on: bool, function: Callable[..., Any] | None) -> None:
        for module in cast(nn.Module, self).modules():
            if isinstance(module, GradientCheckpointing):
                module.gradient_checkpointing = on
                vars(module).pop("checkpoint", None)
                if function is not None:
                    vars(module)["checkpoint"] = partial(checkpointed_by, function)


class Processors:
    """The attention processors of a model; see ``attention_processor.py``."""

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The processor of each attention, by its name: "transformer_blocks.0.attn1.processor"."""
        return {f"{name}.processor": attention.processor for name, attention in cast(Any, self)._attentions}

    def set_attn_processor(self, processor: Any) -> None:
        """Let a processor compute every attention; or, in a dict by name, one each.

        Raises:
            InputError: the names of a dict are not those of ``attn_processors``, or one cannot be called. Then all
                attentions are as they were.
        """
        named = processor if isinstance(processor, dict) else dict.fromkeys(self.attn_processors, processor)
        if set(named) != set(self.attn_processors):
            wrong = sorted(set(named) ^ set(self.attn_processors))
            raise InputError(f"attention processors by name need one for each attention; see {', '.join(wrong[:3])}")
        for each in named.values():
            check_processor(each)
        for name, attention in cast(Any, self)._attentions:
            attention.set_processor(named[f"{name}.processor"])

    def set_default_attn_processor(self) -> None:
        """Let every attention be computed by its own code, with separate projections."""
        for _, attention in cast(Any, self)._attentions:
            attention.set_processor(attention.default_processor)
            attention._fused = None


class FusedProjections(Processors):
    """The switch of fused projections, of a model whose attentions have ``fusible`` layers."""

    def fuse_qkv_projections(self) -> None:
        """One product for query, key and value of self-attention, and one for key and value of cross-attention.

        The state dict stays as it is. Raises ``ConfigurationError`` where an adapter wraps a projection.
        """
        try:
            for _, attention in cast(Any, self)._attentions:
                attention._fused = FusedLinear(attention.fusible)
        except ConfigurationError:
            self.unfuse_qkv_projections()
            raise

    def unfuse_qkv_projections(self) -> None:
        """Undo ``fuse_qkv_projections``."""
        for _, attention in cast(Any, self)._attentions:
            attention._fused = None


class Caching:
    """Step caching by the configs of diffusers, of models with ``transformer_blocks``."""

    step_cache: Any = None  # the handle of ``cache_steps``
    _cache_config: Any = None
    _memories: Mapping[str, Any] = {}

    @property
    def is_cache_enabled(self) -> bool:
        """Whether ``enable_cache`` is in force."""
        return self._cache_config is not None

    def enable_cache(self, config: Any) -> None:
        """Let some steps reuse what blocks computed in an earlier one: ``impasto.cache_steps`` by a config.

        Args:
            config: ``FirstBlockCacheConfig`` or ``TaylorSeerCacheConfig``, ours or those of diffusers. What they say is
                done for all blocks together. ``TextKVCacheConfig`` has no effect: a prompt's keys are always kept.

        Raises:
            ConfigurationError: another config, a setting that ``cache_steps`` lacks, or a cache is in force.
        """
        if self.is_cache_enabled:
            raise ConfigurationError("steps are cached already; call disable_cache() first")
        if any(change.change == "cached" for block in cast(Any, self).transformer_blocks for change in of(block)):
            raise ConfigurationError("steps are cached already, by cache_steps(); remove() its handle first")
        arguments = _cache_arguments(config)
        self.step_cache = None if arguments is None else _public("cache_steps")(self, **arguments)
        self._cache_config, self._memories = config, {}

    def disable_cache(self) -> None:
        """Compute every step again."""
        if self.step_cache is not None:
            self.step_cache.remove()
        self.step_cache = self._cache_config = None
        self._memories = {}

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """In a loop of one's own: the call inside is the next step of those with this name ("cond", "uncond")."""
        if self.step_cache is None:
            yield
            return
        memory = self._memories.get(name) or self.step_cache.memory(None)
        self._memories = {**self._memories, name: memory}
        with cast("AbstractContextManager[None]", memory.current()):
            yield

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Begin another generation of a loop of one's own."""
        self._memories = {}


def _cache_arguments(config: Any) -> dict[str, Any] | None:
    """The arguments of ``cache_steps``; None if nothing is to be done."""
    name = type(config).__name__
    if name == "TextKVCacheConfig":
        return None
    if name == "FirstBlockCacheConfig":
        return {"method": "first-block", "threshold": config.threshold}
    if name == "TaylorSeerCacheConfig" and config.max_order <= 1 and config.disable_cache_after_step is None:
        method = "taylor" if config.max_order == 1 else "interval"
        return {"method": method, "interval": config.cache_interval, "first": max(1, config.disable_cache_before_step)}
    raise ConfigurationError(
        f"{name} has no counterpart here: use FirstBlockCacheConfig(threshold=...), TaylorSeerCacheConfig with a "
        f"max_order of 1 at most and no disable_cache_after_step, or impasto.cache_steps(pipe, ...)"
    )


class Rope:
    """The rotary positions of a model, as a function of latents."""

    def rope(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, d] of the image tokens of latents [B, C, H, W]."""
        from ...nn.embeddings import rotary_2d

        model = cast(Any, self)
        rows, columns = (side // model.patch_size for side in hidden_states.shape[-2:])
        return rotary_2d(rows, columns, model.head_dim, hidden_states.device)
