"""Where a run's time went: whatever befell it, every second is found again, and with its own cause."""

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.record.goodput import CAUSES, account, goodput, process_began, repetition
from mikoshi.trainer.record.run_folder import RunFolder, drop_after, read_jsonl
from runs import run_config

SECONDS = st.integers(1, 64).map(lambda n: n / 16)  # exact in binary: sums have one value


class Life:
    """A run that keeps its logs as `mikoshi train` does, and beside them where its time really went."""

    def __init__(self):
        self.now, self.events, self.metrics = 1_000_000.0, [], []
        self.truth = dict.fromkeys(["training", *CAUSES], 0.0)
        self.step = self.saved = 0
        self.undecided = []  # what becomes of a step's seconds is known once a checkpoint holds it or it is repeated
        self.pause = None

    def event(self, kind, **fields):
        self.events.append({"time": self.now, "event": kind, **fields})

    def start(self, startup):
        if self.pause is not None:
            seconds, cause = self.pause
            self.now += seconds
            self.truth[cause] += seconds
        began = self.now
        self.now += startup
        self.truth["start-up"] += startup
        lost = [r for r in self.metrics if r["step"] > self.saved and "loss" in r]
        dropped = [r for r in self.metrics if r["step"] > self.saved]
        fields = {"repeated_steps": len(lost), "repeated_seconds": sum(r["step_seconds"] for r in lost)}
        fields |= {"last_seen": max(r["time"] for r in dropped)} if dropped else {}
        self.truth["repeated"] += fields["repeated_seconds"]
        for step, parts in self.undecided:
            if step <= self.saved:
                self.count(parts)
        self.undecided = []
        self.metrics = [r for r in self.metrics if r["step"] <= self.saved]
        if self.saved:
            self.event("resume", step=self.saved, **fields)
        self.event("start", step=self.saved, began=began, **({} if self.saved else fields))
        self.step = self.saved

    def count(self, parts):
        for cause, seconds in parts.items():
            self.truth[cause] += seconds

    def train(self, data, work, fate):
        self.step += 1
        parts = {"data": data, "skipped" if fate == "skip" else "training": work}
        seconds = data + work
        if fate == "retry":
            self.event("retry", step=self.step, cured=True, seconds=work)
            parts["retried"], seconds = work, seconds + work
        self.now += seconds
        self.metrics.append({"step": self.step, "time": self.now, "loss": 1.0, "step_seconds": seconds, "data_seconds": data})
        if fate == "skip":
            self.event("skip", step=self.step, why="not finite")
        self.undecided.append((self.step, parts))

    def save(self, stall, failed):
        self.now += stall
        self.truth["saves"] += stall
        self.event("save-failed" if failed else "save", step=self.step, stall_seconds=stall)
        self.saved = self.saved if failed else self.step

    def evaluate(self, seconds):
        self.now += seconds
        self.truth["evaluation"] += seconds
        self.event("eval", step=self.step, seconds=seconds)
        self.metrics.append({"step": self.step, "time": self.now, "eval_loss": 1.0})

    def idle(self, seconds):
        """Nobody says what is done here; the event shows that the run still lives."""
        self.now += seconds
        self.truth["other"] += seconds
        self.event("spike", step=self.step)

    def end(self, how, pause):
        if how == "finished":
            self.event("end", step=self.step, finished=True)
            self.now += pause  # of no cause: the run was over
            self.pause = (0.0, "other")
        elif how == "stopped":
            self.saved = self.step
            self.event("end", step=self.step, finished=False)
            self.pause = (pause, "stopped")
        else:
            self.pause = (pause, "restarts")
            self.events.append({"time": self.now + pause / 2, "event": "fault", "rank": 1, "cause": "killed"})
            self.events.append({"time": self.now + pause / 2, "event": "restart", "number": 1})


ACTION = st.one_of(
    st.tuples(st.just("train"), SECONDS, SECONDS, st.sampled_from(["", "", "", "skip", "retry"])),
    st.tuples(st.just("save"), SECONDS, st.booleans()),
    st.tuples(st.just("evaluate"), SECONDS),
    st.tuples(st.just("idle"), SECONDS),
)
LIVES = st.lists(
    st.tuples(SECONDS, st.lists(ACTION, min_size=1, max_size=12), st.sampled_from(["killed", "stopped", "finished"]), SECONDS),
    min_size=1, max_size=5,
)  # fmt: skip


