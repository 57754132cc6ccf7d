"""Logs elsewhere: an outage of Weights & Biases is a warning, a missing key is found first, and history follows a rewind."""

import sys
import types
from pathlib import Path

import pytest

from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.record import wandb as wandb_log
from mikoshi.trainer.record.metrics import MetricLog
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from mikoshi.trainer.record.wandb import check_key, history_segment, mode
from runs import run_config


class CommError(Exception):
    """As wandb's own, which is no subclass of OSError."""


class StandIn(types.ModuleType):
    """Not wandb: what of it is used, in memory. `broken`: what each call raises; `rewinds`: whether its server can."""

    def __init__(self, rewinds=True, broken=None):
        super().__init__("wandb")
        self.rewinds, self.broken = rewinds, broken or {}
        self.runs, self.asked = {}, []

    def raises(self, call, **asked):
        error = self.broken.get(call)
        if callable(error) and not isinstance(error, type):
            error = error(**asked)
        if error is not None:
            raise error

    def init(self, *, id, resume_from=None, mode=None, **more):
        self.asked.append({"id": id, "resume_from": resume_from, "mode": mode, **more})
        self.raises("init", mode=mode)
        history = self.runs.setdefault(id, {})
        if resume_from is not None:
            if not self.rewinds:
                raise CommError("rewind is not enabled for this account")
            name, _, step = resume_from.partition("?_step=")
            assert name == id
            for later in [one for one in history if one > int(step)]:
                del history[later]
        return types.SimpleNamespace(
            log=lambda values, step: self.raises("log") or history.setdefault(step, {}).update(values),
            finish=lambda: self.raises("finish"),
        )


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    run = run_config(tmp_path, tmp_path / "runs", log={"wandb": "project", "tensorboard": False})
    RunFolder(run.run.path).make()
    return run


def use(monkeypatch, **how):
    monkeypatch.setitem(sys.modules, "wandb", there := StandIn(**how))
    return there


def train(config, start, steps, offset=0.0):
    log = MetricLog(RunFolder(config.run.path), config, start)
    for step in range(start + 1, steps + 1):
        log.record(step, {"loss": step + offset})
    log.close()


def losses(config):
    return {record["step"]: record["loss"] for record in read_jsonl(RunFolder(config.run.path).metrics)}


def history(there, run):
    return {step: values["loss"] for step, values in there.runs[run].items()}


OUTAGES = {
    "init": {"init": CommError("no route")},
    "init, and offline": {"init": lambda mode: None if mode == "offline" else CommError("no route")},
    "ends the process": {"init": SystemExit(1)},
    "log": {"log": CommError("gone")},
    "log, of no class of Exception": {"log": KeyboardInterrupt()},
    "finish": {"finish": CommError("gone")},
}


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_is_a_warning(config, monkeypatch, capfd, outage):
    there = use(monkeypatch, broken=OUTAGES[outage])
    train(config, 0, 4)
    assert losses(config) == {1: 1, 2: 2, 3: 3, 4: 4}
    warnings = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: Weights & Biases: ")
    if outage == "init, and offline":
        assert [asked["mode"] for asked in there.asked] == [None, "offline"]
        assert history(there, there.asked[0]["id"]) == losses(config), "kept in the run folder, to be sent later"


def test_a_server_that_does_not_answer_is_not_waited_for(config, monkeypatch, capfd):
    import threading

    never, there = threading.Event(), use(monkeypatch)
    there.init = lambda **_: never.wait(60)
    monkeypatch.setattr(wandb_log, "_FINISH", 0.05)
    monkeypatch.setattr(wandb_log, "_MAX_QUEUED", 3)
    train(config, 0, 5)
    never.set()
    assert len(losses(config)) == 5
    told = capfd.readouterr().err
    assert "not taken everything within 0.05 s" in told and "2 records were left out" in told


