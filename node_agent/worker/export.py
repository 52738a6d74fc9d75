"""``python -m node_agent.worker.export --plan F --model DIR --out DIR``: a model for other tools.

``--model`` is a folder with ``manifest.json`` and ``theta.f32``: what a node keeps of a round, or
the demo's ``model/``. What is written loads with plain transformers or peft, without Minga:

    a byte-level Llama                  config.json, model.safetensors
    a model from a folder               the same, and the folder's tokenizer
    adapters                            adapter_config.json, adapter_model.safetensors   (peft)
    adapters with --merge               as a model from a folder, the adapters added in
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

from node_agent.job_files import Theta, open_theta
from node_agent.resident import JobFailedError
from node_agent.worker.distributed import Ranks
from node_agent.worker.init_model import folder_source, read_model
from node_agent.worker.model import ResidentModel
from node_agent.worker.structure import (
    FolderSource,
    LlamaSource,
    ModelError,
    Source,
    manifest_from,
)
from protocols.errors import FederationError, MalformedMessageError, exit_status
from protocols.plan_model import Lora
from protocols.tensors.manifest import Manifest

_PEFT_PREFIX: Final = "base_model.model."
_TOKENIZER: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def write_adapter(out: Path, manifest: Manifest, theta_D: Theta, lora: Lora, base: Path) -> None:
    """Write adapters as peft does.

    Args:
        out: folder, made if need be.
        manifest: of the run: the adapters' tensors.
        theta_D: float32, shape [D].
        lora: of the plan.
        base: folder of the base model, named in adapter_config.json.
    """
    from peft import LoraConfig

    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        _PEFT_PREFIX + spec.name: torch.from_numpy(
            np.array(theta_D[segment.start : segment.stop]).reshape(spec.shape)
        )
        for spec, segment in zip(manifest.tensors, manifest.segments, strict=True)
    }
    save_file(tensors, str(out / "adapter_model.safetensors"), metadata={"format": "pt"})
    LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    ).save_pretrained(str(out))


def merge_adapters(module: torch.nn.Module) -> None:
    """Add every adapter to its layer, in float32, and take it out."""
    from peft.tuners.lora import LoraLayer

    for name, part in list(module.named_modules()):
        if not isinstance(part, LoraLayer):
            continue
        layer: Any = part
        layer.base_layer.float()
        layer.merge(safe_merge=True)
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, layer.base_layer)


def write_model_folder(out: Path, source: Source, theta_D: Theta, *, folder: Path | None) -> None:
    """Write a whole model as transformers does.

    Args:
        out: folder, made if need be.
        source: of the structure.
        theta_D: float32, shape [D], manifest order.
        folder: of the base model, whose tokenizer is copied.

    Raises:
        ModelError, FolderError, JobFailedError: the model cannot be built or filled.
    """
    alone = Ranks(0, 1, torch.device("cpu"), "none")
    model = ResidentModel(source, select="none", ranks=alone)
    model.load(theta_D)
    dtype = next(iter(model.module.parameters())).dtype
    if isinstance(source, FolderSource) and source.lora is not None:
        merge_adapters(model.module)
        model.module.to(dtype)
    model.module.config.dtype = dtype
    model.module.save_pretrained(str(out))
    for name in _TOKENIZER if folder is not None else ():
        if folder is not None and (folder / name).exists():
            shutil.copyfile(folder / name, out / name)


def export(
    model: Mapping[str, Any], at: Path, out: Path, *, base: Path | None, merge: bool
) -> dict[str, Any]:
    """Write what the plan's model is.

    Args:
        model: the plan's ``model``.
        at: folder with manifest.json and theta.f32.
        out: where to write; must not exist, or be empty.
        base: folder of the base model, if the plan has one.
        merge: add adapters to the base instead of writing them alone.

    Returns:
        Facts to print.

    Raises:
        MalformedMessageError, FolderError, ModelError, JobFailedError.
    """
    if out.exists() and any(out.iterdir()):
        raise MalformedMessageError(f"{out} is not empty")
    try:
        manifest = Manifest.from_bytes((at / "manifest.json").read_bytes())
    except OSError as error:
        raise MalformedMessageError(f"{error.filename}: {error.strerror}") from None
    theta_D = open_theta(at / "theta.f32", manifest)
    found = folder_source(model, base)
    source: Source = LlamaSource.of(model.get("config", {})) if found is None else found
    if manifest_from(source).digest != manifest.digest:
        raise ModelError("model.manifest", f"{at} holds other tensors than the plan's model has")
    if found is not None and found.lora is not None and not merge:
        write_adapter(out, manifest, theta_D, found.lora, found.folder.root)
        kind = "adapter"
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_model_folder(
            out, source, theta_D, folder=None if found is None else found.folder.root
        )
        kind = "model"
    return {"kind": kind, "out": str(out), "coordinates": manifest.coordinates}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m node_agent.worker.export", description=__doc__)
    parser.add_argument("--plan", type=Path, required=True, help="the plan, TOML or JSON")
    parser.add_argument("--model", type=Path, required=True, help="manifest.json and theta.f32")
    parser.add_argument("--base", type=Path, help="folder of the base model, if the plan has one")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--merge", action="store_true", help="add adapters to the base model")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        facts = export(
            read_model(options.plan),
            options.model,
            options.out,
            base=options.base,
            merge=options.merge,
        )
    except FederationError as error:
        print(f"export: {error.diagnostics()}", file=sys.stderr)
        return exit_status(error)
    except JobFailedError as error:
        print(f"export: {error} [{error.code}]", file=sys.stderr)
        return 3
    print(json.dumps(facts, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
