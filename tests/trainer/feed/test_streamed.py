"""What a stream sets apart is taken again where an earlier version set it apart, and it is said."""

import json

import pytest

from mikoshi.data.dataset.shards import INDEX, read_index
from mikoshi.data.errors import DataError
from mikoshi.data.sources.sources import open_source
from mikoshi.trainer.config.run import load_config
from mikoshi.trainer.feed.feed import open_feed, recipes
from mikoshi.trainer.feed.streamed import hold_out, stream_fingerprint

RUN = """
[run]
name = "chat"
[model]
vocab = 512
context = 16
layers = 1
width = 16
heads = 2
[data]
path = "apart"
source = "chat.jsonl"
chat = "chatml"
tokenizer = "bytes"
held_out = 0.2
stream = true
[train]
steps = 2
global_batch = 2
context = 16
[eval]
batches = 1
"""


def test_conversations_set_apart_by_earlier_rules_go_on_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = {"role": "assistant", "content": "b"}
    rows = ({"messages": [{"role": "user", "content": f"{n}"}, answer]} for n in range(60))
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(RUN)
    config = load_config(tmp_path / "run.toml", [])
    places = dict.fromkeys(recipes(config.data), "apart")
    hold_out(config, recipes(config.data), places)
    feed = open_feed(config)
    assert "today's" not in feed.description

    ((name, recipe),) = recipes(config.data).items()
    before = stream_fingerprint(recipe, open_source(recipe.spec), before=True)
    index = tmp_path / "apart" / INDEX
    index.write_text(index.read_text().replace(read_index(tmp_path / "apart").recipe, before))
    hold_out(config, recipes(config.data), places)
    feed = open_feed(config)
    assert feed.identity["sources"] == {name: before} and "today's rules for conversations" in feed.description
    other = load_config(tmp_path / "run.toml", ["data.held_out=0.3"])
    with pytest.raises(DataError, match="other files or settings"):
        hold_out(other, recipes(other.data), places)
