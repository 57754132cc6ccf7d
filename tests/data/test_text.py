"""Filters, templates and chat templates: what they may say, and that a conversation is rendered as transformers does."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.chat import CHATML, ChatProblem, ChatTemplate, chat_parts, load_chat
from data.errors import DataError
from data.sources import SourceSpec, documents, open_source, pieces
from data.text import reading

ROW = {"text": "some text", "lang": "en", "stars": 12, "share": 0.5, "fork": False, "note": None, "tags": ["a", "b"]}


def kept(where, row=ROW):
    return reading(SourceSpec("x", where=where), None).row("here:1", row)


@pytest.mark.parametrize(
    "where",
    [
        'lang == "en" and stars >= 10',
        "not fork", "1 < stars <= 12", "not 20 > stars > 15", 'lang in ["de", "en"]', '"some" in text', "note == None",
        "len(text) == 9 and len(tags) == 2", "fork or share == .5", "stars > -1", '"c" not in tags', "lang",
        "(stars, 1) == (12, 1)",
        'lang == "de" or (stars != 3 and not (stars < 2))', "stars == True or True",
    ],
)  # fmt: skip
def test_a_filter_means_what_python_means(where):
    for change in ({}, {"lang": "de"}, {"stars": 1}, {"fork": True, "tags": ["c"]}):
        row = {**ROW, **change}
        assert kept(where, row).dropped is not bool(eval(where, {"__builtins__": {}, "len": len}, row))
    assert kept(where).text == "some text"


@pytest.mark.parametrize(
    "where",
    [
        "text.upper()", "__import__('os')", "tags[0]", "len.x", "len(text, text)", "len(*tags)", "(lambda: 1)()", "stars + 1",
        "2 ** 9",
        "[x for x in tags]", "f'{text}'", "stars is None", "lang == b'en'", "(y := 1)", "text if fork else lang", "lang = 1",
        "",
        " ",
        "stars >", "not " * 5000 + "fork", "(" * 5000, "len", "{1: 2}", "-stars > 1", "...", "1j == 1",
    ],
)  # fmt: skip
def test_a_filter_says_nothing_else(tmp_path, where):
    if not where.strip():
        where = where or "\n"
    with pytest.raises(DataError, match="it is made of column names, constants"):
        open_source(SourceSpec(str(tmp_path), where=where))


def test_a_filter_that_cannot_be_answered_is_a_problem_and_no_drop():
    for where, problem in (
        ("votes > 3", "no column: 'votes' is not there; it has text"),
        ("lang > 3", "no answer to where: '>' not"),
    ):
        document = kept(where)
        assert document.text is None and not document.dropped and document.problem.startswith(problem)


def test_a_template_puts_columns_together():
    def filled(template, row=ROW):
        return reading(SourceSpec("x", template=template), None).row("here:1", row)

    assert filled("{lang}/{stars} {{{text}}}\n").text == "en/12 {some text}\n"
    assert filled("{text}{share}").text == "some text0.5"
    assert filled("{title}").problem.startswith("no column: 'title' is not there")
    assert filled("{note}").problem == "no text: column 'note' of the template holds nothing (null)"
    assert filled("{text}", {"text": "\ud800"}).problem == "not text: half of a surrogate pair at character 0"
    for template in ("{text.upper}", "{tags[0]}", "{text!r}", "{stars:>9}", "{}", "{text", "}", "no column"):
        with pytest.raises(DataError, match=r"^data\.template = "):
            filled(template)


PLAIN = (
    "{{ bos_token }}{% for m in messages %}\n"
    "  {%- if m.role == 'system' %}<<{{ m.content | trim }}>>{% continue %}{% endif %}\n"
    "[{{ m['role'] }}]{{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}\n"
    "  {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = "{% for m in messages %}{% if loop.last or m.role == 'user' %}<{{ m.content }}>{% endif %}{% endfor %}"
JSONISH = "{% for m in messages %}{{ m | tojson }};{% endfor %}"
TALKS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello <you> & 'me' äöü 🙂"}],
    [
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": "One\ntwo"},
        {"role": "assistant", "content": "three "},
        {"role": "user", "content": "four"},
        {"role": "assistant", "content": "\nfive"},
        {"role": "user", "content": "six?"},
    ],
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def tokenizer():
    """Bytes, and the special tokens that the templates here write."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENS)


@pytest.mark.parametrize("talk", TALKS, ids=["short", "long"])
@pytest.mark.parametrize("text", [load_chat(CHATML).text, PLAIN, JSONISH], ids=["chatml", "plain", "json"])
def test_the_text_is_that_of_transformers(text, talk):
    template = ChatTemplate("t", text, tuple(TOKENS.items()))
    parts = chat_parts(template, talk)
    assert "".join(p.text for p in parts) == tokenizer().apply_chat_template(talk, chat_template=text, tokenize=False)


