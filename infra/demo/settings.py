"""What a demonstration was asked to do, kept in its folder so that it can be resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from protocols.errors import ConfigurationError, ExistsError, NotFoundError

SCHEMA: Final = "minga.demo/1"
_FILE: Final = "demo.json"

Mode = Literal["open"]
NodePhase = Literal["training", "uploading"]
CoordinatorPhase = Literal["open", "training", "uploading", "released"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The terms of one demonstration; fixed for its folder."""

    sites: tuple[str, ...]  # ascending
    rounds: int  # training rounds
    mode: str
    two_ranks: int  # how many of the sites train with two processes
    data: str  # folder the text was copied from

    def ranks(self, site: str) -> int:
        """Training processes of a site."""
        return 2 if self.sites.index(site) < self.two_ranks else 1


def claim_folder(folder: Path, *, resume: bool) -> Settings | None:
    """Whether a demonstration may use ``folder``, and what it was begun with.

    Returns:
        The settings to go on with; None for a new demonstration.

    Raises:
        ExistsError: there is something and ``resume`` was not asked for.
        NotFoundError: ``resume`` was asked for and there is nothing.
        ConfigurationError: what is there is not a demonstration.
    """
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if not used and resume:
        raise NotFoundError(f"{folder} holds no demonstration to resume")
    if not used:
        return None
    if not (folder / _FILE).exists():
        if resume:
            raise ConfigurationError(f"{folder} is not the folder of a demonstration")
        raise ExistsError(f"{folder} exists and is not empty; choose another folder with --dir")
    if not resume:
        raise ExistsError(
            f"{folder} exists: go on with it by --resume, choose another folder with --dir, or "
            "remove it"
        )
    return _read(folder / _FILE)


def write_settings(folder: Path, settings: Settings) -> None:
    """Begin a demonstration in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    value = {"schema": SCHEMA, **asdict(settings)}
    temporary = folder / f".{_FILE}.tmp"
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(folder / _FILE)


def _read(path: Path) -> Settings:
    try:
        value: Any = json.loads(path.read_text("utf-8"))
        if value.pop("schema") != SCHEMA:
            raise ConfigurationError(f"{path} is of another version of the demonstration")
        return Settings(**{**value, "sites": tuple(value["sites"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
