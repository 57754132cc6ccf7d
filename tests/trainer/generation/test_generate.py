"""Sampling, and the text of a trained model: seeded, cut where asked, the same with and without the cache."""

import json
import sys

import pytest
import torch

from mikoshi.data.tokenizer.tokenizer import load_tokenizer
from mikoshi.launch.cli import main as cli
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.errors import CheckpointError, ConfigError
from mikoshi.trainer.generation.generate import Sampling, choose, generate, known_ids
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.gpt import GPT
from runs import GPT2_MODEL, TINY_MODEL, run_config


def frequencies(draw, ids, draws=4000):
    g = torch.Generator().manual_seed(0)
    counts = torch.zeros(ids)
    for _ in range(draws):
        counts[draw(g)] += 1
    return counts / draws


def probabilities(sampling, logits, draws=4000):
    return frequencies(lambda g: choose(logits, sampling, g), len(logits), draws)


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


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-45, 1e-40, 1e-10])
@pytest.mark.parametrize("top", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_a_temperature_that_is_next_to_nothing_is_the_likeliest_token(temperature, top):
    logits = torch.tensor([-3.0, 4.0, 3.9, 1e4, 9.9e3])
    g = torch.Generator().manual_seed(0)
    assert {choose(logits, Sampling(temperature, **top), g) for _ in range(20)} == {3}
    assert choose(logits / 1e6, Sampling(temperature, **top), g) == 3


def test_the_highest_temperature_makes_all_that_may_be_drawn_alike():
    logits, known = torch.tensor([0.0, 5.0, 50.0, 9.0]), torch.tensor([True, True, False, True])
    found = frequencies(lambda g: choose(logits, Sampling(1e300), g, known), 4)
    torch.testing.assert_close(found, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3]), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "told", [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1}, {"top_p": 0.0},
             {"top_p": 1.5}, {"top_p": float("nan")}, {"top_p": -0.1}],
)  # fmt: skip
def test_what_is_no_way_to_sample_is_refused_by_name(told):
    (key,) = told
    with pytest.raises(ConfigError, match=f"--{key.replace('_', '-')} must be"):
        Sampling(**told)


def test_scores_that_are_no_numbers_are_a_line_and_no_crash():
    with pytest.raises(CheckpointError, match="not finite"):
        choose(torch.tensor([1.0, float("nan")]), Sampling(), torch.Generator())


@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(1.0), Sampling(5.0, top_k=7), Sampling(1.0, top_p=0.9), Sampling(1e-40)], ids=str
)
def test_only_ids_that_the_tokenizer_has_are_drawn(sampling):
    torch.manual_seed(0)
    model = GPT(ModelConfig(**TINY_MODEL))
    with torch.no_grad():
        model.head_weight[::2] *= 100  # what is beyond would be drawn
    rows = len(model.head_weight)
    known = torch.zeros(rows // 2, dtype=torch.bool)
    known[1::3] = True
    found = list(generate(model, [1, 2, 3], 60, sampling, end=(), known=known))
    assert all(known[i] for i in found if i < len(known))
    assert max(found) < len(known)
    assert max(generate(model, [1, 2, 3], 60, Sampling(5.0), end=())) >= len(known), "without, others are drawn"


def test_what_the_tokenizer_knows_leaves_out_gaps(tmp_path):
    content = json.loads(load_tokenizer("bytes").backend.to_str())
    content["model"]["vocab"]["far"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    known = known_ids(tokenizer)
    assert known.tolist() == [True] * 257 + [False] * 43 + [True]


def test_any_of_several_tokens_ends_a_text():
    torch.manual_seed(0)
    model = GPT(ModelConfig(**TINY_MODEL))
    found = list(generate(model, [1, 2, 3], 20, Sampling(1.0), end=-1))
    stops = {found[4], found[9]}
    assert list(generate(model, [1, 2, 3], 20, Sampling(1.0), end=stops)) == found[: min(map(found.index, stops))]


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
