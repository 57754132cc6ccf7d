"""An evaluation ends early on all ranks together where any was asked to stop, and then says nothing."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from engines import engine_config
from mikoshi.trainer.feed.feed import open_feed
from mikoshi.trainer.train.loop import _evaluate
from runs import engine_and_rows, held_out_of


class AskedLate:
    """Of one rank alone, from the so many-th question on."""

    def __init__(self, rank, questions):
        self.left = questions if dist.get_rank() == rank else 10**9

    @property
    def received(self):
        self.left -= 1
        return "SIGTERM" if self.left < 0 else ""


def evaluated(config, questions):
    """Whether it came to its end, what was reported, how often a save under way went on, and the step that follows."""
    engine, loader = engine_and_rows(config)
    rank, feed, told, went_on = dist.get_rank(), open_feed(config), [], []
    saves = SimpleNamespace(saver=SimpleNamespace(flags=lambda: (False, True)), advance=lambda agreed: went_on.append(agreed))
    log = SimpleNamespace(evaluation=lambda _, losses, *__: told.append(losses))
    run = SimpleNamespace(config=config, layout=engine.layout, rank=rank, engine=engine, saves=saves, log=log)
    point = SimpleNamespace(feed=feed, continued=feed.continued(None))
    ended = _evaluate(run, point, 0, AskedLate(dist.get_world_size() - 1, questions))
    assert all(agreed.pending for agreed in went_on)
    whole = engine.evaluate(held_out_of(config, engine.layout, rank), feed.tokenizer.vocab)
    return ended, told, len(went_on), whole, engine.step(loader.batch(0), 1e-3).loss


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("native", "zero=3"), ("native", "pp=2"), ("native", "cp=2"), ("deepspeed", "zero=1"), ("deepspeed", "zero=1 pp=2")],
)
def test_it_ends_between_two_batches_on_all_ranks(ranks, dataset, tmp_path, kind, layout):
    if importlib.util.find_spec(kind) is None and kind != "native":
        pytest.skip(f"{kind} is not installed")
    config = engine_config(dataset, tmp_path, "llama", kind, layout, eval={"batches": 3}, train={"global_batch": 4})
    found = ranks.run(evaluated, config, 10, world=2)
    (loss,) = {whole for *_, whole, _ in found}
    assert [(ended, told, count) for ended, told, count, *_ in found] == [(True, [{"": loss}], 3)] * 2
    steps = {after for *_, after in found}
    for questions in (0, 2):
        found = ranks.run(evaluated, config, questions, world=2)
        assert [(ended, told, count) for ended, told, count, *_ in found] == [(False, [], questions)] * 2
        assert {whole for *_, whole, _ in found} == {loss}, "nothing is left over of it"
        assert {after for *_, after in found} == steps
