"""Plans that train a model from a folder: which tensors of which round, and what is refused."""

from __future__ import annotations

import pytest

from infra.runs.plan_file import complete_adapters, complete_plan, read_initial_model
from protocols.errors import MalformedMessageError
from protocols.identifiers import FederationId
from protocols.plan import Plan
from protocols.tensors.manifest import Manifest, TensorSpec
from tests.support.plans import plan_value

A = ("model.layers.0.q_proj.lora_A.weight", "model.layers.1.q_proj.lora_A.weight")
B = ("model.layers.0.q_proj.lora_B.weight", "model.layers.1.q_proj.lora_B.weight")
NAMES = (A[0], B[0], A[1], B[1])
LORA = {"factors": "ffa", "rank": 8, "alpha": 16.0, "targets": ["q_proj"]}


def value(lora=None, *, trainable=NAMES, rounds=3, **model):
    made = {"family": "huggingface", "manifest": "1" * 64, "initial": "2" * 64, "base": "3" * 64}
    made |= model
    if lora is not None:
        made["lora"] = LORA | lora
    found = plan_value(model=made, rounds=rounds, evaluation={"languages": ["es"]})
    if trainable is not None:
        found["trainable"] = list(trainable)
    return found


@pytest.mark.parametrize(
    ("factors", "rounds"),
    [("ffa", [B, B, B]), ("rolora", [B, A, B]), ("fedit", [NAMES, NAMES, NAMES])],
)
def test_each_round_trains_its_factors(factors, rounds):
    """B first: while it is zero, A has no gradient."""
    plan = Plan.from_value(value({"factors": factors}))

    assert [plan.selection_in(number) for number in range(3)] == rounds
    assert plan.selection_in(3) == "none"  # the evaluation after the last round
    assert Plan.from_bytes(plan.to_bytes()) == plan


def test_without_adapters_nothing_changes():
    plan = Plan.from_value(value(trainable=None))
    assert plan.selection_in(0) == plan.selection_in(1) == "all"


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (value({}, trainable=None), "names its tensors"),
        (value({}, trainable=[*NAMES, "lm_head.weight"]), "no factor of an adapter"),
        (value({}, trainable=A), "needs .lora_B. tensors"),
        (value({"factors": "rolora"}, trainable=B), "needs .lora_A. tensors"),
        (value({"factors": "flora"}), "factors"),
        (value({"rank": 0}), "rank"),
        (value({"targets": ["v_proj", "q_proj"]}), "ascending"),
        (value({"targets": []}), "targets"),
        (value({"base_dtype": "int8"}), "base_dtype"),
        (value({}, base=None), "model.base is given exactly"),
        (value(trainable=None, config={"hidden_size": 8}), "folder's config.json"),
        (value({}, family="llama", base=None), "needs family huggingface"),
        (value(trainable=None, family="vector"), "model.base is given exactly"),
    ],
)
def test_refused(made, words):
    with pytest.raises(MalformedMessageError, match=words):
        Plan.from_value(made)


@pytest.mark.parametrize(
    ("mode", "factors"),
    [("open", "rolora"), ("aggregate-only", "rolora"), ("record-local", "ffa")],
)
def test_what_a_person_need_not_type(mode, factors):
    """FFA where there is noise: its noise is linear. Elsewhere RoLoRA, which moves both factors."""
    manifest = Manifest(tuple(TensorSpec(name, (2, 2)) for name in NAMES))
    model = {"lora": {"rank": 2}}
    fields = {"mode": mode, "model": model}
    complete_adapters(fields, model, manifest)
    assert model["lora"]["factors"] == factors
    assert fields["trainable"] == list(NAMES)

    typed = {"lora": {"factors": "fedit"}}
    fields = {"mode": mode, "model": typed, "trainable": ["x"]}
    complete_adapters(fields, typed, manifest)
    assert (typed["lora"]["factors"], fields["trainable"]) == ("fedit", ["x"])
    plain = {"mode": mode}
    complete_adapters(plain, {}, manifest)
    assert plain == {"mode": mode}


def test_a_policy_lists_the_folder_under_adapters_and_else_the_snapshot():
    """The whole weights of a run are pinned by its snapshot, whatever folder they came from."""
    assert Plan.from_value(value({})).model.listed == "3" * 64
    assert Plan.from_value(value(trainable=None)).model.listed == "2" * 64


def test_a_plan_is_completed_from_a_snapshot_of_adapters(tmp_path):
    manifest = Manifest(tuple(TensorSpec(name, (2, 3)) for name in NAMES))
    (tmp_path / "manifest.json").write_bytes(manifest.to_bytes())
    (tmp_path / "theta.f32").write_bytes(bytes(4 * manifest.coordinates))
    model = {"family": "huggingface", "base": "3" * 64}
    model["lora"] = {name: LORA[name] for name in ("rank", "alpha", "targets")}
    written = {
        "run": "r1",
        "roster": ["a", "b"],
        "min_participants": 2,
        "rounds": 2,
        "model": model,
    }
    plan = complete_plan(written, read_initial_model(tmp_path), FederationId("demo")).plan

    assert plan.model.lora.factors == "rolora"
    assert (plan.selection_in(0), plan.selection_in(1)) == (B, A)
    assert "factors" not in model["lora"]  # what was written is not changed
