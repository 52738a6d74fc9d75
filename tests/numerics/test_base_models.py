"""Models from a folder: against plain transformers and peft, trained, private, and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from node_agent.model_folder import FolderError, open_folder
from node_agent.model_folder import main as folder_main
from node_agent.spool import last_status
from node_agent.worker import export as exporting
from node_agent.worker import private_step
from node_agent.worker.data import IGNORE, PackedText, index_corpus
from node_agent.worker.export import export
from node_agent.worker.init_model import main as init_main
from node_agent.worker.private_path import WAYS
from node_agent.worker.records import Records
from node_agent.worker.tokens import FolderEncoder
from protocols.plan_model import FACTOR_A, FACTOR_B
from protocols.round_vector import round_layout
from tests.numerics.test_identities import federate
from tests.support.base_model import LORA, TARGETS, ask, base_site, make_base
from tests.support.private_worker import clip, counted_bytes, samples_of, tokens_of, without_noise
from tests.support.training import Worker, make_site
from tests.support.worker import write_text

torch.set_num_threads(1)


def done(site, job, **options) -> np.ndarray:
    Worker(site, **options).answer()
    last = last_status(site.spool, job.id)
    assert last.event == "done", last
    return site.delta(job)


def encoder_of(site) -> FolderEncoder:
    return FolderEncoder(site.extra["base"], digest=site.plan.model.base)


def plain_model(site):
    """The folder as anybody loads it, with peft's adapters holding theta if the plan has any."""
    model = AutoModelForCausalLM.from_pretrained(
        str(site.extra["base"]), dtype=torch.float32, attn_implementation="eager"
    )
    if site.plan.model.lora is None:
        return model
    config = LoraConfig(r=4, lora_alpha=8.0, target_modules=TARGETS, lora_dropout=0.0, bias="none")
    wrapped = get_peft_model(model, config)
    put(wrapped, site, site.theta)
    return wrapped


def parameters_of(model, site) -> list[torch.nn.Parameter]:
    """In manifest order."""
    named = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
    }
    return [named[spec.name] for spec in site.manifest.tensors]


def put(model, site, theta) -> None:
    with torch.no_grad():
        for parameter, segment in zip(
            parameters_of(model, site), site.manifest.segments, strict=True
        ):
            piece = np.array(theta[segment.start : segment.stop])
            parameter.copy_(torch.from_numpy(piece).view(parameter.shape))


def flat(model, site) -> np.ndarray:
    return np.concatenate([p.detach().numpy().reshape(-1) for p in parameters_of(model, site)])


