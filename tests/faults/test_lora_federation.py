"""Adapters on a base model from a folder, from a plan to plain peft, through real processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from node_agent.worker.export import main as export_main
from node_agent.worker.init_model import folder_source, write_model
from protocols.plan import Plan
from protocols.tensors.manifest import Manifest
from tests.support.base_model import LORA, make_base
from tests.support.federation import Running, running
from tests.support.worker import write_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE_S = 400.0  # two workers import torch and transformers, perhaps on a busy machine


def theta_of(federation: Running, run: str, root: str) -> np.ndarray:
    home = federation.folder / "nodes" / "node-1" / "models" / run / root
    return np.fromfile(home / "theta.f32", "<f4")


def prepare(federation: Running, base: Path) -> None:
    """Text, held-out text and the folder of the base model at every site."""
    for number, site in enumerate(federation.sites):
        text = federation.federation.data_folder(site)
        write_text(text / "train.jsonl", documents=40, seed=number)
        write_text(text / "valid.jsonl", documents=8, seed=10 + number, lang="es")
        path = federation.folder / "nodes" / site / "config.toml"
        written = path.read_text()
        assert written.count("# network_interface") == 1
        folder = json.dumps(str(base))
        path.write_text(
            written.replace("# network_interface", f"base_model = {folder}\n# network_interface")
        )
        federation.start_node(site)


def test_adapters_are_trained_by_a_federation_and_loaded_by_peft(tmp_path, capsys):
    """RoLoRA: a round of B, a round of A; the base never travels and the loss of it falls."""
    base = make_base(tmp_path / "base")
    lora = LORA | {"factors": "rolora"}
    source = folder_source({"family": "huggingface", "seed": 7, "lora": lora}, base)
    start = tmp_path / "start"
    manifest, _ = write_model(start, config={}, seed=7, source=source)
    with running(tmp_path / "federation", nodes=2, start=False, log=False) as federation:
        prepare(federation, base)
        run = federation.submit_written(
            start,
            {
                "run": "adapters",
                "mode": "open",
                "roster": list(federation.sites),
                "min_participants": 2,
                "rounds": 2,
                "model": {
                    "family": "huggingface",
                    "seed": 7,
                    "base": source.digest,
                    "lora": lora,
                },
                "trainable": [spec.name for spec in manifest.tensors],
                "local_step": {"lr": 2e-2, "sequence_length": 32, "max_steps": 12},
                "evaluation": {"languages": ["es"]},
                "deadlines": dict.fromkeys(("join", "train", "upload"), 600),
            },
        )
        report = federation.confirmed(run, timeout_s=PATIENCE_S)
        roots = [round_.model_out for round_ in report.released]
        thetas = [np.fromfile(start / "theta.f32", "<f4")]
        thetas += [theta_of(federation, run, root) for root in roots[:2]]
        home = federation.folder / "nodes" / "node-1" / "models" / run
        plan = Plan.from_bytes((home / "plan.json").read_bytes())
        last = home / roots[1]
        nll = [round_.metrics["nll_millinats/es"] for round_ in report.released]
        model = tmp_path / "model"
        model.mkdir()
        (model / "manifest.json").write_bytes((home / "manifest.json").read_bytes())
        (model / "theta.f32").write_bytes((last / "theta.f32").read_bytes())

    assert Manifest.from_bytes((model / "manifest.json").read_bytes()).digest == manifest.digest
    factor = {
        name: np.concatenate(
            [
                np.arange(segment.start, segment.stop)
                for spec, segment in zip(manifest.tensors, manifest.segments, strict=True)
                if f".lora_{name}." in spec.name
            ]
        )
        for name in "AB"
    }
    assert factor["A"].size + factor["B"].size == manifest.coordinates  # no base in it
    for number, (moves, rests) in enumerate([("B", "A"), ("A", "B")]):
        moved = thetas[number + 1] - thetas[number]
        assert np.abs(moved[factor[moves]]).max() > 1e-3, number
        assert not moved[factor[rests]].any(), number
    assert nll[-1] < 0.99 * nll[0], nll  # of the first model and of the last one

    (tmp_path / "plan.json").write_text(json.dumps(plan.model_dump(mode="json", by_alias=True)))
    options = {
        "plan": tmp_path / "plan.json",
        "model": model,
        "base": base,
        "out": tmp_path / "out",
    }
    status = export_main(
        [part for key, value in options.items() for part in (f"--{key}", str(value))]
    )
    assert not status, capsys.readouterr()
    plain = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = plain(input_ids=tokens).logits
        loaded = PeftModel.from_pretrained(plain, str(tmp_path / "out"))
        after = loaded(input_ids=tokens).logits
    held = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in loaded.named_parameters()
        if "lora_" in name
    }
    found = np.concatenate([held[spec.name].detach().numpy().ravel() for spec in manifest.tensors])
    assert found.tobytes() == thetas[-1].tobytes()
    assert (before - after).abs().max() > 1e-3
