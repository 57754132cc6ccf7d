"""Sampling, and the text of a trained model: seeded, cut where asked, the same with and without the cache."""

import sys

import pytest
import torch

from runs import GPT2_MODEL, TINY_MODEL, run_config
from trainer import cli
from trainer.config import to_toml
from trainer.generate import Sampling, choose, generate
from trainer.model.config import ModelConfig
from trainer.model.gpt import GPT


def probabilities(sampling, logits, draws=4000):
    g = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(logits))
    for _ in range(draws):
        counts[choose(logits, sampling, g)] += 1
    return counts / draws


def test_temperature_top_k_and_top_p_cut_where_they_say():
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = p.log()[torch.tensor([2, 0, 3, 1])]  # not in order
    expected = p[torch.tensor([2, 0, 3, 1])]
    torch.testing.assert_close(probabilities(Sampling(1.0), logits), expected, atol=0.03, rtol=0)
    two = torch.tensor([0, 2 / 3, 0, 1 / 3])
    torch.testing.assert_close(probabilities(Sampling(1.0, top_k=2), logits), two, atol=0.03, rtol=0)
    torch.testing.assert_close(probabilities(Sampling(1.0, top_p=0.7), logits), two, atol=0.03, rtol=0)
    assert probabilities(Sampling(1.0, top_p=0.01), logits, 50)[1] == 1
    assert probabilities(Sampling(0.0), logits, 50)[1] == 1
    sharp = (expected**2) / (expected**2).sum()
    torch.testing.assert_close(probabilities(Sampling(0.5), logits), sharp, atol=0.03, rtol=0)


@pytest.mark.parametrize("shape", [TINY_MODEL, GPT2_MODEL], ids=["rotary", "learned"])
def test_cached_greedy_text_is_the_uncached_and_may_outgrow_the_context(shape):
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**shape, "context": 16}))
    found = list(generate(model, [1, 2, 3], 40, Sampling(0.0), end=-1))
    assert len(found) == 40
    ids = [1, 2, 3]
    for token in found[:12]:  # within the context, where both forms see the same window
        with torch.no_grad():
            assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)
    assert list(generate(model, [1, 2, 3], 40, Sampling(0.0), end=found[5])) == found[: found.index(found[5])]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    config = run_config(dataset, folder, train={"steps": 40, "global_batch": 8}, eval={"batches": 1})
    (folder / "run.toml").write_text(to_toml(config))
    before, sys.argv = sys.argv, ["mikoshi", "train", str(folder / "run.toml")]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code
    finally:
        sys.argv = before
    return folder / "test"


def write(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(sys, "argv", ["mikoshi", "generate", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code
    return capfd.readouterr().out


def test_the_command_writes_seeded_text(trained, monkeypatch, capfd):
    one = write(monkeypatch, capfd, trained, "--prompt", "import ", "--tokens", 30, "--seed", 5)
    assert one.startswith("import ")
    assert len(one) > 20
    assert write(monkeypatch, capfd, trained, "--prompt", "import ", "--tokens", 30, "--seed", 5) == one
    assert write(monkeypatch, capfd, trained, "--prompt", "import ", "--tokens", 30, "--seed", 6) != one
    assert write(monkeypatch, capfd, trained, "--tokens", 5)


def test_the_report_is_one_page_that_needs_nothing_else(trained, monkeypatch):
    import re

    monkeypatch.setattr(sys, "argv", ["mikoshi", "report", str(trained)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    page = (trained / "report.html").read_text()
    body = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=", body), "nothing is fetched"
    for heading in (
        "Loss",
        "Throughput",
        "Gradient norm",
        "Learning rate",
        "memory",
        "Layout",
        "Events",
        "Resolved config",
    ):
        assert heading in body
    assert "steps = 40" in body
    assert "held-out" in page


def test_tensorboard_has_the_curves(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 41))
    assert len(events.Scalars("eval_loss")) == 1