def nll(model, tokens: list[int]) -> torch.Tensor:
    """Nats of ``tokens[1:]``: one sequence, no padding."""
    logits = model(input_ids=torch.tensor([tokens[:-1]])).logits[0].double()
    chosen = logits.log_softmax(dim=-1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    return -chosen.sum()


def chosen_in(site, number: int, values: np.ndarray) -> np.ndarray:
    """The coordinates that the plan exchanges in a round."""
    segments = site.manifest.select(site.plan.selection_in(number))
    return np.concatenate([values[s.start : s.stop] for s in segments])


# -- text and evaluation -------------------------------------------------------------------------


def test_evaluation_is_that_of_plain_transformers(tmp_path):
    site = base_site(tmp_path)
    job = ask(site, select="none")
    done(site, job)
    model, tokenizer = plain_model(site), AutoTokenizer.from_pretrained(str(site.extra["base"]))

    wanted, size = 0.0, 0
    for line in open(site.data.valid[0], encoding="utf-8"):  # noqa: PTH123, SIM115
        text = json.loads(line)["text"]
        tokens = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        assert len(tokens) > 33  # longer than a window
        for start in range(0, len(tokens) - 1, 32):
            wanted += nll(model, tokens[start : start + 33]).item()
        size += len(text.encode())
    (row,) = site.result(job).evaluation
    assert row.bytes == size
    assert row.nll_nats == pytest.approx(wanted, rel=1e-5)


def test_every_token_of_every_document_is_trained_once_an_epoch(tmp_path):
    site = base_site(tmp_path)
    encoder = encoder_of(site)
    corpus = index_corpus(site.data.train, encoder)
    text = PackedText(corpus, sequence_length=16, seed=1, encoder=encoder)
    stream = [
        int(label)
        for position in range(text.per_epoch)
        for label in text.sequence(position)[1]
        if label != IGNORE
    ]
    text.close()

    assert len(stream) == int(corpus.tokens.sum()) - 1
    words = [encoder.encode(json.loads(line)["text"].encode()) for line in lines(site)]
    assert sorted([*stream, 1]) == sorted(int(token) for word in words for token in word)
    records = Records(
        corpus, unit="document", max_sequences=99, sequence_length=16, encoder=encoder
    )
    for number, word in enumerate(words):
        rows = tokens_of(records.read(number))
        assert [rows[0][0], *(t for row in rows for t in row[1:])] == word.tolist()


def lines(site) -> list[str]:
    with open(site.data.train[0], encoding="utf-8") as file:  # noqa: PTH123
        return file.read().splitlines()


# -- training ------------------------------------------------------------------------------------


FACTORS = {
    "ffa": [".lora_B.", ".lora_B."],
    "rolora": [".lora_B.", ".lora_A."],
    "fedit": [".lora_", ".lora_"],
}


@pytest.mark.parametrize("factors", FACTORS)
def test_adapters_train_as_peft_trains_them(tmp_path, factors):
    """Two rounds; only the factors of the round move, and they alone are handed over."""
    step = {"optimizer": "sgd", "lr": 0.5, "max_steps": 3}
    site = base_site(tmp_path, lora=LORA | {"factors": factors}, local_step=step)
    encoder = encoder_of(site)
    corpus = index_corpus(site.data.train, encoder)
    text = PackedText(corpus, sequence_length=32, seed=3, encoder=encoder)
    model, position = plain_model(site), 0
    for number, part in enumerate(FACTORS[factors]):
        job = ask(site, number)
        delta = done(site, job)
        before = flat(model, site)
        trained = [
            p
            for p, spec in zip(parameters_of(model, site), site.manifest.tensors, strict=True)
            if part in spec.name
        ]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            rows = []
            for _ in range(4):
                inputs, labels = text.sequence(position)
                known = labels != IGNORE
                rows.append([*inputs[known].tolist(), int(labels[known][-1])])
                position += 1
            (sum(nll(model, row) for row in rows) / sum(len(row) - 1 for row in rows)).backward()
            optimizer.step()
        wanted = chosen_in(site, number, flat(model, site) - before)

        assert delta.size == wanted.size
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(delta, wanted, atol=1e-6, rtol=0)
        put(model, site, before)
        after = before.copy()
        at = 0
        for segment in site.manifest.select(site.plan.selection_in(number)):
            after[segment.start : segment.stop] += delta[at : at + segment.coordinates]
            at += segment.coordinates
        put(model, site, after)
        after.astype("<f4").tofile(site.root / "theta.f32")
    text.close()


def test_rolora_is_exact_in_each_round(tmp_path):
    """Two sites, two rounds through integers and outer step: the mean of the sites' own products.

    In the first round B moves and A rests, in the second the other way round. With both factors
    averaged at once, as FedIT does, the same comparison fails.
    """
    step = {"optimizer": "sgd", "lr": 2.0, "max_steps": 4}
    evaluation = {"languages": []}
    lora = LORA | {"factors": "rolora"}
    sites = [
        base_site(tmp_path / name, lora=lora, local_step=step, evaluation=evaluation)
        for name in ("a", "b")
    ]
    write_text(Path(sites[1].data.train[0]), documents=40, seed=9)
    tensors = {spec.name: spec.shape for spec in sites[0].manifest.tensors}

    def product(theta: np.ndarray, name: str) -> np.ndarray:
        found = []
        for factor in (FACTOR_B, FACTOR_A):
            segment = sites[0].manifest.segment(name.replace(FACTOR_B, factor))
            piece = theta[segment.start : segment.stop]
            found.append(piece.reshape(tensors[name.replace(FACTOR_B, factor)]).astype(float))
        return found[0] @ found[1]

    def off(theta: np.ndarray, own: list[np.ndarray]) -> float:
        names = [name for name in tensors if FACTOR_B in name]
        return max(
            np.abs(product(theta, name) - np.mean([product(o, name) for o in own], axis=0)).max()
            for name in names
        )

    for number, (moves, rests) in enumerate([(FACTOR_B, FACTOR_A), (FACTOR_A, FACTOR_B)]):
        before, own, deltas = sites[0].theta, [], []
        layout = round_layout(sites[0].plan, number, sites[0].manifest)
        for site in sites:
            deltas.append(done(site, ask(site, number)))
            theta, at = before.copy(), 0
            for segment in layout.segments:
                theta[segment.start : segment.stop] += deltas[-1][at : at + segment.coordinates]
                at += segment.coordinates
            own.append(theta)
        after, unit = federate(sites[0], deltas, layout)
        for name in tensors:
            segment = sites[0].manifest.segment(name)
            moved = before[segment.start : segment.stop] != after[segment.start : segment.stop]
            assert not moved.any() if rests in name else moved.any()
            assert (moves in name) != (rests in name)
        assert off(after, own) < 40 * unit
        for site in sites:
            after.tofile(site.root / "theta.f32")
    both = [after + np.random.default_rng(n).normal(size=after.size) * 0.05 for n in range(2)]
    assert off(np.mean(both, axis=0), both) > 1000 * unit


@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_train_from_the_folders_own(tmp_path, tied):
    step = {"optimizer": "sgd", "lr": 0.2, "max_steps": 2}
    site = base_site(tmp_path, local_step=step, tied=tied)
    model = plain_model(site)
    assert np.array_equal(flat(model, site), site.theta)
    delta = done(site, ask(site))

    encoder = encoder_of(site)
    corpus = index_corpus(site.data.train, encoder)
    text = PackedText(corpus, sequence_length=32, seed=3, encoder=encoder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for first in (0, 4):
        optimizer.zero_grad()
        rows = [tokens for p in range(first, first + 4) for tokens in [_row(text, p)]]
        (sum(nll(model, row) for row in rows) / sum(len(row) - 1 for row in rows)).backward()
        optimizer.step()
    text.close()
    np.testing.assert_allclose(delta, flat(model, site) - site.theta, atol=1e-6, rtol=0)


def _row(text: PackedText, position: int) -> list[int]:
    inputs, labels = text.sequence(position)
    known = labels != IGNORE
    return [*inputs[known].tolist(), int(labels[known][-1])]


@pytest.mark.parametrize("way", WAYS)
def test_private_adapters_match_a_plain_loop(tmp_path, monkeypatch, way):
    """FFA under ``record-local``: peft's gradients, one record at a time, clipped over B alone."""
    monkeypatch.setattr(private_step, "noised", without_noise)
    privacy = {"steps": 2, "clip_norm": 0.02, "max_sequences": 1 if way == "ghost" else 3}
    site = base_site(tmp_path, lora=LORA, private=True, privacy=privacy, local_step={"lr": 0.5})
    job = ask(site)
    delta = done(site, job, random_bytes=counted_bytes(), private_way=way)

    encoder, terms = encoder_of(site), site.plan.privacy
    records = Records(
        index_corpus(site.data.train, encoder),
        unit="document",
        max_sequences=terms.max_sequences,
        sequence_length=32,
        encoder=encoder,
    )
    model = plain_model(site)
    trained = [
        p
        for p, spec in zip(parameters_of(model, site), site.manifest.tensors, strict=True)
        if ".lora_B." in spec.name
    ]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for sample in samples_of(site, counted_bytes()):
        total = np.zeros(sum(p.numel() for p in trained))
        for number in sample:
            model.zero_grad()
            rows = tokens_of(records.read(number))
            (sum(nll(model, row) / (len(row) - 1) for row in rows) / len(rows)).backward()
            gradient = np.concatenate([p.grad.double().numpy().reshape(-1) for p in trained])
            total += clip(gradient, terms.clip_norm)
        at = 0
        for parameter in trained:
            piece = total[at : at + parameter.numel()] / terms.expected_batch
            parameter.grad = torch.from_numpy(piece.reshape(parameter.shape).astype(np.float32))
            at += parameter.numel()
        optimizer.step()
    wanted = np.concatenate([p.detach().numpy().reshape(-1) for p in trained])  # B began at zero

    report = site.result(job).private
    assert report.way == way
    assert report.clipped > 0
    assert np.abs(wanted).max() > 1e-4
    np.testing.assert_allclose(delta, wanted, atol=1e-6, rtol=0)


def test_the_base_is_in_bfloat16_and_the_adapters_are_not(tmp_path):
    site = base_site(tmp_path, lora=LORA | {"base_dtype": "bfloat16"})
    worker = Worker(site)
    job = ask(site)
    worker.answer()
    exact = base_site(tmp_path / "exact", lora=LORA)
    same = ask(exact)

    kinds = {
        ("lora" in name, parameter.dtype)
        for name, parameter in worker.trainer._model.module.named_parameters()
    }
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    found, wanted = site.delta(job), done(exact, same)
    assert 0 < np.abs(found - wanted).max() < 0.2 * np.abs(wanted).max()


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no folder", "no folder for it"),
        ("another digest", "the plan's base model is"),
        ("a changed file", "the plan's base model is"),
        ("pickles", "pickled weights are not read"),
        ("no config", "has no config.json"),
        ("no tokenizer", "the plan's base model is"),
    ],
)
def test_a_base_model_that_is_not_the_plans(tmp_path, what, words):
    site = base_site(tmp_path, lora=LORA)
    base, fields = site.extra["base"], {}
    if what == "no folder":
        fields = {"base": None}
    elif what == "another digest":
        fields = {"base": str(make_base(tmp_path / "other", seed=5))}
    elif what == "a changed file":
        done(site, ask(site))  # what was hashed once is hashed again when it was touched
        with (base / "config.json").open("a") as file:
            file.write(" ")
    elif what == "pickles":
        (base / "model.safetensors").rename(base / "pytorch_model.bin")
    elif what == "no config":
        (base / "config.json").unlink()
    else:
        (base / "tokenizer.json").unlink()
    job = ask(site, 1, **fields)
    Worker(site).answer()

    last = last_status(site.spool, job.id)
    assert (last.event, last.code) == ("failed", "model.base")
    assert words in last.message


