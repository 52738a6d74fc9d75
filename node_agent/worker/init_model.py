"""``python -m node_agent.worker.init_model --plan F --out DIR``: the model of round 0.

Writes ``manifest.json`` and ``theta.f32`` and prints their digests as JSON, so that whoever writes
a plan can pin them. The weights depend on ``model.config`` and ``model.seed`` alone: normal with
``initializer_range``, drawn per tensor from PCG64 keyed by seed and tensor number, computed in
float64; norm gains are 1 and biases 0. Since the plan pins the bytes, nobody has to repeat the
draw; another platform's libm may round a few of them differently.

The file given with --plan (``.json`` is JSON, everything else TOML, as for `minga run submit`) may
be a plan or just its model without digests: the digests are what this command is for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node_agent.resident import JobFailedError
from node_agent.spool import DeltaSummary, DeltaWriter, atomic_write
from protocols.canonical import parse_json
from protocols.errors import FederationError, MalformedMessageError, exit_status
from protocols.tensors.manifest import Manifest, TensorSpec


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
        float32, of the tensor's shape.
    """
    if len(spec.shape) < 2:
        return np.full(spec.shape, 0.0 if spec.name.endswith("bias") else 1.0, dtype=np.float32)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number])))
    return (rng.standard_normal(spec.shape) * scale).astype(np.float32)


def write_model(
    out: Path, *, config: Mapping[str, Any], seed: int
) -> tuple[Manifest, DeltaSummary]:
    """Write manifest.json and theta.f32.

    Returns:
        The manifest, and the root, size and norm of theta.

    Raises:
        JobFailedError: model.config.
    """
    from node_agent.worker.model import llama_config, manifest_of, meta_model

    scale = float(llama_config(config).initializer_range)
    manifest = manifest_of(meta_model(config))
    out.mkdir(parents=True, exist_ok=True)
    with DeltaWriter(out / "theta.f32") as writer:
        for number, spec in enumerate(manifest.tensors):
            writer.add(spec.name, initial_tensor(spec, seed=seed, number=number, scale=scale))
        summary = writer.commit()
    atomic_write(out / "manifest.json", manifest.to_bytes())
    return manifest, summary


def read_model(path: Path) -> tuple[dict[str, Any], int]:
    """``model.config`` and ``model.seed`` of a plan, or of a plan to be.

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
    if not isinstance(model, dict) or not isinstance(model.get("config"), dict):
        raise MalformedMessageError(f"{path} has no model.config")
    if model.get("family", "llama") != "llama":
        raise MalformedMessageError(f"{path}: model.family must be llama")
    seed = model.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise MalformedMessageError(f"{path}: model.seed must be 0 to 2**31-1")
    return model["config"], seed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m node_agent.worker.init_model", description=__doc__
    )
    parser.add_argument("--plan", type=Path, required=True, help="a plan, or a file with its model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        config, seed = read_model(options.plan)
        manifest, theta = write_model(options.out, config=config, seed=seed)
    except FederationError as error:
        print(f"init_model: {error.diagnostics()}", file=sys.stderr)
        return exit_status(error)
    except JobFailedError as error:
        print(f"init_model: {error} [{error.code}]", file=sys.stderr)
        return 3
    facts = {
        "manifest": manifest.digest,
        "theta": theta.root,
        "coordinates": theta.coordinates,
        "tensors": len(manifest.tensors),
    }
    print(json.dumps(facts, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
