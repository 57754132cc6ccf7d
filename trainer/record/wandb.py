"""Sends the metrics to Weights & Biases, in agreement with metrics.jsonl; an outage there never ends the run."""

from __future__ import annotations

import configparser
import hashlib
import json
import netrc
import os
import queue
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mikoshi.data.io.atomic import write_file
from mikoshi.trainer.config.run import RunConfig, to_toml
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.record.run_folder import RunFolder, tolerate_full_disk

_HOST = "https://api.wandb.ai"
_MAX_QUEUED = 20_000
"""Records that wait for a server which does not answer; of more, the newest are left out."""

_FINISH = 30.0
"""Seconds that the end of a run waits for what is not sent yet, at most, and a part of recovery.grace."""


def check_key(
    project: str, env: Mapping[str, str], home: Path | None, way: str = "set WANDB_API_KEY, or run `wandb login`"
) -> None:
    """Raises ConfigError where W&B would ask for a key. env, home: what ranks will see; None: no home folder of the user's.
    way: how a key is given."""
    if mode(env, home) != "online":
        return
    settings = _settings(env, home)
    if env.get("WANDB_API_KEY") or env.get("WANDB_IDENTITY_TOKEN_FILE") or env.get("WANDB_ANONYMOUS") in ("allow", "must"):
        return
    url = env.get("WANDB_BASE_URL") or settings.get("base_url") or _HOST
    if settings.get("api_key") or (home is not None and _in_netrc(urlsplit(url).netloc, env, home)):
        return
    raise ConfigError(
        f'log.wandb = "{project}": no key for {url} in the environment or ~/.netrc: {way}; WANDB_MODE=offline keeps the '
        "history in the run folder"
    )


def mode(env: Mapping[str, str], home: Path | None) -> str:
    """Whether W&B is "online", "offline" or "disabled" for whoever has this environment."""
    settings = _settings(env, home)
    requested = env.get("WANDB_MODE") or settings.get("mode") or "online"
    if (env.get("WANDB_DISABLED") or settings.get("disabled") or "").lower() in ("true", "1"):
        return "disabled"
    return {"dryrun": "offline", "disabled": "disabled", "offline": "offline"}.get(requested.lower(), "online")


