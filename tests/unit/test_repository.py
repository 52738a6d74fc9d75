"""What the repository promises as a whole: its corpus, its documents, and what no file may hold."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "infra" / "demo" / "corpus"
SITES = {"ar-archivo": "es", "br-saude": "pt", "cl-leyes": "es", "pe-escuela": "es"}
PARTS = ("train", "valid")
# SHA-256 of the licence as its authors publish it, https://www.apache.org/licenses/LICENSE-2.0.txt
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
TARGETS = {"venv", "demo", "test", "bench", "bench-peers", "lint", "fmt", "proto", "clean"}


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


# -- corpus --------------------------------------------------------------------------------------


def documents(site: str, part: str) -> list[dict[str, str]]:
    """Every line of a file, parsed; a file that does not end its last line is refused."""
    text = (CORPUS / site / f"{part}.jsonl").read_text("utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def words(site: str) -> set[str]:
    text = " ".join(row["text"] for part in PARTS for row in documents(site, part))
    return set(re.findall(r"\w+", text.lower()))


def test_the_corpus_has_the_four_sites_and_nothing_else():
    found = {path.name for path in CORPUS.iterdir() if path.is_dir()}

    assert found == set(SITES)
    for site in SITES:
        assert {path.name for path in (CORPUS / site).iterdir()} == {"train.jsonl", "valid.jsonl"}
    assert "CC0 1.0" in (CORPUS / "SOURCES.md").read_text("utf-8")


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("part", PARTS)
def test_every_line_is_one_clean_document(site, part):
    for number, row in enumerate(documents(site, part), 1):
        where = f"{site}/{part}.jsonl:{number}"
        text = row["text"]
        assert set(row) == {"text", "lang"}, where
        assert row["lang"] == SITES[site], where
        assert 150 <= len(text) <= 600, where
        assert text == unicodedata.normalize("NFC", text).strip(), where
        assert not re.search(r"[\x00-\x1f\x7f\u00ad\u200b-\u200f\ufeff\ufffd]|  ", text), where


def test_the_corpus_has_the_size_that_its_page_says():
    sizes = {s: sum((CORPUS / s / f"{p}.jsonl").stat().st_size for p in PARTS) for s in SITES}
    page = (CORPUS / "SOURCES.md").read_text("utf-8")

    assert 90_000 <= sum(sizes.values()) <= 120_000
    assert all(size >= 20_000 for size in sizes.values())
    for site in SITES:
        train, valid = (len(documents(site, part)) for part in PARTS)
        assert 0.07 <= valid / (train + valid) <= 0.13
        assert re.search(rf"\| `{site}` \|.*\| {train} \| {valid} \|\n", page)


def repeated(texts: list[str], run: int = 8) -> set[str]:
    """Runs of ``run`` words that stand in more than one text."""
    seen: set[str] = set()
    twice: set[str] = set()
    for text in texts:
        tokens = re.findall(r"\w+", text.lower())
        runs = {" ".join(tokens[i : i + run]) for i in range(len(tokens) - run + 1)}
        twice |= runs & seen
        seen |= runs
    return twice


def test_no_document_repeats_another():
    """Held-out text is held out: train and valid share no run of eight words, nor do two sites."""
    texts = [row["text"] for site in SITES for part in PARTS for row in documents(site, part)]

    assert len(texts) == len(set(texts))
    assert repeated(texts) == set()


def test_a_repeated_sentence_is_found():
    """The oracle above can fail."""
    first, *_, last = (row["text"] for row in documents("cl-leyes", "train"))

    assert repeated([first, last]) == set()
    assert repeated([first, last, f"Nuevo comienzo. {first[:200]}"]) != set()


def test_the_sites_are_clearly_different():
    """Vocabularies of any two sites overlap by less than a third (Jaccard): non-IID data."""
    for one, other in itertools.combinations(SITES, 2):
        a, b = words(one), words(other)
        assert len(a & b) / len(a | b) < 1 / 3, (one, other)
    assert {"não", "saúde", "você"} <= words("br-saude")
    assert not {"não", "saúde", "você"} & words("ar-archivo")
    assert {"artículo", "plazo"} <= words("cl-leyes")
    assert {"ayllu", "chakra", "atuq"} <= words("pe-escuela")


# -- documents -----------------------------------------------------------------------------------


def test_the_licence_is_the_whole_apache_licence():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", read("Makefile"), flags=re.MULTILINE))


def shell_lines(name: str) -> list[str]:
    """The lines of the fenced ``sh`` blocks of a page, continued ones joined, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", read(name), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split(" # ")[0].strip() for line in lines if line and not line.startswith("#")]


