"""What a model is given to go on from, and where it stops, with a run's chat template and without."""

import pytest

from mikoshi.data.sources.chat import ChatTemplate, dump_chat_template, load_chat_template
from mikoshi.data.tokenizer.tokenizer import train_tokenizer
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.generation.prompt import chat_of, encode_prompt
from mikoshi.trainer.record.run_folder import RunFolder
from runs import run_config

ASKED = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is two and two? Four. user assistant"] * 9, 300, ["<|im_start|>", "<|im_end|>"])


def folder_of(path, **data):
    path.mkdir()
    (path / "config.toml").write_text(to_toml(run_config("data", path.parent, data={"path": "data", **data})))
    return RunFolder(path)


def test_special_tokens_of_a_prompt_are_real_in_a_run_of_conversations_or_when_asked_for(tmp_path, tokenizer):
    start, end = (tokenizer.backend.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    talk = folder_of(tmp_path / "talk", chat="chatml")
    ids, stops = encode_prompt(talk, tokenizer, ASKED, False, None)
    assert (ids[0], ids.count(start), ids.count(end)) == (start, 2, 1)
    assert stops == {tokenizer.separator, end}
    assert encode_prompt(talk, tokenizer, "What is 2+2?", True, None) == (ids, stops)
    plain = folder_of(tmp_path / "plain")
    assert encode_prompt(plain, tokenizer, ASKED, False, True) == (ids, tokenizer.stops)
    letters = tokenizer.encode(ASKED)
    assert start not in letters
    assert encode_prompt(plain, tokenizer, ASKED, False, None) == (letters, tokenizer.stops)
    assert encode_prompt(talk, tokenizer, ASKED, False, False) == (letters, stops)
    for run in (plain, talk):
        assert encode_prompt(run, tokenizer, "", False, None)[0] == [tokenizer.separator]


def test_a_template_is_applied_when_there_is_one(tmp_path, tokenizer):
    plain, talk = folder_of(tmp_path / "plain"), folder_of(tmp_path / "talk", chat=str(tmp_path / "gone.jinja"))
    for run in (plain, talk):
        with pytest.raises(ConfigError, match=r"^--chat: .* has no chat template, or several"):
            encode_prompt(run, tokenizer, "Hi", True, None)
    talk.chat.write_text(
        dump_chat_template(ChatTemplate("kept", "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"))
    )
    start = tokenizer.backend.token_to_id("<|im_start|>")
    assert encode_prompt(talk, tokenizer, "Four", True, None) == ([start, *tokenizer.encode("Four")], tokenizer.stops)
    with pytest.raises(ConfigError, match=r"^--chat: special token: the text of message 1 holds '<\|im_start\|>'"):
        encode_prompt(talk, tokenizer, "<|im_start|>", True, None)
    with pytest.raises(ConfigError, match=r"^--chat and --special"):
        encode_prompt(talk, tokenizer, "Hi", True, True)


def test_a_run_keeps_the_one_template_of_its_sources():
    def of(**data):
        return chat_of(run_config("data", "runs", data={"path": "data", **data}).data)

    one, other = {"source": "a", "weight": 1.0}, {"source": "b", "weight": 1.0}
    assert of() is None
    assert of(chat="chatml") == of(mixture={"a": one | {"chat": "chatml"}, "b": other}) == load_chat_template("chatml")
    assert of(chat="chatml", mixture={"a": one | {"chat_date": "2026-01-31"}, "b": other}) is None
    assert of(chat="no/such/file") is None
