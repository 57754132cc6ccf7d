"""A torch DataLoader with the rows that `mikoshi train` reads, for `accelerate`, transformers' Trainer or a loop of one's own:
in the same order on any number of ranks, and resumed at the very next row.

A script for `accelerate launch`; any number of processes takes the same steps and resumes from another number's state:

    from pathlib import Path
    from accelerate import Accelerator
    from torch.optim import AdamW
    from transformers import AutoModelForCausalLM
    from mikoshi.trainer.config.run import load_config
    from mikoshi.trainer.interop.dataloader import training_batches

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = AutoModelForCausalLM.from_pretrained("model")
    batches = training_batches(load_config(Path("run.toml")))
    model, optimizer, batches = accelerator.prepare(model, AdamW(model.parameters(), lr=1e-3), batches)
    if Path("state").exists():
        accelerator.load_state("state")
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state("state")

With the Trainer, return the batches from `get_train_dataloader`, with
`micro_batches=self.args.gradient_accumulation_steps`; when it resumes a run it skips consumed batches by itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mikoshi.data.dataset.rows import IGNORED, Batch
from mikoshi.data.errors import DataError
from mikoshi.data.loader.loader import Loader
from mikoshi.data.loader.resume_state import DataResumePoint, TrainingLoader, first_digest, make_record
from mikoshi.data.loader.stream import StreamLoader
from mikoshi.parallel.layout import Coordinates, Layout
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.feed.feed import Feed, check_cache, dataset_locations, open_feed, recipes
from mikoshi.trainer.feed.streamed import hold_out


@dataclass(frozen=True)
class _Ranks:
    """This rank among those that read different rows.

    group: their process group; None means the whole group.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    def total(self, numbers: Tensor) -> Tensor:
        """Returns the sum over the ranks. Collective."""
        if self.world > 1:
            dist.all_reduce(numbers, group=self.group)
        return numbers

    def total_array(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        total: npt.NDArray[np.int64] = self.total(torch.from_numpy(numbers).to(self.device, copy=True)).cpu().numpy()
        return total


class _Sealed(Mapping[str, Any]):
    """A part of a step on its way to the DataLoader that opens it.

    Any other loader that would collate, split or dispatch such parts gets an error.
    """

    def __init__(self, rows: Batch, predicted: int | None) -> None:
        self.rows, self.predicted = rows, predicted

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            "training_batches: its dataset was given to another DataLoader (one's own, Trainer's train_dataset, or that of "
            "accelerate with dispatch_batches): every rank reads its own rows already: use the DataLoader that "
            "training_batches returns, which accelerator.prepare leaves as it is"
        )

    def __getitem__(self, key: str) -> Any:
        self._refuse()

    def __iter__(self) -> Iterator[str]:
        self._refuse()

    def __len__(self) -> int:
        self._refuse()


class _Parts(IterableDataset[_Sealed]):
    """This rank's rows of every step, in `count` parts a step.

    yielded: how many parts have been yielded.
    """

    def __init__(self, feed: Feed, ranks: _Ranks, count: int, flat: bool, documents: bool, start: int) -> None:
        self.feed, self.ranks, self.count, self.flat, self.documents = feed, ranks, count, flat, documents
        self.items = torch.ones(())
        self.reading: Generator[_Sealed, None, None] | None = None
        self.begin_at(start, feed.continued(None))

    def begin_at(self, step: int, continued: DataResumePoint, record: Mapping[str, Any] | None = None) -> None:
        """Continue with `step`, by the record of what was consumed before it, if there is one."""
        loader = _loader_of(self.feed, self.ranks, continued)
        if record is not None:
            loader.replay(record["state"], step)
        elif isinstance(loader, Loader):
            loader.resume_at(step, first_digest(self.feed.identity))
        elif step:
            raise ConfigError(f"start_step = {step}: a stream cannot leap ahead: give load_state_dict the state at that step")
        self.stop()
        self.loader, self.continued, self.begin, self.yielded = loader, continued, step, step * self.count

    def stop(self) -> None:
        if self.reading is not None:
            self.reading.close()
            self.reading = None

    def __len__(self) -> int:
        return max(0, self.feed.config.train.steps - self.begin) * self.count

    def __iter__(self) -> Iterator[_Sealed]:
        if get_worker_info() is not None:
            raise ConfigError(
                "training_batches: num_workers: the batches are read ahead by a thread of their own, data.prefetch of them: "
                "leave num_workers at 0"
            )
        if self.reading is not None:
            self.stop()
            if isinstance(self.loader, StreamLoader):  # it has read ahead
                step = self.yielded // self.count
                lanes = self.loader.state(step, self.ranks.total_array)["lanes"]
                self.loader.restart(step, np.array(lanes, dtype=np.int64))
        self.reading = self._read()
        return self.reading

    def _read(self) -> Generator[_Sealed, None, None]:
        config, (step, first) = self.feed.config, divmod(self.yielded, self.count)
        for rows in self.loader.stream(step, config.train.steps, ahead=config.data.prefetch):
            predicted = int(np.count_nonzero(rows.labels != IGNORED))
            cuts = np.linspace(0, len(rows.tokens), self.count + 1).astype(int).tolist()
            for part in range(first, self.count):
                self.yielded += 1
                yield _Sealed(rows.slice_rows(cuts[part], cuts[part + 1]), predicted if part == first else None)
            first = 0

    def open(self, sealed: _Sealed) -> dict[str, Any]:
        """Returns a part as arguments of a model. Collective in the first part of a step."""
        rows = sealed.rows
        counted = np.broadcast_to(np.arange(rows.tokens.shape[1]), rows.tokens.shape)
        positions = np.array(counted if rows.positions is None else rows.positions, dtype=np.int64)
        input_ids, shifted, position_ids = (
            _to_device(self.ranks.device, array) for array in (rows.tokens, rows.labels, positions)
        )
        if self.flat:
            input_ids, shifted, position_ids = (t.reshape(1, -1) for t in (input_ids, shifted, position_ids))
        if sealed.predicted is not None:
            total = self.ranks.total(torch.full((), sealed.predicted, device=self.ranks.device))  # without waiting for the GPU
            self.items = total.clamp(min=1).to(torch.float32) / (self.ranks.world * self.count)
        labels = torch.full_like(shifted, IGNORED)
        labels[:, 1:] = shifted[:, :-1]
        out = {"input_ids": input_ids, "labels": labels, "shift_labels": shifted, "position_ids": position_ids}
        if self.documents:
            out["document_ids"] = (position_ids == 0).cumsum(-1) - 1
        return {**out, "num_items_in_batch": self.items, "use_cache": False}


