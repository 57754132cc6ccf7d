"""Checkpoints: whole, verified and committed by one rename, or not there at all; restored by any world size.

    step-00000030/
        rank-00000.safetensors ...  each rank's pieces of the state, every piece once
        manifest.json               sizes and SHA-256 of the files, where each piece of each tensor lies, the run's record

The pieces are planned by torch.distributed.checkpoint (DCP), which also maps them onto another layout when loading;
reading and writing is ours, so that nothing on disk is a pickle. Every function named collective is called by all
ranks together.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_planned
from torch.distributed.checkpoint.state_dict_saver import save as save_planned
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from data.atomic import commit_folder, flush, partial_path, write_file
from trainer.errors import USER_ERRORS, CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `record` is what the run wants to find again, plain JSON: step, config, data fingerprint.

    files: name -> size and SHA-256. tensors: canonical name -> dtype, shape and pieces (offset, shape, file, key).
    """

    record: dict[str, Any]
    files: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]

    @property
    def step(self) -> int:
        return int(self.record["step"])


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def steps_in(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first. A partial one, being hidden, is not among them."""
    return sorted(folder.glob("step-????????"), reverse=True)


def save(folder: Path, step: int, state: dict[str, Tensor], record: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`. Collective.

    Raises CheckpointError on every rank if any rank could not write; nothing half-written is left.
    """
    target = step_folder(folder, step)
    partial = partial_path(target)

    def begin() -> None:
        if target.exists():
            raise CheckpointError(f"{target} exists already; a checkpoint is never written over another")
        for stale in folder.glob(partial_path(folder / "step-*").name):
            shutil.rmtree(stale, ignore_errors=True)  # what a killed save or removal left behind
        partial.mkdir(parents=True)

    writer = _Writer(partial)
    try:
        on_first_rank(begin)
        save_planned(state, storage_writer=writer, planner=DefaultSavePlanner())
        on_first_rank(lambda: _finish(target, writer, {**record, "step": step}))
    except BaseException as error:
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (CheckpointException, OSError)):
            raise CheckpointError(
                f"{target}: the checkpoint could not be written: {_cause(error)}; nothing was left behind"
            ) from None
        raise
    on_first_rank(lambda: _prune(folder, keep))
    return target


def _finish(target: Path, writer: _Writer, record: dict[str, Any]) -> None:
    content = {"format": FORMAT, "record": record, "files": writer.files, "tensors": writer.tensors}
    body = json.dumps(content, separators=(",", ":"))
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_file(partial_path(target) / MANIFEST, f'{{"sha256":"{digest}","content":{body}}}\n'.encode())
    commit_folder(target)


def _prune(folder: Path, keep: int) -> None:
    for old in steps_in(folder)[keep:]:
        gone = partial_path(old)
        old.rename(gone)  # first out of sight, so that a kill in between leaves no torn checkpoint
        shutil.rmtree(gone, ignore_errors=True)  # what a reader still holds open goes before the next save


def newest_valid(folder: Path, set_aside: bool = True) -> tuple[Path, Manifest, list[str]] | None:
    """The newest checkpoint that verifies, and why newer ones did not. Collective: the ranks share out the files.

    The ones refused are renamed to damaged-..., unless `set_aside` is False, for a reader beside a live run. None when
    there is none at all. Raises CheckpointError when there are some and none is valid; those are left as they are.
    """
    rejected: dict[str, str] = {}
    for name in on_first_rank(lambda: [path.name for path in steps_in(folder)]):
        problem = _verdict(folder / name)
        if problem is None:
            if set_aside:
                on_first_rank(lambda: _set_aside(folder, list(rejected)))
            return folder / name, read_manifest(folder / name), list(rejected.values())
        rejected[name] = problem
    if rejected:
        reasons = "; ".join(rejected.values())
        raise CheckpointError(f"{folder}: no valid checkpoint is left: {reasons}; remove the folder to start from step 0")
    return None


def _set_aside(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).rename(_free(folder / f"damaged-{name}"))


