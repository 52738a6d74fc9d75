"""The model on its device: a byte-level Llama, whole or sharded, loaded from and compared to theta.

theta is raw little-endian float32 in manifest order (protocols/tensors/manifest.py), mapped, not
read: each rank copies only the rows it holds. On several ranks every decoder layer and the root
are FSDP2 groups (``fully_shard``), so parameters, gradients and optimizer state are spread over
the ranks; a single process keeps the plain module. Parameters stay float32; on CUDA the matrix
work is bfloat16.

The structure is built on the meta device and filled from theta, so no rank ever holds a whole
model that it will shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding

from node_agent.job_files import Theta
from node_agent.resident import JobFailedError
from node_agent.worker.data import BOS, EOS, IGNORE, PAD, VOCABULARY
from node_agent.worker.distributed import Ranks
from protocols.tensors.manifest import Manifest, TensorSpec

# Above this many parameters activations are recomputed instead of kept; below it that would only
# cost time (a third of the forward work again).
CHECKPOINTING_FROM: Final = 500_000_000

Selection = Literal["all", "none"] | tuple[str, ...]


class ModelError(JobFailedError):
    """The plan's model cannot be built or does not fit: ``model.config``, ``model.manifest``."""


# -- structure -----------------------------------------------------------------------------------


