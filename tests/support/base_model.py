"""A base model's folder made by transformers itself, and sites whose plan trains it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from node_agent.worker.init_model import folder_source, write_model
from tests.support.private_plans import SECAGG
from tests.support.private_worker import PRIVACY
from tests.support.worker import SENTENCES, Site, make_plan

TARGETS = ["down_proj", "q_proj", "v_proj"]
LORA = {"factors": "ffa", "rank": 4, "alpha": 8.0, "targets": TARGETS, "base_dtype": "float32"}


def make_base(folder: Path, *, seed: int = 0, tied: bool = False) -> Path:
    """A tiny Llama with a byte-level BPE tokenizer of its own, as its authors would save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    wrapped.save_pretrained(str(folder))
    return folder


def base_site(
    root: Path, *, lora: dict[str, Any] | None = None, private: bool = False, **plan: Any
) -> Site:
    """A site whose plan trains a model from a folder; ``lora`` None means all of its weights."""
    folder = make_base(root / "base", tied=plan.pop("tied", False))
    part: dict[str, Any] = {"family": "huggingface", "seed": 7}
    if lora is not None:
        part["lora"] = lora
    source = folder_source(part, folder)
    manifest, _ = write_model(root / "model", config={}, seed=7, source=source)
    theta = np.fromfile(root / "model" / "theta.f32", dtype="<f4")
    if private:
        privacy = PRIVACY | plan.pop("privacy", {})
        plan |= {
            "mode": "record-local",
            "roster": ["a", "b", "c"],
            "min_participants": 3,
            "secagg": SECAGG,
            "evaluation": {"languages": []},
            "privacy": privacy,
        }
        plan["local_step"] = {"max_steps": privacy["steps"]} | plan.get("local_step", {})
    if lora is not None:
        plan.setdefault("trainable", [spec.name for spec in manifest.tensors])
    model = part | {"manifest": manifest.digest, "initial": "0" * 64, "base": source.digest}
    made = make_plan(manifest, model=model, **plan)
    site = Site.make(root / "site", theta=theta, manifest=manifest, plan=made)
    site.extra["base"] = folder
    (root / "plan.json").write_text(json.dumps(made.model_dump(mode="json", by_alias=True)))
    return site


def ask(site: Site, number: int = 0, **fields: Any):
    """The job of one round, with what the plan trains in it."""
    select = site.plan.selection_in(number)
    base = str(site.extra["base"])
    return site.ask(number, **({"select": select, "base": base} | fields))
