"""Progress of training on the console: a live line in a terminal, plain lines in a pipe or file."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mikoshi.trainer.record.durations import clock

_FAR = 5.0
"""Times `optim.clip` from which on a clipped step is named on the console."""


class _Console(Console):
    """Rich ends a process whose reader has gone; a run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class TrainConsole:
    """Progress of a run of `steps` steps on rank 0. Use as a context manager; a silent one is for other ranks.

    `clip`: the largest gradient norm that is applied as it is, 0 for any. A line names the step since the last line that
    was clipped the most, where its norm was far above that (a live line: of the last 50 steps).
    """

    def __init__(self, steps: int, every: int, silent: bool = False, clip: float = 0.0) -> None:
        self.steps, self.every, self.silent, self.clip = steps, every, silent, clip
        self.clipped = (0, 0.0)  # step, and how many times `clip` its norm was
        self.console = _Console(highlight=False, soft_wrap=True, quiet=silent)
        self.recent: deque[tuple[int, float]] = deque(maxlen=50)
        self.progress: Progress | None = None
        self.task: Any = None
        if self.console.is_terminal and not silent:
            self.progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=self.console,
                refresh_per_second=4,
            )

    def __enter__(self) -> TrainConsole:
        if self.progress is not None:
            self.progress.start()
            self.task = self.progress.add_task("starting", total=self.steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            with _nobody_may_listen():
                self.progress.stop()

    def print(self, text: str) -> None:
        """Print a line above the progress bar, or as a plain line where there is none."""
        with _nobody_may_listen():
            self.console.print(text, markup=False)

    def step(self, done: int, values: Mapping[str, Any]) -> None:
        """Show a finished step.

        values: its metrics, named as in metrics.jsonl.
        """
        if self.silent:
            return
        self.recent.append((done, values["step_seconds"]))
        if self.clip and values.get("applied", True):
            self.clipped = max(self.clipped, (done, values.get("grad_norm", 0.0) / self.clip), key=lambda known: known[1])
        if self.progress is not None:
            self.progress.update(self.task, completed=done, description=self._line(done, values))
            if done - self.clipped[0] >= 50:
                self.clipped = (0, 0.0)
        elif done % self.every == 0 or done == self.steps:
            self.print(f"step {done:>{len(str(self.steps))}}/{self.steps}  {self._line(done, values)}")
            self.clipped = (0, 0.0)

    def _line(self, done: int, values: Mapping[str, Any]) -> str:
        seconds = sum(s for _, s in self.recent) / len(self.recent)
        parts = [
            f"loss {format_loss(values['loss'])}",
            f"{values.get('computed_tokens', values['tokens']) / seconds:,.0f} tok/s",
            f"{seconds * 1000:,.0f} ms/step",
            f"{values['memory_bytes'] / 2**30:.2f} GiB",
            f"ETA {clock(seconds * (self.steps - done))}",
        ]
        if "mfu" in values:
            parts.insert(2, f"MFU {values['mfu']:.1%}")
        step, times = self.clipped
        if times >= _FAR:
            parts.append(f"clipped {times:.0f}x" + ("" if step == done else f" at step {step}"))
        return "  ".join(parts)


def format_loss(loss: float | None) -> str:
    """None where no token was predicted."""
    return "none" if loss is None else f"{loss:.4f}"


@contextlib.contextmanager
def _nobody_may_listen() -> Iterator[None]:
    """A terminal that is gone, or a pipe whose reader is, ends no run."""
    try:
        yield
    except OSError:
        return
