"""One page for people who decide, made from an audit."""

from __future__ import annotations

from pathlib import Path

from infra.audit.loading import Loaded
from infra.audit.mirror import write_file
from infra.audit.recompute import Recomputed, Recomputer
from infra.audit.report.facts import gather_facts
from infra.audit.report.page import page
from infra.audit.report.words import Lang


def write_report(loaded: Loaded, out: Path, *, lang: Lang, recompute: bool) -> None:
    """Write the page.

    Args:
        loaded: the log with its audit.
        out: file; an older page is replaced.
        lang: shown first.
        recompute: make every model again first, where blobs are at hand.
    """
    made: list[Recomputed] = []
    folder = loaded.places.blob_folder
    if recompute and folder is not None and loaded.audit.first is None:
        work = Recomputer(loaded.audit.evidence, folder, loaded.places.upload_folder)
        made = list(work.rounds())
    text = page(loaded, gather_facts(loaded), made, lang=lang)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, text.encode())