def test_the_makefile_has_the_promised_targets():
    phony = set(re.findall(r"^\.PHONY: (.*)$", read("Makefile"), flags=re.MULTILINE)[0].split())

    assert makefile_targets() >= TARGETS
    assert phony >= TARGETS


def test_the_check_for_every_change_can_be_run():
    path = ROOT / ".ci" / "run"

    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_make_commands_of_the_readme_exist():
    named = {m[1] for line in shell_lines("README.md") if (m := re.match(r"make ([a-z-]+)", line))}

    assert {"demo", "test"} <= named
    assert named <= makefile_targets()


def resolve(line: str) -> list[str]:
    """Follow a ``minga`` line of a page down the real command tree; the parts it could not find.

    Stops at the first argument that is no group's command; options of the command reached must
    be its own.
    """
    from infra.cli import GROUPS, load_group, root_command

    words_ = line.split()
    command: click.Command = root_command()
    for position, word in enumerate(words_[1:], 1):
        if word.startswith("-"):
            break
        if not isinstance(command, click.Group):
            break
        if position == 1:
            if word not in GROUPS:
                return [word]
            command = load_group(word)
            continue
        below = command.commands.get(word)
        if below is None:
            return [word]
        command = below
    own = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    return [word for word in words_ if word.startswith("--") and word.split("=")[0] not in own]


def test_the_minga_commands_of_the_readme_exist():
    lines = [line.removeprefix(".venv/bin/") for line in shell_lines("README.md")]
    lines = [line for line in lines if line.startswith("minga ")]
    lines += re.findall(r"`(minga [^`]+)`", read("README.md"))

    assert len(lines) > 20
    assert {line: missing for line in lines if (missing := resolve(line))} == {}


def test_the_readme_leaves_no_command_out():
    from infra.cli import GROUPS, load_group

    for name in GROUPS:
        group = load_group(name)
        commands = group.commands if isinstance(group, click.Group) else {}
        for command in [f"minga {name} {child}" for child in commands] or [f"minga {name}"]:
            assert f"`{command}`" in read("README.md"), f"README.md does not name `{command}`"


def test_the_example_plan_is_a_plan():
    """Only what follows from the starting model and the federation is left out of it."""
    from protocols.plan import Plan

    written = tomllib.loads(read("docs/plan.example.toml"))
    written["federation"] = "andes"
    written["model"] |= {"manifest": "0" * 64, "initial": "0" * 64}

    assert Plan.from_value(written).total_rounds == 3


def test_the_private_example_is_a_plan_that_a_usual_budget_of_its_delta_affords():
    from infra.runs.plan_file import complete_secure_sum
    from policies.privacy.accounting import account_renyi
    from policies.privacy.claim import claim_of
    from protocols.plan import Plan

    written = tomllib.loads(read("docs/plan.private.example.toml"))
    written["federation"] = "andes"
    written["model"] |= {"manifest": "0" * 64, "initial": "0" * 64}
    keys = {name: f"{number:064x}" for number, name in enumerate(written["roster"])}
    complete_secure_sum(written, keys)
    plan = Plan.from_value(written)

    spent = account_renyi([claim_of(plan, 0, 26_912).charge().times(plan.rounds)], delta=1e-3)
    assert spent.epsilon < 8


