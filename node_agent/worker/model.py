"""The model on its device, whole or sharded, loaded from and compared to theta.

theta is raw little-endian float32 in manifest order (protocols/tensors/manifest.py), mapped, not
read: each rank copies only the rows it holds. On several ranks every decoder layer and the root
are FSDP2 groups (``fully_shard``), so parameters, gradients and optimizer state are spread over
the ranks; a single process keeps the plain module. Parameters stay float32; on CUDA the matrix
work is bfloat16.

The structure (structure.py) is built on the meta device and filled from theta and, under adapters,
from the base model's folder, so no rank ever holds a whole model that it will shard.
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

from node_agent.job_files import Theta
from node_agent.model_folder import FolderError
from node_agent.resident import JobFailedError
from node_agent.worker.data import IGNORE
from node_agent.worker.distributed import Ranks
from node_agent.worker.structure import (
    LlamaSource,
    ModelError,
    Source,
    computed_buffers,
    decoder_layers,
)
from protocols.tensors.manifest import Manifest, TensorSpec

# Above this many parameters activations are recomputed instead of kept; below it that would only
# cost time (a third of the forward work again).
CHECKPOINTING_FROM: Final = 500_000_000

Selection = Literal["all", "none"] | tuple[str, ...]


# -- theta ---------------------------------------------------------------------------------------


def _rows(size: int, rank: int, world: int) -> tuple[int, int]:
    """Rows of dimension 0 that a rank holds: FSDP2 splits as ``torch.chunk`` does."""
    each = math.ceil(size / world)
    start = min(rank * each, size)
    return start, min(start + each, size)


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
        model: Mapping[str, Any] | Source,
        *,
        select: Selection,
        ranks: Ranks,
        checkpointing: bool | None = None,
        replicated: bool = False,
    ) -> None:
        """Build and shard; the weights are undefined until ``load``.

        Args:
            model: where the structure comes from, or the ``model.config`` of a byte-level Llama.
            select: tensors that are trained; the others stay as loaded.
            ranks: this process among its peers.
            checkpointing: recompute activations; None decides by size and device.
            replicated: keep the trained tensors whole on every rank and shard the others only, as
                a private step needs; gradients are then this rank's own.

        Raises:
            ModelError: model.config.
            FolderError: the base model cannot be read.
        """
        self.ranks = ranks
        source: Source = LlamaSource.of(model) if isinstance(model, Mapping) else model
        self.module: Any = source.build()
        known = {name: source.travels(name) for name, _ in self.module.named_parameters()}
        self.manifest = Manifest(
            tuple(
                TensorSpec(kept, tuple(parameter.shape))
                for name, parameter in self.module.named_parameters()
                if (kept := known[name]) is not None
            )
        )
        # Before sharding: FSDP2 fixes which parameters need gradients when it wraps them.
        chosen = {segment.name for segment in self.manifest.select(select)}
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(known[name] in chosen)
        if checkpointing is None:
            checkpointing = (
                ranks.device.type == "cuda" and self.manifest.coordinates >= CHECKPOINTING_FROM
            )
        self.checkpointing = checkpointing
        self._replicated = replicated
        if checkpointing:
            self.module.activation_checkpointing_enable({"use_reentrant": False})
        tied = bool(getattr(self.module.config, "tie_word_embeddings", False))
        if ranks.sharded:
            if tied:
                raise ModelError("model.config", "tied embeddings are not sharded: use one rank")
            self._shard()
        self.module.to_empty(device=ranks.device)
        if tied:
            self.module.tie_weights()
        computed_buffers(self.module, ranks.device)
        held = dict(self.module.named_parameters())
        self._load_base(source, {name: held[name] for name, kept in known.items() if kept is None})
        self._parameters: dict[str, nn.Parameter] = {
            kept: held[name] for name, kept in known.items() if kept is not None
        }
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
        for part in (*decoder_layers(self.module), self.module):
            fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=whole or None)

    def _load_base(self, source: Source, parts: Mapping[str, nn.Parameter]) -> None:
        """Read this rank's rows of what does not travel."""
        wanted: dict[str, tuple[int, int] | None] = {}
        where: dict[str, nn.Parameter] = {}
        for name, parameter in parts.items():
            stored, rows = source.stored(name), None
            if isinstance(parameter, DTensor):
                rows = _rows(parameter.shape[0], self.ranks.rank, self.ranks.world)
            wanted[stored], where[stored] = rows, parameter
        with torch.no_grad():
            for stored, tensor in source.tensors(wanted):
                mine = _local(where[stored])
                if mine.shape != tensor.shape:
                    raise FolderError(f"tensor {stored} has another shape than config.json says")
                mine.copy_(tensor)

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
                    start, stop = _rows(spec.shape[0], self.ranks.rank, self.ranks.world)
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

    def parameter(self, name: str) -> nn.Parameter:
        """One of the manifest's tensors, whole or sharded. Raises: KeyError."""
        return self._parameters[name]

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
