"""``python -m node_agent.worker.init_model --plan F --out DIR``: the model of round 0.

Writes ``manifest.json`` and ``theta.f32`` and prints their digests as JSON, so that whoever writes
a plan can pin them. The weights depend on ``model.config`` and ``model.seed`` alone: normal with
``initializer_range``, drawn per tensor from PCG64 keyed by seed and tensor number, computed in
float64; norm gains are 1 and biases 0. Since the plan pins the bytes, nobody has to repeat the
draw; another platform's libm may round a few of them differently.

A model from a folder (--base) begins with the folder's own weights, or, with adapters, as if it had
none: factor A is drawn, B is zero.

The file given with --plan (``.json`` is JSON, everything else TOML, as for `minga run submit`) may
be a plan or just its model without digests: the digests are what this command is for.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from node_agent.model_folder import FolderError, open_folder
from node_agent.resident import JobFailedError
from node_agent.spool import DeltaSummary, DeltaWriter, atomic_write
from protocols.canonical import parse_json
from protocols.errors import FederationError, MalformedMessageError, exit_status
from protocols.plan_model import FACTOR_A, FACTOR_B, Lora
from protocols.tensors.manifest import Manifest, TensorSpec

if TYPE_CHECKING:
    from node_agent.worker.structure import FolderSource, Source


def initial_tensor(
    spec: TensorSpec, *, seed: int, number: int, scale: float
) -> NDArray[np.float32]:
    """The starting value of one tensor.

    Args:
        spec: its name and shape; a vector is a norm's gain, or a bias if so named.
        seed: of the model.
        number: of the tensor in the manifest, from 0.
        scale: standard deviation of a matrix's entries.

    Returns:
        float32, of the tensor's shape. The factor B of an adapter is zero, so that the model begins
        as its base; A has the deviation of peft's own start, 1 / sqrt(3 * inputs).
    """
    if FACTOR_B in spec.name:
        return np.zeros(spec.shape, dtype=np.float32)
    if len(spec.shape) < 2:
        return np.full(spec.shape, 0.0 if spec.name.endswith("bias") else 1.0, dtype=np.float32)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number])))
    if FACTOR_A in spec.name:
        scale = 1.0 / math.sqrt(3.0 * spec.shape[-1])
    return (rng.standard_normal(spec.shape) * scale).astype(np.float32)


def write_model(
    out: Path,
    *,
    config: Mapping[str, Any],
    seed: int,
    source: Source | None = None,
) -> tuple[Manifest, DeltaSummary]:
    """Write manifest.json and theta.f32.

    Args:
        out: folder of the two files.
        config, seed: of the plan's model.
        source: of a model from a folder, in place of ``config``.

    Returns:
        The manifest, and the root, size and norm of theta.

    Raises:
        JobFailedError: model.config, model.base.
    """
    from node_agent.worker.structure import LlamaSource, llama_config, manifest_from

    scale = 0.0 if source is not None else float(llama_config(config).initializer_range)
    manifest = manifest_from(source or LlamaSource.of(config))
    out.mkdir(parents=True, exist_ok=True)
    stored = source is not None and not any(FACTOR_A in spec.name for spec in manifest.tensors)
    with DeltaWriter(out / "theta.f32") as writer:
        for number, spec in enumerate(manifest.tensors):
            if stored and source is not None:  # the folder's own weights, one at a time
                ((_, tensor),) = source.tensors({source.stored(spec.name): None})
                writer.add(spec.name, tensor.float().numpy())
            else:
                made = initial_tensor(spec, seed=seed, number=number, scale=scale)
                writer.add(spec.name, made)
        summary = writer.commit()
    atomic_write(out / "manifest.json", manifest.to_bytes())
    return manifest, summary


def read_model(path: Path) -> dict[str, Any]:
    """``model`` of a plan, or of a plan to be: ``config``, ``seed``, ``lora``.

    Raises:
        MalformedMessageError: the file has no such model.
    """
    try:
        data = path.read_bytes()
        value = parse_json(data) if path.suffix == ".json" else tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise MalformedMessageError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MalformedMessageError(f"{path}: {error}") from None
    model = value.get("model") if isinstance(value, dict) else None
    family = model.get("family", "llama") if isinstance(model, dict) else None
    if not isinstance(model, dict) or family not in ("llama", "huggingface"):
        raise MalformedMessageError(f"{path}: model.family must be llama or huggingface")
    if family == "llama" and not isinstance(model.get("config"), dict):
        raise MalformedMessageError(f"{path} has no model.config")
    seed = model.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise MalformedMessageError(f"{path}: model.seed must be 0 to 2**31-1")
    return model


def folder_source(model: Mapping[str, Any], base: Path | None) -> FolderSource | None:
    """Where a model from a folder comes from; None for a model of our own.

    Args:
        model: of a plan, or of a plan to be.
        base: the folder.

    Raises:
        MalformedMessageError: the plan's adapters are wrong, or no folder was given.
        FolderError: the folder cannot be used, or is not the one that the plan names.
    """
    from node_agent.worker.structure import FolderSource

    if model.get("family", "llama") != "huggingface":
        return None
    if base is None:
        raise MalformedMessageError("a model of family huggingface needs --base FOLDER")
    folder = open_folder(base.absolute())
    digest = folder.digest()
    if model.get("base", digest) != digest:
        raise FolderError(f"{base} is {digest}, the plan names {model['base']}")
    lora = model.get("lora")
    if lora is None:
        return FolderSource(folder, digest, None)
    try:
        return FolderSource(folder, digest, Lora.model_validate({"factors": "ffa", **lora}))
    except ValueError as error:
        raise MalformedMessageError(f"model.lora: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m node_agent.worker.init_model", description=__doc__
    )
    parser.add_argument("--plan", type=Path, required=True, help="a plan, or a file with its model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--base", type=Path, help="folder of the base model, if the plan has one")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        model = read_model(options.plan)
        source = folder_source(model, options.base)
        manifest, theta = write_model(
            options.out,
            config=model.get("config", {}),
            seed=model.get("seed", 0),
            source=source,
        )
    except FederationError as error:
        print(f"init_model: {error.diagnostics()}", file=sys.stderr)
        return exit_status(error)
    except JobFailedError as error:
        print(f"init_model: {error} [{error.code}]", file=sys.stderr)
        return 3
    facts: dict[str, Any] = {
        "manifest": manifest.digest,
        "theta": theta.root,
        "coordinates": theta.coordinates,
        "tensors": len(manifest.tensors),
    }
    if source is not None:
        facts["base"] = source.digest
    print(json.dumps(facts, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