@given(LIVES)
def test_every_second_is_found_again_with_its_cause(lives):
    life = Life()
    for number, (startup, actions, how, pause) in enumerate(lives):
        life.start(startup)
        for name, *arguments in actions:
            getattr(life, name)(*arguments)
        if number < len(lives) - 1:
            life.end(how, pause)
    for _, parts in life.undecided:
        life.count(parts)
    found = account(life.events, life.metrics)
    assert found.training == pytest.approx(life.truth["training"])
    assert found.lost == pytest.approx({cause: life.truth[cause] for cause in CAUSES})
    assert found.wall == pytest.approx(sum(life.truth.values()))
    assert found.wall == pytest.approx(found.training + sum(found.lost.values()))
    assert found.starts == len(lives)
    assert found.figures()["goodput"] == pytest.approx(found.training / found.wall)


def test_going_back_within_a_start_repeats_steps_too():
    life = Life()
    life.start(1.0)
    life.train(0.0, 2.0, "")
    life.save(0.5, False)
    life.train(0.0, 3.0, "skip")
    life.train(0.0, 4.0, "retry")
    life.event("rewind", step=3, to=1, skipped=[8, 24])
    life.now += 0.25
    life.event("resume", step=1, refused=[], repeated_steps=2, repeated_seconds=11.0, last_seen=life.metrics[-1]["time"])
    life.metrics = life.metrics[:1]
    life.train(0.0, 5.0, "")
    found = account(life.events, life.metrics)
    assert (found.training, found.steps, found.repeated) == (7.0, 2, 2)
    expected = {"repeated": 11.0, "saves": 0.5, "start-up": 1.0, "other": 0.25}
    assert found.lost == pytest.approx(dict.fromkeys(CAUSES, 0.0) | expected)


def test_logs_of_an_older_version_are_read(tmp_path):
    events = [
        {"time": 10.0, "event": "start", "step": 0},
        {"time": 15.0, "event": "eval", "step": 4, "loss": 2.0},
        {"time": 16.0, "event": "save", "step": 4},
        {"time": 30.0, "event": "resume", "step": 4, "refused": []},
        {"time": 31.0, "event": "start", "step": 4},
    ]
    metrics = [{"step": n, "time": 10.0 + n, "loss": 2.0, "step_seconds": 1.0} for n in (1, 2, 3, 4)]
    metrics += [{"step": 4, "time": 15.0, "eval_loss": 2.0}, {"step": 5, "time": 33.0, "loss": 2.0, "step_seconds": 2.0}]
    found = account(events, metrics)
    assert (found.wall, found.training) == (23.0, 6.0)
    assert (found.lost["restarts"], found.lost["start-up"], found.lost["other"]) == (14.0, 1.0, 2.0)
    assert goodput(RunFolder(tmp_path / "nothing")).share == 0


def test_when_a_process_began():
    told, ours = os.pipe()
    before = time.time()
    child = os.fork()
    if child == 0:
        os.write(ours, repr(process_began()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert before - 0.05 <= float(os.read(told, 64)) <= time.time() + 0.05
    os.close(told)
    os.close(ours)


def test_what_is_repeated_is_told_before_it_is_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    records = [{"step": n, "time": 100.0 + n, "step_seconds": 0.5} for n in range(1, 8)] + [{"step": 7, "time": 109.0}]
    folder.metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert repetition(folder, 4) == {"repeated_steps": 3, "repeated_seconds": 1.5, "last_seen": 109.0}
    drop_after(folder.metrics, 4)
    assert repetition(folder, 4) == {"repeated_steps": 0, "repeated_seconds": 0}


def test_of_a_real_run(dataset, tmp_path, mikoshi):
    """Trained, stopped before its end by raising its steps, reported; the page says what the figures say."""
    config = run_config(
        dataset, tmp_path / "runs", train={"steps": 6}, checkpoint={"every": 2}, eval={"every": 3, "batches": 1},
        log={"tensorboard": False},
    )  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert mikoshi("train", tmp_path / "run.toml")[0] == 0
    folder = RunFolder(tmp_path / "runs" / "test")
    found = goodput(folder)
    records = [r for r in read_jsonl(folder.metrics) if "loss" in r]
    assert found.steps == len(records) == 6
    assert found.training + found.lost["data"] == pytest.approx(sum(r["step_seconds"] for r in records))
    assert found.training + sum(found.lost.values()) == pytest.approx(found.wall)
    ends = [e["time"] for e in read_jsonl(folder.events)]
    assert ends[-1] - ends[0] <= found.wall + 0.01
    assert 0 < found.share < 1
    assert mikoshi("report", folder.path)[0] == 0
    page = folder.report.read_text()
    assert "Where the time went" in page
    assert f"<b>{found.share:.1%}</b><span>goodput</span>" in page