def _verdict(path: Path) -> str | None:
    """What is wrong with a checkpoint, found by all ranks together, each reading its share of the bytes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine: str | None = None
    try:
        verify(path, rank, world)
    except CheckpointError as error:
        mine = str(error)
    except FileNotFoundError:  # removed under a reader's eyes by the run that owns it
        mine = f"{path}: missing"
    verdicts: list[str | None] = [mine]
    if world > 1:
        verdicts = [None] * world
        dist.all_gather_object(verdicts, mine)
    return next((v for v in verdicts if v is not None), None)


def _free(path: Path) -> Path:
    candidates = (path if n == 0 else path.with_name(f"{path.name}.{n}") for n in range(10_000))
    return next(p for p in candidates if not p.exists())


def read_manifest(path: Path) -> Manifest:
    """Parse and check manifest.json. Raises CheckpointError if it is missing, altered or of another format."""
    file = path / MANIFEST
    try:
        outer = json.loads(file.read_text())
        content = outer["content"]
        body = json.dumps(content, separators=(",", ":"))
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            raise CheckpointError(f"{file}: altered: its content does not match its own digest")
        if content["format"] != FORMAT:
            raise CheckpointError(f"{file}: format {content['format']} is not {FORMAT}: made by another version")
        return Manifest(content["record"], content["files"], content["tensors"])
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{file}: missing") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: damaged: {error}") from None


def verify(path: Path, share: int = 0, shares: int = 1) -> Manifest:
    """Compare every byte with the manifest, or of `shares` parts of the files only number `share`.

    Raises CheckpointError that names the first file that differs, is missing, or is there without being listed.
    """
    manifest = read_manifest(path)
    there = {p.name for p in path.iterdir()} - {MANIFEST}
    if stray := sorted(there - manifest.files.keys()):
        raise CheckpointError(f"{path / stray[0]}: not in the manifest")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda item: _verify_file(path, *item), sorted(manifest.files.items())[share::shares]))
    return manifest


def _verify_file(path: Path, name: str, expected: dict[str, Any]) -> None:
    file = path / name
    if Path(name).name != name:
        raise CheckpointError(f"{path / MANIFEST}: {name!r} is not the name of a file in the checkpoint")
    if file.is_symlink() or not file.is_file():
        raise CheckpointError(f"{file}: missing")
    if file.stat().st_size != expected["size"]:
        raise CheckpointError(f"{file}: has {file.stat().st_size} bytes, the manifest says {expected['size']}")
    with file.open("rb") as content:
        same = hashlib.file_digest(content, "sha256").hexdigest() == expected["sha256"]
    if not same:
        raise CheckpointError(f"{file}: altered: its bytes do not match the manifest's SHA-256")


def load(path: Path, manifest: Manifest, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place, whatever layout saved them. Collective if a process group exists.

    `state` may be a part of what was saved. Call newest_valid or verify first: this trusts the bytes. Raises
    CheckpointError for a tensor that the checkpoint lacks or holds in another shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load_planned(state, storage_reader=_Reader(path, manifest), planner=DefaultLoadPlanner())
    except (CheckpointException, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {_cause(error)}") from None


def on_first_rank(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its (JSON-like) result on all; what it raises is raised on all. Collective."""
    if not dist.is_initialized():
        return action()
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [("done", action())]
        except (*USER_ERRORS, OSError) as error:
            answer = [("failed", error)]
    dist.broadcast_object_list(answer, src=0)
    outcome, value = answer[0]
    if outcome == "failed":
        raise value
    return value


def _cause(error: BaseException) -> str:
    """The one line that matters of an error, dug out of DCP's collection of every rank's."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {_cause(inner)}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@dataclass
class _Writer(StorageWriter):
    """DCP's writer: each rank's planned pieces as one safetensors file, flushed and digested."""

    folder: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        pieces: dict[str, Tensor] = {}
        for item in plan.items:
            data = planner.resolve_data(item)
            if not isinstance(data, Tensor):
                raise CheckpointError(f"{item.index.fqn}: only tensors are saved, not {type(data).__name__}")
            pieces[_key(item.index)] = data.detach().cpu().contiguous()
        name = f"rank-{dist.get_rank() if dist.is_initialized() else 0:05d}.safetensors"
        stamp: dict[str, Any] = {}
        if pieces:
            try:
                save_file(pieces, self.folder / name)
            except SafetensorError as error:
                raise OSError(f"{name}: {error}") from None
            (self.folder / name).chmod(0o666 & ~_umask())  # safetensors makes it private; the rest of a run is not
            flush(self.folder / name)
            with (self.folder / name).open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            stamp = {"size": (self.folder / name).stat().st_size, "sha256": digest}
        where = (name, stamp)
        done.set_result([WriteResult(item.index, pieces[_key(item.index)].nbytes, where) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        where = {result.index: result.storage_data for rank in results for result in rank}
        self.files.update(dict(where.values()))
        for name, meta in metadata.state_dict_metadata.items():
            assert isinstance(meta, TensorStorageMetadata)
            pieces = []
            for chunk in meta.chunks:
                index = MetadataIndex(name, chunk.offsets)
                piece = {"offset": list(chunk.offsets), "shape": list(chunk.sizes), "file": where[index][0]}
                pieces.append(piece)
            dtype = str(meta.properties.dtype).removeprefix("torch.")
            self.tensors[name] = {"dtype": dtype, "shape": list(meta.size), "pieces": pieces}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _key(index: MetadataIndex) -> str:
    """Name of a piece in its file: the tensor's, and where in it the piece begins."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


@dataclass
class _Reader(StorageReader):
    """DCP's reader: the index comes from the manifest, the pieces from memory-mapped safetensors files."""

    folder: Path
    manifest: Manifest

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors = {}
        for name, entry in self.manifest.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(p["offset"]), torch.Size(p["shape"])) for p in entry["pieces"]]
            properties = TensorProperties(dtype=_dtype(entry["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(tensors)  # type: ignore[arg-type]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self._file_of(item.storage_index), []).append(item)
        for name, items in by_file.items():
            with safe_open(self.folder / name, framework="pt") as file:
                for item in items:
                    piece = file.get_slice(_key(item.storage_index))
                    box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    values = piece[box] if box else file.get_tensor(_key(item.storage_index))
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(values)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _file_of(self, index: MetadataIndex) -> str:
        offset = list(index.offset or ())
        pieces = self.manifest.tensors[index.fqn]["pieces"]
        return next(str(p["file"]) for p in pieces if p["offset"] == offset)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{name!r} is not a dtype")
    return dtype