def test_a_package_that_is_broken_is_a_warning(config, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(config, 0, 2)
    assert len(losses(config)) == 2 and "warning: Weights & Biases" in capfd.readouterr().err


def test_history_is_rewound_with_the_run(config, monkeypatch):
    there = use(monkeypatch)
    train(config, 0, 6)
    train(config, 6, 8)  # goes on where it was: nothing to rewind
    assert [asked["resume_from"] for asked in there.asked] == [None, None]
    train(config, 3, 7, offset=0.5)
    (run,) = there.runs
    assert there.asked[-1]["resume_from"] == f"{run}?_step=3"
    assert history(there, run) == losses(config) == {1: 1, 2: 2, 3: 3, 4: 4.5, 5: 5.5, 6: 6.5, 7: 7.5}
    train(config, 7, 9, offset=0.5)
    assert there.asked[-1]["resume_from"] is None and history(there, run) == losses(config)


@pytest.mark.parametrize("offline", [False, True])
def test_where_it_cannot_be_rewound_the_history_goes_on_in_another_run(config, monkeypatch, capfd, offline):
    there = use(monkeypatch, rewinds=False)
    if offline:
        monkeypatch.setenv("WANDB_MODE", "offline")
    train(config, 0, 6)
    train(config, 3, 7, offset=0.5)
    train(config, 7, 8, offset=0.5)  # stays there
    train(config, 2, 4, offset=0.25)
    first, second, third = there.runs
    assert (second, third) == (f"{first}-2", f"{first}-3")
    assert {asked["group"] for asked in there.asked} == {"test"}
    assert there.asked[-1]["name"] == "test after step 2 (3)"
    assert history(there, first) | history(there, second) == {1: 1, 2: 2, 3: 3, 4: 4.5, 5: 5.5, 6: 6.5, 7: 7.5, 8: 8.5}
    assert history(there, third) == {3: 3.25, 4: 4.25} == {step: loss for step, loss in losses(config).items() if step > 2}
    assert ("cannot go back to step 3 (rewind is not enabled" in capfd.readouterr().err) is not offline


def test_a_kill_while_the_run_goes_back_does_not_keep_the_abandoned_history(config, monkeypatch):
    there = use(monkeypatch)
    train(config, 0, 6)
    history_segment(RunFolder(config.run.path), config, 3, 6)  # all that was done before the kill
    there.broken = {"init": CommError("no route")}
    train(config, 3, 3)
    there.broken = {}
    train(config, 3, 5, offset=0.5)
    assert history(there, there.asked[0]["id"]) == losses(config) == {1: 1, 2: 2, 3: 3, 4: 4.5, 5: 5.5}


def test_a_missing_key_is_found_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home, project = tmp_path / "home", "p"
    home.mkdir()
    with pytest.raises(ConfigError, match=r"no key for https://api\.wandb\.ai.*WANDB_API_KEY.*WANDB_MODE=offline"):
        check_key(project, {}, home)
    for env in ({"WANDB_API_KEY": "k"}, {"WANDB_MODE": "offline"}, {"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"},
                {"WANDB_IDENTITY_TOKEN_FILE": "t"}):  # fmt: skip
        check_key(project, env, home)
    (home / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    check_key(project, {}, home)
    with pytest.raises(ConfigError, match=r"no key for https://wandb\.example"):
        check_key(project, {"WANDB_BASE_URL": "https://wandb.example"}, home)
    with pytest.raises(ConfigError, match="no key"):
        check_key(project, {}, None)
    (home / ".netrc").write_text("no netrc at all {")
    with pytest.raises(ConfigError, match="no key"):
        check_key(project, {}, home)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # as `wandb offline` leaves it
    check_key(project, {}, home)
    assert mode({}, home) == "offline" and mode({"WANDB_MODE": "online"}, home) == "online"


def test_train_refuses_a_run_without_a_key_before_ranks_start(dataset, mikoshi, monkeypatch, tmp_path):
    from importlib.machinery import ModuleSpec

    from mikoshi.trainer.config.run import to_toml

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    use(monkeypatch).__spec__ = ModuleSpec("wandb", None)
    run = run_config(dataset, tmp_path / "runs", log={"wandb": "project"})
    Path("run.toml").write_text(to_toml(run))
    code, _, errors = mikoshi("train", "run.toml", "--ranks", "2")
    assert code == 2 and len(errors) == 1 and "WANDB_API_KEY" in errors[0]


def test_tensorboard_forgets_what_the_run_has_gone_back_before(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config.model_copy(update={"log": config.log.model_copy(update={"wandb": "", "tensorboard": True})})
    train(config, 0, 6)
    train(config, 3, 5, offset=0.5)
    train(config, 5, 12, offset=0.5)
    train(config, 1, 8, offset=0.25)
    read = EventAccumulator(str(RunFolder(config.run.path).tensorboard))
    read.Reload()
    assert {event.step: event.value for event in read.Scalars("loss")} == losses(config)
    assert len(read.Scalars("loss")) == 8