@pytest.mark.parametrize("talk", TALKS, ids=["short", "long"])
def test_what_is_learned_is_the_mask_of_transformers(talk):
    chatml, theirs = load_chat(CHATML), tokenizer()
    whole = theirs.apply_chat_template(
        talk, chat_template=chatml.text, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    ids, mask = [], []
    for part in chat_parts(chatml, talk):
        stretch = theirs(part.text, add_special_tokens=False)["input_ids"]
        ids += stretch
        mask += [int(part.learned)] * len(stretch)
    assert (ids, mask) == (whole["input_ids"], whole["assistant_masks"])
    assert theirs.convert_tokens_to_ids("<|im_end|>") in [i for i, m in zip(ids, mask, strict=True) if m]


def test_answers_without_marks_are_told_by_the_beginnings_of_the_conversation():
    template = ChatTemplate("t", PLAIN, tuple(TOKENS.items()))
    parts = chat_parts(template, TALKS[1])
    assert [p.text for p in parts if p.learned] == ["three </s>\n", "\nfive</s>\n"]
    assert [p.text for p in parts if not p.learned] == [
        "<s><<Be brief.>>[user]One\ntwo\n[assistant]",
        "[user]four\n[assistant]",
        "[user]six?\n",
    ]
    assert all(p.special for p in parts)


def talk(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (talk("a", "b", roles=("user", "robot")), "unknown role: 'robot' in message 2; known are system"),
        (talk("a"), "no answer: the conversation has no message of the assistant"),
        (talk("a", ""), "empty content: message 2, of the assistant"),
        (talk(None, "a"), "empty content: message 1, of the user"),
        (talk("a", 5), "no text: the content of message 2 is a int"),
        (talk("a", [{"type": "text", "text": "b"}]), "no text: the content of message 2 is a list"),
        (talk("a<|im_end|>", "b"), "special token: the text of message 1 holds '<|im_end|>'"),
        (talk("a", "say <|eot|>"), "special token: the text of message 2 holds '<|eot|>'"),
        (talk("a", "\ufdd0"), "special token: the text of message 2"),
        (talk("a", "\ud800"), "not text: half of a surrogate pair at character 0 of message 2"),
        ([], "not a conversation: the list of messages is empty"),
        ("text", "not a conversation: the list of messages is a str"),
        ([{"from": "human", "value": "a"}], "not a conversation: message 1 has from, value; a message has role and content"),
        (["a"], "not a conversation: message 1 is a str"),
    ],
)
def test_a_conversation_that_cannot_be_learned_from_says_why(messages, problem):
    with pytest.raises(ChatProblem) as caught:
        chat_parts(load_chat(CHATML), messages, frozenset({"<|eot|>"}))
    assert str(caught.value).startswith(problem)


def test_templates_that_cannot_do_are_refused_by_name():
    with pytest.raises(ChatProblem, match="under 'forgets' the conversation up to message 2 is not how the whole one begins"):
        chat_parts(ChatTemplate("forgets", FORGETFUL), TALKS[1][1:])
    with pytest.raises(ChatProblem, match="'strict' refuses the conversation: only users"):
        chat_parts(ChatTemplate("strict", "{{ raise_exception('only users') }}"), TALKS[0])
    with pytest.raises(ChatProblem, match="no answer: the template 'deaf'"):
        chat_parts(ChatTemplate("deaf", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"), TALKS[0])
    for attack in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__.os }}"):
        with pytest.raises(ChatProblem, match="refuses the conversation"):
            chat_parts(ChatTemplate("attack", attack), TALKS[0])


def test_the_day_is_not_in_the_text():
    text = (
        "{{ strftime_now('%Y') if strftime_now is defined else 'no date' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert chat_parts(ChatTemplate("dated", text), TALKS[0])[0].text == "no dateHi"


def test_a_template_comes_with_its_tokenizers_config(tmp_path):
    config = {
        "bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None, "chat_template": PLAIN,
        "added_tokens_decoder": {"7": {"content": "<|tool|>", "special": True}, "8": {"content": "plain", "special": False}},
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = load_chat(str(tmp_path))
    assert template.text == PLAIN and template.tokens == (("bos_token", "<s>"), ("eos_token", "</s>"))
    assert template.specials == {"<s>", "</s>", "<|tool|>"}
    (tmp_path / "chat_template.jinja").write_text(JSONISH)
    assert load_chat(str(tmp_path)).text == JSONISH
    assert load_chat(str(tmp_path / "chat_template.jinja")).tokens == template.tokens
    config["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": PLAIN}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat(str(tmp_path / "tokenizer_config.json")).text == PLAIN
    (tmp_path / "other.jinja").write_text("{% if %}")
    (tmp_path / "none.json").write_text("{}")
    for bad in ("other.jinja", "none.json", "missing.jinja"):
        with pytest.raises(DataError, match=rf"^data\.chat = .*{bad}"):
            load_chat(str(tmp_path / bad))


def test_rows_of_files_become_conversations(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = [{"prompt": "Q1", "response": "A1"}, {"prompt": "Q2", "response": "A2"}]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in pairs) + json.dumps({"messages": TALKS[0]}) + "\n"
    )
    pq.write_table(pa.Table.from_pylist([{"messages": t, "id": 1} for t in TALKS]), tmp_path / "b.parquet")
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "c.parquet")
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]), tmp_path / "d.parquet")
    source = open_source(SourceSpec(str(tmp_path), chat="chatml", on_invalid="skip"))
    found = [d for piece in pieces(source, 1 << 20) for d in documents(source, piece, {"A2"})]
    chatml = load_chat(CHATML)
    two = {"a.jsonl:2", "c.parquet:2"}
    for document in found[:-1]:
        if document.name in two:
            assert document.problem.startswith("special token: the text of message 2 holds 'A2'")
        else:
            assert "".join(p.text for p in document.parts) == document.text
    assert found[0].parts == chat_parts(chatml, talk("Q1", "A1")) == found[5].parts
    assert found[2].parts == found[3].parts == chat_parts(chatml, TALKS[0])
    assert found[4].parts == chat_parts(chatml, TALKS[1])
    assert (found[-1].name, found[-1].problem) == ("d.parquet", "no column: 'messages' is not there; it has text")