class TrainingBatches(DataLoader[Any]):
    """The DataLoader that `training_batches` returns.

    A new iterator continues where the one before stopped, and ends that one. `len` counts the batches from the beginning, or
    from where a state was loaded, to train.steps.
    """

    # Attributes that accelerate reads: each rank has its own batches already, and there is a state to save.
    _is_accelerate_prepared = True
    use_stateful_dataloader = True

    def __init__(self, parts: _Parts) -> None:
        # An own generator, so that iterating does not use torch's global one.
        super().__init__(
            parts,
            batch_size=None,
            collate_fn=parts.open,  # type: ignore[arg-type]  # without a batch size it is given each item
            generator=torch.Generator(),
        )
        self._parts = parts

    @property
    def micro_batches(self) -> int:
        """Batches in a step."""
        return self._parts.count

    @property
    def largest(self) -> int:
        """Rows in the largest batch."""
        rows = math.ceil(self._parts.feed.config.train.global_batch / self._parts.ranks.world)
        return math.ceil(rows / self._parts.count)

    def state_dict(self) -> dict[str, Any]:
        """Returns the record of the data that a checkpoint of `mikoshi train` holds, the same on every rank.

        It is plain values, for JSON or torch.save. Collective for a stream (data.stream). Raises DataError in the middle of a
        step.
        """
        parts, config = self._parts, self._parts.feed.config
        step, part = divmod(parts.yielded, parts.count)
        if part:
            raise DataError(
                f"data: {part} of the {parts.count} batches of step {step + 1} were used, whose gradients no state holds: save "
                "between steps, after optimizer.step()"
            )
        loader = replace(parts.loader, rank=0) if isinstance(parts.loader, Loader) else parts.loader
        record = make_record(loader, step, parts.feed.identity, parts.continued.history, parts.ranks.total_array)
        return {**record, "global_batch": config.train.global_batch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state, or from the record of `mikoshi train`, of any number of ranks and parts a step.

        It takes effect with the next iterator. Raises DataError if the data differs, and then changes nothing.
        """
        parts, train = self._parts, self._parts.feed.config.train
        if "samples" not in state_dict or "state" not in state_dict:
            raise DataError(f"data: a state of {', '.join(map(str, state_dict)) or 'nothing'} is not one of training_batches")
        samples, batch = int(state_dict["samples"]), int(state_dict.get("global_batch", train.global_batch))
        if batch != train.global_batch or samples % batch:
            raise DataError(
                f"train.global_batch = {train.global_batch}: the state after {samples} samples is of another: set it back"
            )
        if samples > train.steps * batch:
            raise DataError(f"train.steps = {train.steps}: the state is at step {samples // batch} already: raise train.steps")
        parts.begin_at(samples // batch, parts.feed.continued(state_dict), state_dict)


def training_batches(
    data: RunConfig | Feed,
    rank: int | None = None,
    world: int | None = None,
    start_step: int = 0,
    *,
    micro_batches: int | None = None,
    device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
    flat: bool = False,
    documents: bool = False,
) -> TrainingBatches:
    """This rank's part of the global batches of steps start_step..train.steps-1, as arguments of a causal language model of
    transformers 5: B rows of T = train.context tokens (`flat`: one row of B * T), on `device`.

    - `input_ids`, `position_ids`, int64 [B, T]. Positions begin anew with each document, by which eager and SDPA attention
      keep documents apart; they do so only with `use_cache` False, which is why it is among them. Flash attention does for a
      lone row only: use `flat`.
    - `shift_labels` [B, T]: of each position the token that follows, -100 where none is to be predicted. `labels`: the same
      one to the right, as transformers shifts them itself where it is given no other; a loop of one's own takes the former.
    - `num_items_in_batch`, float32: predicted tokens of the step over all ranks, divided by ranks and by batches a step. A
      model's loss is then such that the mean over the ranks and batches of a step, which DDP and `accelerate` make of the
      gradients, is the loss a predicted token of the whole global batch, however unevenly its tokens are spread.
    - `documents`: also `document_ids` [B, T], which number the documents of a row from 0.

    A step comes in `micro_batches` batches: by default as many as `accelerate` accumulates gradients over, and where that
    is not set up, of train.micro_batch rows at most. `rank` of `world` are those that read different rows, `group` their
    process group: by default those of `accelerate`, of torch.distributed, or one rank. `device`: by default accelerate's, or
    the CPU. Without a state to load, `start_step` begins with a later step.

    Iterating is collective. Raises ConfigError for what cannot be and DataError for data that is not there.
    """
    if isinstance(data, RunConfig):
        if data.data.stream:
            hold_out(data, recipes(data.data), dataset_locations(data.data))
        data = open_feed(data)
        check_cache(data)
    config = data.config
    if not 0 <= start_step <= config.train.steps:
        raise ConfigError(f"start_step = {start_step}: give one of 0 to train.steps, {config.train.steps}")
    ranks = _ranks(rank, world, device, group)
    count = _count(config, -(-config.train.global_batch // ranks.world), micro_batches)
    return TrainingBatches(_Parts(data, ranks, count, flat, documents, start_step))


def _loader_of(feed: Feed, ranks: _Ranks, continued: DataResumePoint) -> TrainingLoader:
    """The loader of a rank where all ranks read different rows."""
    coordinates = Coordinates(pp=0, replica=0, shard=ranks.rank, cp=0, tp=0, data=ranks.rank)
    return feed.loader(Layout(shards=ranks.world), coordinates, continued)


def _ranks(rank: int | None, world: int | None, device: torch.device | str | None, group: dist.ProcessGroup | None) -> _Ranks:
    state = _accelerate("PartialState")
    if device is None:
        nccl = dist.is_initialized() and dist.get_backend(group) == "nccl"
        device = state.get("device") or (torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu")
    if (rank is None) != (world is None):
        raise ConfigError(f"rank = {rank}, world = {world}: give both or neither")
    if rank is None or world is None:
        parallelism = _accelerate("AcceleratorState").get("parallelism_config")
        if group is None and parallelism is not None and parallelism.non_data_parallel_size > 1:
            raise ConfigError(
                "training_batches: by accelerate's parallelism_config several ranks read the same rows: give the rank, world "
                "and group of those that read different ones"
            )
        rank, world = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
        if group is None and state.get("num_processes", world) != world:
            raise ConfigError(
                f"training_batches: accelerate knows of {state['num_processes']} processes and torch.distributed of {world}: "
                "give rank and world"
            )
    if not 0 <= rank < world:
        raise ConfigError(f"rank = {rank}: of world = {world} it must be one of 0 to {world - 1}")
    group_size = dist.get_world_size(group) if dist.is_initialized() else 1
    if world > 1 and group_size != world:
        raise ConfigError(
            f"world = {world}: the process group is of {group_size}, and the tokens of a step are counted over all ranks "
            "that read different rows: give their group, and begin it before"
        )
    return _Ranks(rank, world, torch.device(device), group)


def _count(config: RunConfig, rows: int, requested: int | None) -> int:
    """Returns how many parts a rank's rows of a step are split into."""
    accumulated: int | None = _accelerate("GradientState").get("plugin_kwargs", {}).get("num_steps")
    most = config.train.micro_batch or rows
    name = "micro_batches" if requested is not None else "gradient_accumulation_steps"
    count = requested if requested is not None else accumulated or -(-rows // most)
    if requested is not None and accumulated not in (None, 1, requested):  # the Trainer sets 1 and accumulates by itself
        raise ConfigError(
            f"micro_batches = {requested}: accelerate's gradient_accumulation_steps is {accumulated}: leave one out"
        )
    if not 1 <= count <= rows:
        raise ConfigError(f"{name} = {count}: a rank has {rows} rows of train.global_batch: give 1 to {rows}")
    if -(-rows // count) > most:
        raise ConfigError(
            f"{name} = {count}: batches of {-(-rows // count)} of a rank's {rows} rows, more than train.micro_batch {most}: "
            f"give {-(-rows // most)}"
        )
    return count


def _to_device(device: torch.device, array: npt.NDArray[np.int64]) -> Tensor:
    """Returns an array on the device; from pinned memory it is copied while the GPU computes."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _accelerate(name: str) -> Mapping[str, Any]:
    """Returns one of accelerate's shared states; empty if accelerate is not in use."""
    state = getattr(sys.modules.get("accelerate.state"), name, None)
    shared: Mapping[str, Any] = getattr(state, "_shared_state", {})
    return shared
