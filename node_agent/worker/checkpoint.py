"""Tensors of a worker on disk: torch.distributed.checkpoint, each rank its own part.

A tensor that is spread over ranks is written as the whole it is part of, so another number of
ranks can read it back; what every rank holds alike is written once. Files are synced before
``write`` returns.

The library describes a checkpoint in a pickle. Ours is read with a list of the few classes that
such a description is made of: a folder that somebody else wrote must not run code here.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from node_agent.resident import JobFailedError
from node_agent.worker.distributed import Ranks

Like = Callable[[str], Tensor]  # name of a parameter -> the parameter, whole or sharded

_DESCRIPTION: Final = frozenset(
    {
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch", "float32"),
        ("torch", "float64"),
        ("torch", "bfloat16"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }
)


class _Description(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _DESCRIPTION:
            raise pickle.UnpicklingError(f"a checkpoint is not described by {module}.{name}")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Description(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def write(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write tensors, all ranks together.

    Args:
        folder: exists and is empty.
        tensors: by key; DTensors and plain ones, the same keys on every rank.
        ranks: this process among its peers.

    Raises:
        JobFailedError: storage: on every rank, if one cannot write.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "assuming a single process": it is one
            save(
                dict(tensors),
                storage_writer=FileSystemWriter(folder),
                process_group=ranks.control,
                no_dist=not ranks.sharded,
            )
    except (CheckpointException, OSError, RuntimeError) as error:
        raise JobFailedError("storage", f"the state cannot be written: {_first(error)}") from None


def _first(error: BaseException) -> str:
    """What went wrong, of a library's error that collects those of all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"


def keys(folder: Path) -> dict[str, tuple[int, ...]]:
    """What a checkpoint holds: the shape of each tensor by its key.

    Raises:
        Exception: whatever an unreadable description makes the readers raise.
    """
    described = _Reader(folder).read_metadata().state_dict_metadata
    return {
        key: tuple(value.size)
        for key, value in described.items()
        if isinstance(value, TensorStorageMetadata)
    }


def read(folder: Path, into: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill tensors from a checkpoint, all ranks together.

    Args:
        folder: of the checkpoint.
        into: by key; sharded as this worker shards them, whoever wrote them.
        ranks: this process among its peers.

    Raises:
        Exception: whatever damaged files make the library raise, on every rank.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            load(
                dict(into),
                storage_reader=_Reader(folder),
                process_group=ranks.control,
                no_dist=not ranks.sharded,
            )
    except CheckpointException as error:  # not an Exception by descent
        raise ValueError(_first(error)) from None


def spread(local: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor, as the part of the whole it is; no copy.

    Args:
        local: what this rank holds; a number that all ranks hold has no dimensions.
        like: a parameter that is spread in the same way.
    """
    if not isinstance(like, DTensor) or local.ndim == 0:
        return local
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def empty(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Room for a tensor of a checkpoint: what to read into, and this rank's part of it.

    Raises:
        ValueError: the parameter has another shape.
    """
    device = like.device
    if not shape:
        box = torch.zeros((), dtype=torch.float32, device=device)
        return box, box
    if shape != tuple(like.shape):
        raise ValueError(f"a tensor of shape {shape} where one of {tuple(like.shape)} belongs")
    mine = like.detach()
    local = torch.zeros_like(mine.to_local() if isinstance(mine, DTensor) else mine)
    return spread(local, like), local
