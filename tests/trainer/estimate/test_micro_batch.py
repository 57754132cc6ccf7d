"""The micro-batch that fits, found under a real limit of memory, in rank processes that really run out of it."""

import contextlib
import json
import re

import pytest

from mikoshi.launch.agent.outcome import RanksOutcome
from mikoshi.launch.controller.trials import merge_results
from mikoshi.parallel.errors import LayoutError
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.errors import ConfigError, LaunchError
from mikoshi.trainer.estimate.micro_batch import (
    AttemptResult,
    failed_attempt,
    find_micro_batch,
    memory_in_use,
    micro_batch_sizes,
    requested_bytes,
    shortage,
)
from mikoshi.trainer.exit_codes import DONE, FAULT, LOST_PEER
from runs import run_config

pytest.importorskip("accelerate")

WIDE = {"layers": 2, "width": 128, "kv_heads": 4, "mlp_width": 512, "context": 256}
SHORT = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."


@pytest.fixture
def run(dataset, tmp_path):
    config = run_config(
        dataset, tmp_path / "runs", model=WIDE, train={"global_batch": 64, "context": 256}, engine={"device": "cpu"}
    )
    (tmp_path / "run.toml").write_text(to_toml(config))
    return config


def test_sizes_are_those_that_the_layout_can_have(dataset, tmp_path):
    config = run_config(dataset, tmp_path, train={"global_batch": 24})
    assert micro_batch_sizes(config, 2) == [12, 6, 4, 3, 2, 1]
    piped = run_config(dataset, tmp_path, train={"global_batch": 24, "micro_batch": 5}, parallel={"pp": 2})
    assert micro_batch_sizes(piped, 2) == [24, 12, 8, 6, 4, 3, 2, 1]
    with pytest.raises(LayoutError):
        micro_batch_sizes(run_config(dataset, tmp_path, parallel={"tp": 2}), 1)


def test_the_search_goes_down_until_one_fits(dataset, tmp_path):
    config, requested_bytes, told = run_config(dataset, tmp_path, train={"global_batch": 24}), [], []

    def carry(tried):
        requested_bytes.append(tried.train.micro_batch)
        return AttemptResult(error=SHORT) if tried.train.micro_batch > 4 else AttemptResult(7 * tried.train.micro_batch)

    found, tried = find_micro_batch(config, 2, None, carry, told.append)
    assert found == 4
    assert requested_bytes == [12, 6, 4]
    assert tried == told
    assert [(one.fits, one.peak) for one in tried] == [(False, 0), (False, 0), (True, 28)]
    assert told[0].why == "out of memory: 8 bytes more were asked for"
    with pytest.raises(LaunchError, match=r"train.micro_batch=12: shapes cannot be multiplied"):
        find_micro_batch(config, 2, None, lambda _: AttemptResult(error="shapes cannot be multiplied"), told.append)


def test_what_does_not_fit_says_how_much_was_asked_for_and_the_limit():
    raw = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    raw += "536870912 bytes. Error code 12 (Cannot allocate memory)"
    assert shortage(raw, 4 << 30) == "out of memory at the limit of 4 GiB (--memory): 0.50 GiB more were asked for"
    assert shortage(raw, None) == "out of memory: 0.50 GiB more were asked for"
    assert requested_bytes("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB") == 20 << 20
    assert shortage("std::bad_alloc: out of memory.", 1 << 29) == "out of memory at the limit of 0.5 GiB (--memory)"
    killed = "rank 1 was killed (SIGKILL), as the kernel does with what makes it run out of memory."
    assert shortage(killed, 1 << 30) == killed[:-1]


@pytest.mark.parametrize(
    ("sections", "ranks", "memory", "needed", "said"),
    [
        ({}, 2, 0.1, 6 << 27, "even one row a rank does not fit within --memory 0.1: it needs 0.75 GiB at least: what helps: a "
         "larger --memory; parallel.zero=3; a larger parallel.tp or parallel.pp; engine.recompute=full; a smaller "
         "train.context"),
        ({"parallel": {"zero": 3}, "engine": {"recompute": "full"}}, 2, 0.1, 0, "even one row a rank does not fit within "
         "--memory 0.1 (out of memory at the limit of 0.1 GiB (--memory): 8 bytes more were asked for): what helps: a larger "
         "--memory; a larger parallel.tp or parallel.pp; a smaller train.context"),
        ({"engine": {"recompute": "full"}}, 1, None, 0, "even one row a rank does not fit (out of memory: 8 bytes more were "
         "asked for): what helps: more --ranks, with parallel.zero=3 or a larger parallel.tp or parallel.pp; a smaller "
         "train.context"),
    ],
    ids=["nothing is set", "all is set", "one rank"],
)  # fmt: skip
def test_where_nothing_fits_it_says_what_helps(dataset, tmp_path, sections, ranks, memory, needed, said):
    sections = {**sections, "engine": {"device": "cpu"} | sections.get("engine", {})}
    config = run_config(dataset, tmp_path, train={"global_batch": 4}, **sections)
    limit = None if memory is None else int(memory * 2**30)
    with pytest.raises(ConfigError) as error:
        find_micro_batch(config, ranks, limit, lambda _: AttemptResult(error=SHORT, needed=needed), lambda _: None)
    assert str(error.value) == f"train.micro_batch=1: {said}"