def test_a_command_that_does_not_exist_is_found():
    """The oracle above can fail."""
    assert resolve("minga nonsense --dir x") == ["nonsense"]
    assert resolve("minga demo --nonsense x") == ["--nonsense"]


def changelog_versions(text: str) -> list[tuple[str, str]]:
    """(version, date or "Unreleased") of each release heading.

    Raises:
        ValueError: a heading that Keep a Changelog does not know.
    """
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    versions = []
    for line in text.splitlines():
        if line.startswith("## "):
            found = re.fullmatch(r"## \[(\d+\.\d+\.\d+)\] - (Unreleased|\d{4}-\d\d-\d\d)", line)
            if found is None:
                raise ValueError(f"not a release heading: {line}")
            versions.append((found[1], found[2]))
        elif line.startswith("### ") and line[4:] not in kinds:
            raise ValueError(f"not a kind of change: {line}")
    return versions


def test_the_changelog_is_kept():
    text = read("CHANGELOG.md")
    versions = changelog_versions(text)

    assert text.startswith("# Changelog\n")
    assert "keepachangelog.com" in text
    assert versions[0][0] == tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert versions == sorted(
        versions, key=lambda row: [*map(int, row[0].split("."))], reverse=True
    )


@pytest.mark.parametrize("line", ["## 0.2.0", "## [0.2] - Unreleased", "### Improved"])
def test_a_heading_that_is_no_changelog_heading_is_refused(line):
    with pytest.raises(ValueError, match="not a"):
        changelog_versions(f"# Changelog\n\n{line}\n")


# -- what no file may hold -----------------------------------------------------------------------

# Written in pieces, so that this file does not hold what it looks for.
_PATHS = ("wo" + "rk", "fa" + "rm", "opt/wh" + "eels", "opt/py" + "pi", "ro" + "ot/")
_HOSTS = ("py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org",
          "npm" + "js.org", "deb.deb" + "ian.org", "proxy.gol" + "ang.org")  # fmt: skip
_OPTIONS = ("index-" + "url", "find-" + "links", "trusted-" + "host")
FORBIDDEN = {
    "a path of one machine": re.compile(rf"(?<![\w.~-])/(?:{'|'.join(_PATHS)})(?![\w-])"),
    "a home folder": re.compile(r"(?<![\w.])/(?:ho" + r"me|Us" + r"ers)/\w+"),
    "a package-registry host": re.compile("|".join(map(re.escape, _HOSTS))),
    "a package-registry setting": re.compile(rf"(?:{'|'.join(_OPTIONS)})"),
}


def source_files() -> Iterator[Path]:
    """Tracked files and new ones that git does not ignore; without git, all but the ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        skip = re.compile(r"/(\.[^/]*|__pycache__|[^/]*\.egg-info|build|dist|demo-run[^/]*)/")
        paths = [p for p in ROOT.rglob("*") if not skip.search(f"/{p.relative_to(ROOT)}/")]
    yield from (path for path in paths if path.is_file())


def findings(text: str) -> list[str]:
    return [f"{what}: {m[0]}" for what, rule in FORBIDDEN.items() for m in rule.finditer(text)]


def test_no_file_names_a_machine_or_a_registry():
    files = list(source_files())
    bad = {}
    for path in files:
        found = findings(path.read_text("utf-8", errors="replace"))
        if found:
            bad[str(path.relative_to(ROOT))] = found

    assert len(files) > 50  # else nothing was looked at
    assert bad == {}


@pytest.mark.parametrize(
    "text",
    [
        "open('/wo" + "rk/main/x')",
        "cache=/opt/wh" + "eels",
        "/ro" + "ot/.cache",
        "/ho" + "me/ana/minga",
        "https://py" + "pi.org/simple",
        "pip install --extra-index-" + "url x",
    ],
)
def test_a_planted_path_or_host_is_found(text):
    """The rules above can fail."""
    assert findings(text)


def test_no_file_is_too_large_to_be_source():
    large = {str(path.relative_to(ROOT)) for path in source_files() if path.stat().st_size > 10**6}

    assert large == set()
