"""The logs of a run are JSON as its standard has it, also where a figure is none."""

import json
import math

import pytest
import torch

from mikoshi.launch.operate.board_text import describe_event
from mikoshi.trainer.engines.base import StepResult
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.record.metrics import MetricLog
from mikoshi.trainer.record.run_folder import RunFolder, drop_after, read_jsonl, read_metrics
from mikoshi.trainer.train.step_log import RunLog
from runs import run_config


def strictly(path):
    def refuse(word):
        raise AssertionError(f"{path.name}: {word}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path):
    config = run_config(tmp_path, tmp_path / "runs", log={"tensorboard": False})
    folder = RunFolder(config.run.path)
    folder.make()
    log = RunLog(config, folder, layout_of(config, 1), torch.device("cpu"), silent=False)
    log.metrics = MetricLog(folder, config, 0)
    log.waited = 0.0
    yield log
    log.metrics.close()


def test_a_figure_that_is_not_finite_is_null_and_an_event_has_it(log):
    log.step(1, StepResult(loss=2.0, grad_norm=math.inf, tokens=4, applied=False), 1e-3)
    log.evaluation(1, {"": math.nan}, {"": 1.0}, 0.5)
    step, held_out = strictly(log.folder.metrics)
    assert (step["loss"], step["grad_norm"], held_out["eval_loss"]) == (2.0, None, None)
    events = strictly(log.folder.events)
    told = [event for event in events if event["event"] == "non-finite"]
    assert [event["values"] for event in told] == [{"grad_norm": "inf"}, {"eval_loss": "nan"}]
    assert describe_event(told[0]) == "step 1: not finite: grad_norm"
    assert math.isnan(read_metrics(log.folder.metrics)[0]["grad_norm"])


def test_a_log_of_before_goes_on(log):
    log.folder.metrics.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n{"step": 3, "loss": 1.0}\n')
    assert [record["loss"] for record in read_jsonl(log.folder.metrics)][1:] == [math.inf, 1.0]
    drop_after(log.folder.metrics, 2)
    assert strictly(log.folder.metrics) == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