@pytest.mark.usefixtures("run")
def test_json_says_that_nothing_fits(mikoshi, monkeypatch, tmp_path):
    @contextlib.contextmanager
    def none_fits(ranks, memory):
        assert (ranks, memory) == (2, 1 << 29)
        yield lambda _: AttemptResult(error=SHORT, needed=3 << 29)

    monkeypatch.setattr("mikoshi.launch.controller.trials.trial_runner", none_fits)
    command = ("fit-batch", tmp_path / "run.toml", "train.global_batch=4", "--ranks", 2, "--memory", 0.5)
    code, out, (error,) = mikoshi(*command, "--json")
    assert code == 2
    told = json.loads(out)
    assert told["micro_batch"] is None
    assert error == f"error: {told['error']}"
    assert [(one["micro_batch"], one["fits"]) for one in told["tried"]] == [(2, False), (1, False)]
    assert {one["needed"] for one in told["tried"]} == {3 << 29}
    assert mikoshi(*command)[:2] == (2, "")


def test_what_the_ranks_say_together():
    def ended(codes, answers=(), said=()):
        return RanksOutcome(
            ranks=2, codes=codes, said=dict(said), answers={rank: json.dumps(told) for rank, told in dict(answers).items()}
        )

    fine = {"peak": 5, "error": "", "trace": ""}
    assert merge_results(ended({0: DONE, 1: DONE}, {0: fine, 1: fine | {"peak": 9}})) == AttemptResult(9)
    assert merge_results(ended({0: LOST_PEER, 1: FAULT}, {1: {"peak": 0, "error": SHORT, "trace": "t"}})) == AttemptResult(
        0, SHORT, "t"
    )
    assert "rank 1 was killed" in merge_results(ended({0: LOST_PEER, 1: -9})).error
    assert merge_results(ended({0: FAULT, 1: LOST_PEER}, said={0: "it broke\nhere"})).error == "rank 0: it broke"
    assert merge_results(ended({0: DONE, 1: DONE}, {0: fine})).error, "one that left no answer has not done its steps"


def test_errors_in_words():
    from accelerate.utils.memory import should_reduce_batch_size

    def judged(error):
        return should_reduce_batch_size(RuntimeError(failed_attempt(error).error))

    outer = ValueError("a hook failed")
    outer.__cause__ = RuntimeError(SHORT)
    assert judged(outer)
    assert failed_attempt(outer).needed >= memory_in_use() // 2 > 0
    assert judged(MemoryError())
    assert judged(RuntimeError("std::bad_alloc"))
    assert judged(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not judged(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.slow
@pytest.mark.usefixtures("run")
def test_ranks_that_run_out_of_memory(mikoshi, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, errors = mikoshi("fit-batch", tmp_path / "run.toml", "--ranks", 2, "--memory", 0.5, "--json")
    assert (code, errors) == (0, [])
    found = json.loads(out)
    assert found["ranks"] == 2
    assert [one["micro_batch"] for one in found["tried"]] == [32, 16, 8, 4, 2, 1][: len(found["tried"])]
    *short, last = found["tried"]
    assert short, "the whole share of 32 rows has no room in half a GiB"
    assert all(one["why"].startswith("out of memory at the limit of 0.5 GiB (--memory)") for one in short)
    assert all(one["needed"] > 2**28 for one in short)
    assert last == {"micro_batch": found["micro_batch"], "fits": True, "peak": found["peak_bytes"], "why": "", "needed": 0,
                    "seconds": last["seconds"]}  # fmt: skip
    assert 0 < found["peak_bytes"] < 2**30
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


@pytest.mark.slow
@pytest.mark.usefixtures("run")
def test_without_a_limit_the_whole_share_fits(mikoshi, tmp_path):
    code, out, errors = mikoshi("fit-batch", tmp_path / "run.toml", "train.global_batch=8")
    assert (code, out, errors) == (0, "train.micro_batch=8\n", [])


@pytest.mark.slow
@pytest.mark.usefixtures("run")
def test_not_even_one_row(mikoshi, tmp_path):
    code, out, errors = mikoshi("fit-batch", tmp_path / "run.toml", "train.global_batch=2", "--memory", 0.05)
    assert (code, out) == (2, "")
    assert re.match(r"error: train.micro_batch=1: even one row a rank does not fit within --memory 0.05: it needs 0", errors[0])
