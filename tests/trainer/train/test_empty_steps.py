"""Runs of long prompts, where most steps predict nothing: those change nothing, say so, and are in no statistic."""

import json
import re

import pytest

from datarun import events, inside, paragraphs, records, run, write_run
from mikoshi.trainer.checkpoint.restore import newest_valid
from mikoshi.trainer.compare.comparison import Round, figures
from mikoshi.trainer.record.run_folder import predicting_steps
from mikoshi.trainer.train.step_log import mean_loss

STEPS = 30


@pytest.fixture(scope="module")
def long_prompts(tmp_path_factory):
    """Answers of a few letters behind prompts of several rows, prepared."""
    folder = tmp_path_factory.mktemp("prompts")
    texts = paragraphs(least=400)[:60]
    lines = [json.dumps({"prompt": text[:900], "response": f"yes {n}"}) for n, text in enumerate(texts)]
    (folder / "chat.jsonl").write_text("\n".join(lines))
    config = write_run(
        folder, folder / "prepared", steps=STEPS, train={"global_batch": 1}, recovery={"restarts": 0},
        data={"source": str(folder / "chat.jsonl"), "chat": "chatml", "held_out": 0.3}, model={"vocab": 512},
        optim={"lr": 1e-2, "weight_decay": 0.5}, guard={"spike": "skip", "window": 8, "give_up": 2},
        checkpoint={"every": 1, "keep": 99}, eval={"every": 10},
    )  # fmt: skip
    return config, inside(config, "prepare")


def state(config, name, step):
    store = config.parent / "runs" / name / "checkpoints" / f"step-{step:08d}"
    return {p.name: p.read_bytes() for p in store.glob("*.safetensors")}


def test_they_change_nothing_and_are_said_as_such(long_prompts, mikoshi):
    config, prepared = long_prompts
    (share,) = re.findall(r"([\d.]+)% of the [\d,]+ training rows of 64 tokens predict no token", prepared)
    out = inside(config, "train", "run.name=some")
    steps = [r for r in records(config, "some") if "loss" in r]
    empty = [r["step"] for r in steps if r["loss"] is None]
    assert 3 < len(empty) < STEPS
    assert empty == [e["step"] for e in events(config, "some", "empty")]
    assert empty == [r["step"] for r in steps if not r["applied"]]
    assert all(r["tokens"] == 0 and r["grad_norm"] is None for r in steps if r["loss"] is None)
    assert not events(config, "some", "skip") and not events(config, "some", "retry")
    assert f"{len(empty)} step(s) predicted no token" in out and "loss 0.0000" not in out
    for r in steps:
        assert r["computed_tokens"] == 64 and r["tokens"] < 64, "prompts are computed and not predicted"
        assert r["tokens_per_second"] == pytest.approx(64 / r["step_seconds"]), "speed goes by what is computed"
    for step in empty:
        if step > 1:
            assert state(config, "some", step) == state(config, "some", step - 1), "weights, moments and their steps"
    _, manifest, _ = newest_valid(config.parent / "runs" / "some" / "checkpoints")
    applied = [r for r in steps if r["applied"]]
    assert manifest.record["guard"]["losses"] == [r["loss"] for r in applied][-8:]
    assert manifest.record["guard"]["left"] == 0
    assert predicting_steps(steps) == applied
    looked = json.loads(inside(config, "data stats", "--json"))["sources"][0]["nothing"]
    assert round(100 * looked["train"], 1) == float(share)
    assert f"{share}% of the training rows" in inside(config, "data stats")

    folder = config.parent / "runs" / "some"
    assert mikoshi("report", folder)[0] == 0
    page = (folder / "report.html").read_text()
    assert f"<b>{len(empty)}</b><span>steps that predicted nothing</span>" in page
    assert mikoshi("status", folder)[0] == 0
    one = Round(1, predicting_steps(steps), [1], [])
    assert figures([one], [one]).left == 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_guard_that_goes_back_takes_no_notice(long_prompts, ranks):
    config, _ = long_prompts
    name = f"run.name=back{ranks}"
    run(config, "train", name, "guard.spike=rewind", "guard.rewind=2", "train.global_batch=2", ranks=ranks)
    steps = [r for r in records(config, f"back{ranks}") if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert any(r["loss"] is None for r in steps) and not events(config, f"back{ranks}", "rewind")


@pytest.mark.parametrize("source", ["prepared", "stream"])
def test_data_without_a_single_answer(tmp_path, source):
    (tmp_path / "chat.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text[:3000], "response": "y"}) for text in paragraphs(least=3000))
    )
    config = write_run(
        tmp_path, tmp_path / "prepared", steps=2, train={"context": 16, "global_batch": 1}, recovery={"restarts": 0},
        data={"source": str(tmp_path / "chat.jsonl"), "chat": "chatml", "held_out": 0.4, "stream": source == "stream"},
        model={"vocab": 512, "context": 16},
    )  # fmt: skip
    if source == "stream":
        out = inside(config, "train", "data.lanes=1")
        assert "held-out loss none" in out and "rows read from the stream predicted no token" in out
        (save,) = events(config, "test", "save")
        assert save["rows"] == {"read": 2, "nothing": 2}
        return
    out = inside(config, "prepare", "data.tokenizer_vocab=300")
    assert "training rows of 16 tokens predict no token" in out


def test_a_mean_over_sources_is_of_those_that_have_a_loss():
    weights = {"a": 3.0, "b": 1.0, "c": 0.0}
    assert mean_loss({"a": 2.0, "b": 4.0, "c": 9.0}, weights) == 2.5
    assert mean_loss({"a": None, "b": 4.0, "c": 9.0}, weights) == 4.0
    assert mean_loss({"a": None, "b": None, "c": 9.0}, weights) is None
    assert mean_loss({"": None}, {"": 1.0}) is None