def test_a_file_that_lacks_a_tensor_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    from node_agent.worker.model import ResidentModel
    from node_agent.worker.structure import FolderSource
    from protocols.plan_model import Lora
    from tests.support.training import ALONE

    base = make_base(tmp_path)
    tensors = load_file(str(base / "model.safetensors"))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, str(base / "model.safetensors"), metadata={"format": "pt"})
    source = FolderSource(open_folder(base), "0" * 64, Lora.model_validate(LORA))
    with pytest.raises(FolderError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        ResidentModel(source, select="none", ranks=ALONE)
    wrong = Lora.model_validate(LORA | {"targets": ["nothing"]})
    with pytest.raises(FolderError, match="targets"):
        FolderSource(open_folder(base), "0" * 64, wrong).build()


def test_a_folders_digest_is_of_what_counts(tmp_path, capsys):
    base = make_base(tmp_path)
    before = open_folder(base).digest()
    (base / "README.md").write_text("words")
    (base / "modeling_odd.py").write_text("raise SystemExit")
    assert open_folder(base).digest() == before
    assert folder_main([str(base)]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == before
    assert folder_main([str(tmp_path / "nowhere")]) == 3
    (base / "extra.safetensors").write_bytes(b"x")
    assert open_folder(base).digest() != before


# -- export --------------------------------------------------------------------------------------


def logits(model, tokens=(1, 40, 50, 60, 70)) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].float().numpy()


def exported(site, tmp_path, capsys, *, merge: bool = False):
    """The command, on a model whose factors are all moved."""
    theta = site.theta + np.random.default_rng(1).normal(size=site.theta.size) * 0.05
    at, out = tmp_path / "at", tmp_path / "out"
    at.mkdir()
    shutil.copy(site.root / "manifest.json", at)
    theta.astype("<f4").tofile(at / "theta.f32")
    arguments = ["--plan", str(tmp_path / "plan.json"), "--model", str(at), "--out", str(out)]
    if "base" in site.extra:
        arguments += ["--base", str(site.extra["base"])]
    capsys.readouterr()
    assert exporting.main([*arguments, *(["--merge"] if merge else [])]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert exporting.main(arguments) == 3  # never written over
    return theta.astype("<f4"), out, facts


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_are_exported_for_plain_tools(tmp_path, capsys, merge):
    site = base_site(tmp_path, lora=LORA)
    theta, out, facts = exported(site, tmp_path, capsys, merge=merge)
    model = plain_model(site)
    put(model, site, theta)
    if merge:
        loaded = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float32)
        assert AutoTokenizer.from_pretrained(str(out)).encode("minga")
    else:
        plain = AutoModelForCausalLM.from_pretrained(str(site.extra["base"]), dtype=torch.float32)
        untouched = logits(plain)
        loaded = PeftModel.from_pretrained(plain, str(out))
        assert np.abs(logits(loaded) - untouched).max() > 1e-3  # the adapters do something

    assert facts["kind"] == ("model" if merge else "adapter")
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-5)


