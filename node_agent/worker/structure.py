"""What a model is made of before it has memory: our own Llama, or one from a folder, with adapters.

    theta   the tensors of the run's manifest, which travel: all of the model, or the adapters alone
    base    with adapters, everything else: read from the folder's safetensors, never sent

Structures are built on the meta device. A rank fills in only what it holds, so nobody ever needs
room for a whole model that is sharded. Adapters are peft's, injected in place. Their names in the
manifest are those of peft's files without the prefix, as in
``model.layers.0.self_attn.q_proj.lora_A.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from node_agent.model_folder import FolderError, ModelFolder
from node_agent.resident import JobFailedError
from node_agent.worker.tokens import BOS, EOS, PAD, VOCABULARY
from protocols.plan_model import Lora
from protocols.tensors.manifest import Manifest, TensorSpec

_ADAPTER: Final = "default"  # peft's name of the one adapter there is


class ModelError(JobFailedError):
    """The plan's model cannot be built or does not fit: ``model.config``, ``model.manifest``."""


class Source(Protocol):
    """Where a structure comes from. Equal sources build equal models."""

    def build(self) -> Any:
        """The structure, on the meta device. Raises: ModelError, FolderError."""

    def travels(self, name: str) -> str | None:
        """The name in the manifest of a parameter; None: it is part of the base."""

    def stored(self, name: str) -> str:
        """The name in the folder's files of a parameter of the base."""

    def tensors(self, names: Mapping[str, tuple[int, int] | None]) -> Iterator[tuple[str, Tensor]]:
        """Stored tensors by name, each whole or rows ``start`` to ``stop`` of it."""

    @property
    def longest(self) -> int | None:
        """Tokens that the model can see at once, if that is limited."""


def manifest_of(module: nn.Module) -> Manifest:
    """All parameters, in the order the module names them."""
    return Manifest(
        tuple(TensorSpec(name, tuple(p.shape)) for name, p in module.named_parameters())
    )


def manifest_from(source: Source) -> Manifest:
    """The parameter set that travels.

    Raises:
        ModelError, FolderError: it cannot be built.
    """
    return Manifest(
        tuple(
            TensorSpec(known, tuple(parameter.shape))
            for name, parameter in source.build().named_parameters()
            if (known := source.travels(name)) is not None
        )
    )


# -- our own -------------------------------------------------------------------------------------


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
    """The structure of a byte-level Llama without memory.

    Raises:
        ModelError: model.config.
    """
    made = llama_config(config)
    try:
        with torch.device("meta"):
            return LlamaForCausalLM(made)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ModelError("model.config", f"model.config: {error}") from None


@dataclass(frozen=True)
class LlamaSource:
    """A byte-level Llama; all of it travels."""

    items: tuple[tuple[str, Any], ...]  # of model.config, sorted

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LlamaSource:
        """From the plan's ``model.config``."""
        return cls(tuple(sorted(config.items())))

    @property
    def longest(self) -> int | None:
        """See Source."""
        longest = dict(self.items).get("max_position_embeddings")
        return longest if isinstance(longest, int) else None

    def build(self) -> Any:
        """See Source."""
        return meta_model(dict(self.items))

    def travels(self, name: str) -> str | None:
        """See Source."""
        return name

    def stored(self, name: str) -> str:
        """See Source."""
        raise ValueError(f"{name} travels")

    def tensors(self, names: Mapping[str, tuple[int, int] | None]) -> Iterator[tuple[str, Tensor]]:
        """See Source."""
        if names:
            raise ValueError("nothing is stored")
        yield from ()


# -- from a folder -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderSource:
    """A causal language model from a folder whose digest was checked."""

    folder: ModelFolder
    digest: str
    lora: Lora | None

    @property
    def longest(self) -> int | None:
        """See Source."""
        longest = self.folder.config().get("max_position_embeddings")
        return longest if isinstance(longest, int) else None

    def build(self) -> Any:
        """See Source."""
        dtype = torch.float32
        if self.lora is not None and self.lora.base_dtype == "bfloat16":
            dtype = torch.bfloat16
        root = str(self.folder.root)
        try:
            config = AutoConfig.from_pretrained(
                root, local_files_only=True, trust_remote_code=False
            )
            config.use_cache = False
            with torch.device("meta"):
                module: Any = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
                )
                if self.lora is not None:
                    _inject(module, self.lora)
        except FolderError:
            raise
        except Exception as error:  # noqa: BLE001  the libraries raise whatever their parts raise
            raise FolderError(f"no model can be built from {root}: {error}") from None
        if module.config.vocab_size <= PAD:
            raise FolderError(f"a vocabulary of {module.config.vocab_size} tokens is too small")
        return module

    def travels(self, name: str) -> str | None:
        """See Source."""
        if self.lora is None:
            return name
        inner = f".{_ADAPTER}."
        return name.replace(inner, ".") if ".lora_" in name and inner in name else None

    def stored(self, name: str) -> str:
        """See Source."""
        return name.replace(".base_layer.", ".")

    def tensors(self, names: Mapping[str, tuple[int, int] | None]) -> Iterator[tuple[str, Tensor]]:
        """See Source."""
        left = dict(names)
        for path in self.folder.weights:
            try:
                with safe_open(str(path), framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  not a mapping
                        if name not in left:
                            continue
                        rows = left.pop(name)
                        whole = file.get_slice(name)
                        yield name, whole[:] if rows is None else whole[rows[0] : rows[1]]
            except (SafetensorError, OSError) as error:
                raise FolderError(f"{path} cannot be read: {error}") from None
        if left:
            raise FolderError(
                f"{self.folder.root} has no tensor {min(left)}; only models whose files name their"
                " tensors as transformers does can be used"
            )


def _inject(module: Any, lora: Lora) -> None:
    """Put adapters on the targets; float32 whatever the base is in."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=False,
    )
    try:
        inject_adapter_in_model(config, module, adapter_name=_ADAPTER)
    except ValueError as error:
        raise FolderError(f"model.lora.targets: {error}") from None
    for part in module.modules():
        for name in ("lora_A", "lora_B"):
            if isinstance(held := getattr(part, name, None), nn.ModuleDict):
                held.float()


# -- memory --------------------------------------------------------------------------------------


def computed_buffers(module: Any, device: torch.device) -> None:
    """Compute anew what is not stored: rotary embeddings, which ``to_empty`` leaves undefined.

    Raises:
        ModelError: model.config: the model keeps something else in buffers.
    """
    found = [
        (name, part)
        for name, part in module.named_modules()
        if any(True for _ in part.buffers(recurse=False))
    ]
    for name, part in found:
        parent, _, own = name.rpartition(".")
        if not own.startswith("rotary_emb"):
            raise ModelError("model.config", f"the model keeps buffers in {name}: not supported")
        with torch.device("cpu"):
            made = type(part)(config=module.config)
        setattr(module.get_submodule(parent), own, made.to(device))


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The layers that are recomputed and sharded one by one."""
    return [part for part in module.modules() if type(part).__name__.endswith("DecoderLayer")]