def _settings(env: Mapping[str, str], home: Path | None) -> dict[str, str]:
    """What `wandb offline` and `wandb login --host` have written down."""
    if home is None:
        return {}
    settings = configparser.ConfigParser(interpolation=None)
    config = Path(env.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    for path in (config / "settings", Path("wandb", "settings")):
        try:
            settings.read(path, encoding="utf-8")
        except (OSError, ValueError, configparser.Error):
            continue
    return dict(settings["default"]) if settings.has_section("default") else {}


def _in_netrc(host: str, env: Mapping[str, str], home: Path) -> bool:
    places = [Path(env["NETRC"]).expanduser()] if env.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for place in places:
        try:
            found = netrc.netrc(place).authenticators(host)
        except (OSError, netrc.NetrcParseError, UnicodeError):
            continue
        if found is not None and found[2]:
            return True
    return False


@dataclass(frozen=True)
class HistorySegment:
    """The W&B run that receives the history.

    back: step to which its history must be rewound before it continues; None if it need not be.
    """

    id: str
    name: str
    number: int = 1
    back: int | None = None


def history_segment(folder: RunFolder, config: RunConfig, start: int, last: int) -> HistorySegment:
    """Where a run goes on after step `start`, of which metrics.jsonl had step `last`. Written down before anything of the
    history is dropped: what a kill leaves undone is done by the next start."""
    try:
        segment = HistorySegment(**json.loads(folder.wandb.read_bytes()))
    except (OSError, ValueError, TypeError):
        segment = HistorySegment(_first_id(folder, config), config.run.name)
    if last > start:
        segment = replace(segment, back=start if segment.back is None else min(start, segment.back))
        write_segment(folder, segment)
    return segment


def _first_id(folder: RunFolder, config: RunConfig) -> str:
    return f"{config.run.name}-{hashlib.sha256(str(folder.path.resolve()).encode()).hexdigest()[:12]}"


def write_segment(folder: RunFolder, segment: HistorySegment) -> None:
    """Record which W&B run the history goes to."""
    with tolerate_full_disk(folder.wandb):
        write_file(folder.wandb, json.dumps(asdict(segment)).encode())


class WandbLog:
    """Sends records from a thread of its own, so that no step waits for a server. Whatever goes wrong there is a warning."""

    def __init__(self, folder: RunFolder, config: RunConfig, segment: HistorySegment) -> None:
        self._folder, self._config, self._segment = folder, config, segment
        self._patience = min(_FINISH, config.recovery.grace / 4)
        self._records: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue()
        self._left_out, self._failed = 0, False
        self._thread = threading.Thread(target=self._work, daemon=True, name="wandb")
        self._thread.start()

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Queue the metrics of a step. Drops them if the queue is full or sending has failed."""
        if self._failed:
            return
        if self._records.qsize() >= _MAX_QUEUED:
            self._left_out += 1
        else:
            self._records.put((step, dict(values)))

    def close(self) -> None:
        """Wait a while until all is sent."""
        self._records.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._failed = True
            _warn(f"it has not taken everything within {self._patience:g} s: what is missing there is in metrics.jsonl, and "
                  f"`wandb sync` may find it in {self._folder.path / 'wandb'}")  # fmt: skip
        if self._left_out:
            _warn(f"{self._left_out} records were left out while it did not answer; metrics.jsonl has them")

    def _work(self) -> None:
        what = "cannot be reached"
        try:
            run = self._begin()
            what = "does not take the history any more"
            while (item := self._records.get()) is not None:
                step, values = item
                run.log(values, step=step)
            what = "did not end well"
            run.finish()
        except BaseException as error:  # its own, of the network, SystemExit: none of them is the run's
            self._failed = True
            if not isinstance(error, SystemExit) or error.code:
                _warn(f"{what}: {type(error).__name__}: {_first_line(error)}; training goes on, and metrics.jsonl has it all")

    def _begin(self) -> Any:
        """W&B's run, with a history that ends where this one begins."""
        back, segment = self._segment.back, replace(self._segment, back=None)
        if back is None:
            return self._open(segment)
        run = None
        if mode(os.environ, Path.home()) == "online":
            try:
                run = self._init(segment, resume_from=f"{segment.id}?_step={back}")
            except Exception as error:
                _warn(
                    f"its history cannot go back to step {back} ({_first_line(error)}): it goes on in another run of its group"
                )
        if run is None:
            number = segment.number + 1
            name = f"{self._config.run.name} after step {back} ({number})"
            segment = HistorySegment(f"{_first_id(self._folder, self._config)}-{number}", name, number)
            run = self._open(segment)
        write_segment(self._folder, segment)
        return run

    def _open(self, segment: HistorySegment) -> Any:
        """W&B's run of a segment. Where its server does not answer, its history is kept in the run folder to be sent later."""
        try:
            return self._init(segment, resume="allow")
        except Exception as error:
            run = self._init(segment, mode="offline")
            kept = self._folder.path / "wandb"
            _warn(f"cannot be reached ({_first_line(error)}): its history is kept in {kept}: send it with `wandb sync`")
            return run

    def _init(self, segment: HistorySegment, **more: Any) -> Any:
        import wandb

        config = self._config
        return wandb.init(
            project=config.log.wandb, name=segment.name, dir=self._folder.path, config={"toml": to_toml(config)},
            id=segment.id, group=config.run.name, **more,
        )  # fmt: skip


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _warn(text: str) -> None:
    print(f"warning: Weights & Biases: {text}", file=sys.stderr, flush=True)
