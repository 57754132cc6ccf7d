"""The resume state of a run's data: one small record, the same whatever the ranks, against which a resumed run is checked.

It holds what determines the order, the number of samples consumed, a digest of them, one of a few steps earlier from which the
last steps are replayed, and one of the tokens of the last batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mikoshi.data.errors import DataError
from mikoshi.data.io.record_fields import checked_int
from mikoshi.data.loader.loader import Loader
from mikoshi.data.loader.stream import StreamLoader
from mikoshi.data.sampling.curriculum import MixtureHistory, MixtureRequest, check_skips, new_history, read_history

TrainingLoader = Loader | StreamLoader
SumOverRanks = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
"""Adds numbers up over the ranks, those that read the same rows counted once."""

Identity = dict[str, Any]
"""What may not change in a run, by the name of its key or source: seed, row length, fingerprints."""


@dataclass(frozen=True)
class DataResumePoint:
    """Where a run resumes: the history of its mixture, and the user's changes in words."""

    history: MixtureHistory
    changes: tuple[str, ...] = ()


def first_digest(identity: Identity) -> str:
    """The digest before the first sample."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def make_record(
    loader: TrainingLoader, step: int, identity: Identity, history: MixtureHistory, total: SumOverRanks
) -> dict[str, Any]:
    """The record after `step` steps, which the loader has read or resumed from. Collective if `total` is."""
    samples = step * loader.global_batch
    return {
        "samples": samples,
        "position": int(loader.skips.positions(np.array([samples]))[0]),
        "identity": identity,
        "curriculum": history.record(),
        "skipped": [list(span) for span in loader.skips.spans],
        "state": loader.state(step, total),
    }


def resume_from_record(
    record: Mapping[str, Any] | None,
    identity: Identity,
    request: MixtureRequest,
    skipped: tuple[tuple[int, int], ...],
    accept: bool,
) -> DataResumePoint:
    """How a run resumes from a checkpoint's record (None: it begins) under the mixture that its config requests now.

    accept: allow a changed mixture.

    Raises DataError naming the difference if the data is not the same, if the mixture changed without `accept`, or if consumed
    samples would be skipped.
    """
    if record is None:
        return DataResumePoint(new_history(request))
    identity_before, history = record["identity"], read_history(record["curriculum"])
    _check_identity(identity_before, identity, accept)
    samples = checked_int(record["samples"], "samples")
    position = checked_int(record["position"], "position", samples)
    old = [(checked_int(start, "skipped"), checked_int(stop, "skipped", start)) for start, stop in record["skipped"]]
    check_skips(old, skipped, position)
    changes = []
    if old != list(skipped):
        changes.append(f"data.skip: {[list(s) for s in skipped]}, was {record['skipped']}")
    if history.requests[-1][1] != request:
        description = f"the mixture is {_describe(request)}, was {_describe(history.requests[-1][1])}"
        if not accept:
            raise DataError(
                f'data.mixture: {description}: set it back, or change it from sample {samples} on with data.on_change="accept"'
            )
        history = history.with_change(request, position)
        changes.append(f"from position {position} {description}")
    return DataResumePoint(history, tuple(changes))


def _check_identity(was: Identity, now: Identity, accept: bool) -> None:
    sources_was, sources_now = was["sources"], now["sources"]
    for key in dict.fromkeys([*was, *now]):
        if key == "data.tokenizer" and was[key] != now[key]:
            raise DataError(
                f"{key}: the data's tokenizer is not the one that the run was begun with (fingerprint {_short(now[key])}, was "
                f"{_short(was[key])}): give the same data, or another run.name"
            )
        if key != "sources" and was.get(key) != now.get(key):
            raise DataError(f"{key} = {_short(now.get(key))}: the run was begun with {_short(was.get(key))}: set it back, or "
                            "give another run.name")  # fmt: skip
    for name in dict.fromkeys([*sources_was, *sources_now]):
        before, after = sources_was.get(name), sources_now.get(name)
        what = f"data.mixture.{name}" if name else "data.path"
        if before and after and before != after:
            raise DataError(
                f"{what}: the data is not what the run was begun with (fingerprint {after[:12]}, was {before[:12]}): give the "
                "same data, or another run.name"
            )
        if (before is None or after is None) and not accept:
            raise DataError(
                f"{what}: a source that {'is new' if before is None else 'is gone'}: set it back, or change the mixture from "
                'here on with data.on_change="accept"'
            )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _describe(request: MixtureRequest) -> str:
    stages = "; ".join(
        (f"from {start}: " if len(request.stages) > 1 else "") + ", ".join(f"{n} {w:g}" for n, w in weights.items())
        for start, weights in request.stages
    )
    caps = ", ".join(f"{n} at most {c}" for n, c in request.caps.items() if c is not None)
    return stages + (f" ({caps} samples)" if caps else "")
