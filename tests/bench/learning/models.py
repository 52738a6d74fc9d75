"""The models of the benchmark: a byte-level Llama in a folder, as its authors would hand it out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from node_agent.worker.export import write_model_folder
from node_agent.worker.init_model import folder_source, write_model
from protocols.tensors.manifest import Manifest
from tests.bench.learning.settings import Amount

TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def untrained(folder: Path, amount: Amount, *, seed: int) -> Path:
    """A folder with a random model whose tokens are bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # no room for merges: every byte is a token
        vocab_size=259,
        show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=amount.hidden,
        intermediate_size=amount.hidden * 11 // 4,
        num_hidden_layers=amount.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * amount.sequence,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    wrapped.save_pretrained(str(folder))
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run begins with."""

    folder: Path
    model: dict[str, Any]  # of the plan
    trainable: Any
    manifest: Manifest
    theta: np.ndarray


def start_of(
    work: Path, folder: Path, amount: Amount, *, seed: int, factors: str | None = None
) -> Start:
    """The plan's model over a folder: whole, or by adapters (``factors`` as in the plan)."""
    part: dict[str, Any] = {"family": "huggingface", "seed": seed}
    if factors is not None:
        part["lora"] = {
            "factors": factors,
            "rank": amount.lora_rank,
            "alpha": 2.0 * amount.lora_rank,
            "targets": TARGETS,
            "base_dtype": "float32",
        }
    source = folder_source(part, folder)
    manifest, _ = write_model(work, config={}, seed=seed, source=source)
    return Start(
        folder=folder,
        model=part | {"manifest": manifest.digest, "initial": "0" * 64, "base": source.digest},
        trainable="all" if factors is None else [spec.name for spec in manifest.tensors],
        manifest=manifest,
        theta=np.fromfile(work / "theta.f32", dtype="<f4"),
    )


def hand_out(start: Start, theta: np.ndarray, out: Path) -> Path:
    """Write trained weights as a folder that later runs take as their base."""
    source = folder_source({"family": "huggingface"}, start.folder)
    write_model_folder(out, source, theta, folder=start.folder)
    return out