@pytest.mark.parametrize("kind", ["bytes", "folder", "tied folder"])
def test_whole_models_are_exported_for_plain_transformers(tmp_path, capsys, kind):
    if kind == "bytes":
        site = make_site(tmp_path)
        value = site.plan.model_dump(mode="json", by_alias=True)
        (tmp_path / "plan.json").write_text(json.dumps(value))
    else:
        site = base_site(tmp_path, tied=kind != "folder")
    theta, out, facts = exported(site, tmp_path, capsys)
    loaded = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float32)

    assert facts["kind"] == "model"
    found = np.concatenate([p.detach().numpy().reshape(-1) for p in loaded.parameters()])
    assert np.array_equal(found, theta)


def test_an_export_of_another_model_is_refused(tmp_path):
    site = base_site(tmp_path, lora=LORA)
    other = make_site(tmp_path / "other")
    model = json.loads((tmp_path / "plan.json").read_text())["model"]
    with pytest.raises(FolderError):
        export(
            model, other.root, tmp_path / "a", base=make_base(tmp_path / "b", seed=3), merge=False
        )
    from node_agent.worker.structure import ModelError

    with pytest.raises(ModelError):
        export(model, other.root, tmp_path / "c", base=site.extra["base"], merge=False)


def test_the_first_model_of_a_plan_to_be(tmp_path, capsys):
    base = make_base(tmp_path / "base")
    plan = tmp_path / "plan.toml"
    targets = json.dumps(TARGETS)
    plan.write_text(
        f'[model]\nfamily = "huggingface"\nseed = 3\n'
        f"[model.lora]\nrank = 2\nalpha = 4.0\ntargets = {targets}\n"
    )
    out = tmp_path / "start"
    capsys.readouterr()
    assert init_main(["--plan", str(plan), "--base", str(base), "--out", str(out)]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])

    assert facts["base"] == open_folder(base).digest()
    theta = np.fromfile(out / "theta.f32", dtype="<f4")
    assert facts["coordinates"] == theta.size
    assert 0.4 < np.mean(theta == 0) < 0.7  # every B
    assert init_main(["--plan", str(plan), "--out", str(out)]) == 3