def llama_config(config: Mapping[str, Any]) -> Any:
    """The plan's ``model.config`` as a LlamaConfig, with what bytes as tokens demand.

    Raises:
        ModelError: model.config: a value is refused, or contradicts the byte vocabulary.
    """
    fixed = {
        "vocab_size": VOCABULARY,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
    }
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ModelError("model.config", f"model.config.{key} must be {value}")
    try:
        made = LlamaConfig(
            **{**config, **fixed}, use_cache=False, attn_implementation="sdpa", dtype="float32"
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError("model.config", f"model.config: {error}") from None
    except Exception as error:  # noqa: BLE001  huggingface_hub raises its own validation errors
        raise ModelError("model.config", f"model.config: {error}") from None
    return made


def meta_model(config: Mapping[str, Any]) -> Any:
    """The model's structure without memory.

    Raises:
        ModelError: model.config.
    """
    made = llama_config(config)
    try:
        with torch.device("meta"):
            return LlamaForCausalLM(made)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ModelError("model.config", f"model.config: {error}") from None


def manifest_of(module: nn.Module) -> Manifest:
    """All parameters, in the order the module names them."""
    return Manifest(
        tuple(TensorSpec(name, tuple(p.shape)) for name, p in module.named_parameters())
    )


# -- theta ---------------------------------------------------------------------------------------


def _rows(spec: TensorSpec, rank: int, world: int) -> tuple[int, int]:
    """Rows of dimension 0 that a rank holds: FSDP2 splits as ``torch.chunk`` does."""
    each = math.ceil(spec.shape[0] / world)
    start = min(rank * each, spec.shape[0])
    return start, min(start + each, spec.shape[0])


@dataclass(frozen=True, slots=True)
class LocalPart:
    """What this rank holds of one trainable tensor."""

    name: str
    leaf: nn.Parameter  # what the optimizer updates; shares memory with the model's shard
    whole: nn.Parameter  # the model's parameter: the same object, or a DTensor


class ResidentModel:
    """One model in memory, reused for every job with the same structure and selection."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        select: Selection,
        ranks: Ranks,
        checkpointing: bool | None = None,
        replicated: bool = False,
    ) -> None:
        """Build and shard; the weights are undefined until ``load``.

        Args:
            config: the plan's ``model.config``.
            select: tensors that are trained; the others stay as loaded.
            ranks: this process among its peers.
            checkpointing: recompute activations; None decides by size and device.
            replicated: keep the trained tensors whole on every rank and shard the others only, as
                a private step needs; gradients are then this rank's own.

        Raises:
            ModelError: model.config.
        """
        self.ranks = ranks
        self.module = meta_model(config)
        self.manifest = manifest_of(self.module)
        # Before sharding: FSDP2 fixes which parameters need gradients when it wraps them.
        chosen = {segment.name for segment in self.manifest.select(select)}
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in chosen)
        if checkpointing is None:
            checkpointing = (
                ranks.device.type == "cuda" and self.manifest.coordinates >= CHECKPOINTING_FROM
            )
        self.checkpointing = checkpointing
        self._replicated = replicated
        if checkpointing:
            self.module.activation_checkpointing_enable({"use_reentrant": False})
        if ranks.sharded:
            self._shard()
        self.module.to_empty(device=ranks.device)
        # The one buffer is computed, not stored: to_empty left it undefined.
        rotary = LlamaRotaryEmbedding(self.module.config).to(ranks.device)
        self.module.model.rotary_emb = rotary
        self._parameters = dict(self.module.named_parameters())
        self.trainable = [
            LocalPart(
                name, _leaf(parameter) if isinstance(parameter, DTensor) else parameter, parameter
            )
            for name, parameter in self._parameters.items()
            if parameter.requires_grad
        ]

    def _shard(self) -> None:
        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.world,))
        policy, whole = MixedPrecisionPolicy(), set()
        if self._replicated:
            whole = {p for p in self.module.parameters() if p.requires_grad}
        elif self.ranks.device.type == "cuda":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for part in (*self.module.model.layers, self.module):
            fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=whole or None)

    # -- weights in and out ----------------------------------------------------------------------

    def load(self, theta_D: Theta) -> None:
        """Copy this rank's rows of every tensor.

        Args:
            theta_D: float32, shape [D], manifest order.

        Raises:
            JobFailedError: train.non_finite: NaN or infinity in a tensor; names it. Each rank
                sees only its rows, so the caller must let the ranks agree.
        """
        with torch.no_grad():
            for spec, segment in zip(self.manifest.tensors, self.manifest.segments, strict=True):
                rows = theta_D[segment.start : segment.stop].reshape(spec.shape)
                if isinstance(self._parameters[spec.name], DTensor):
                    start, stop = _rows(spec, self.ranks.rank, self.ranks.world)
                    rows = rows[start:stop]
                mine = np.array(rows, dtype=np.float32)
                if not np.isfinite(mine).all():
                    raise JobFailedError(
                        "train.non_finite",
                        f"tensor {spec.name} of the starting model holds NaN or infinity",
                    )
                _local(self._parameters[spec.name]).copy_(torch.from_numpy(mine))

    def difference(self, theta_D: Theta) -> Iterator[tuple[str, Theta]]:
        """``local - theta`` of each trainable tensor, in manifest order, float32.

        Every rank must exhaust this together; all ranks but 0 get empty arrays.
        """
        specs = {spec.name: spec for spec in self.manifest.tensors}
        for part in self.trainable:
            whole = part.whole.full_tensor() if isinstance(part.whole, DTensor) else part.whole
            if not self.ranks.first:
                yield part.name, np.empty(0, dtype=np.float32)
                continue
            segment = self.manifest.segment(part.name)
            start = theta_D[segment.start : segment.stop].reshape(specs[part.name].shape)
            yield part.name, whole.detach().cpu().numpy() - start

    @property
    def has_shards(self) -> bool:
        """Whether any tensor is spread over ranks: each forward pass is then a collective."""
        return any(isinstance(p, DTensor) for p in self._parameters.values())

    # -- gradients -------------------------------------------------------------------------------

    def leaves(self) -> list[nn.Parameter]:
        """What the optimizer updates, with this step's gradients attached.

        A sharded parameter is aliased again each time: FSDP2 may move a shard when it pads it.
        """
        for part in self.trainable:
            if isinstance(part.whole, DTensor):
                part.leaf.data = _local(part.whole)
                gradient = part.whole.grad
                part.leaf.grad = None if gradient is None else _local(gradient)
        return [part.leaf for part in self.trainable]

    def forget_gradients(self) -> None:
        """Drop the gradients of the step that is over."""
        for part in self.trainable:
            part.whole.grad = None
            part.leaf.grad = None

    # -- forward ---------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 matrix work on CUDA, unless FSDP2's policy does it."""
        if self.ranks.device.type == "cuda" and (self._replicated or not self.ranks.sharded):
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def nll(self, inputs_BL: Tensor, labels_BL: Tensor) -> Tensor:
        """Negative log likelihood of each sequence.

        Args:
            inputs_BL: int64 [B, L] on the device; PAD past the end.
            labels_BL: int64 [B, L]; IGNORE where nothing is predicted. Attention is causal, so
                padding on the right cannot reach what stands before it.

        Returns:
            float32 [B], nats summed over the predicted positions of each sequence.
        """
        with self.autocast():
            logits = self.module(input_ids=inputs_BL, use_cache=False).logits
        loss = functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels_BL.flatten(),
            ignore_index=IGNORE,
            reduction="none",
        )
        return loss.view(labels_BL.shape).sum(dim=1)


def _local(tensor: Tensor) -> Tensor:
    """This rank's memory of a tensor; no copy."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _leaf(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(_local(parameter), requires_grad=True)


def on_device(tokens: NDArray[np.int64], device: torch.device) -> Tensor:
    """Tokens as an int64 tensor on the device."""
    return torch.from_numpy(tokens).to(device, non_blocking=True)
