"""What of a conversation is learned, under templates of all kinds, and what is refused because it would be lost."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mikoshi.data.errors import DataError
from mikoshi.data.prepare.piece import encode_documents
from mikoshi.data.sources.chat import (
    CHATML,
    ChatProblem,
    ChatTemplate,
    chat_parts,
    chat_prompt,
    chat_samples,
    dump_chat_template,
    end_of_turn,
    load_chat_template,
    parse_chat_template,
)
from mikoshi.data.sources.sources import SourceSpec, documents, open_source, pieces
from mikoshi.data.sources.text import Document, row_reader
from mikoshi.data.tokenizer.tokenizer import parse_tokenizer, train_tokenizer

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
@pytest.mark.parametrize("text", [load_chat_template(CHATML).text, PLAIN, JSONISH], ids=["chatml", "plain", "json"])
def test_the_text_is_that_of_transformers(text, talk):
    template = ChatTemplate("t", text, tuple(TOKENS.items()))
    parts = chat_parts(template, talk)
    assert "".join(p.text for p in parts) == tokenizer().apply_chat_template(talk, chat_template=text, tokenize=False)


@pytest.mark.parametrize("talk", TALKS, ids=["short", "long"])
def test_what_is_learned_is_the_mask_of_transformers(talk):
    chatml, theirs = load_chat_template(CHATML), tokenizer()
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
        chat_parts(load_chat_template(CHATML), messages, frozenset({"<|eot|>"}))
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
    template = load_chat_template(str(tmp_path))
    assert template.text == PLAIN and template.tokens == (("bos_token", "<s>"), ("eos_token", "</s>"))
    assert template.specials == {"<s>", "</s>", "<|tool|>"}
    (tmp_path / "chat_template.jinja").write_text(JSONISH)
    assert load_chat_template(str(tmp_path)).text == JSONISH
    assert load_chat_template(str(tmp_path / "chat_template.jinja")).tokens == template.tokens
    config["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": PLAIN}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(str(tmp_path / "tokenizer_config.json")).text == PLAIN
    (tmp_path / "other.jinja").write_text("{% if %}")
    (tmp_path / "none.json").write_text("{}")
    for bad in ("other.jinja", "none.json", "missing.jinja"):
        with pytest.raises(DataError, match=rf"^data\.chat = .*{bad}"):
            load_chat_template(str(tmp_path / bad))


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
    chatml = load_chat_template(CHATML)
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


def cut(template, messages, specials=frozenset(), tools=None):
    """The texts that a conversation becomes, each as pairs of text and whether it is learned."""
    return [[(p.text, p.learned) for p in parts] for parts in chat_samples(template, messages, specials, tools)]


def learned(template, messages, specials=frozenset(), tools=None):
    (sample,) = cut(template, messages, specials, tools)
    return [text for text, flag in sample if flag]


TURNS = talk("a", "b", "c", "d")
HEADED = (
    "{% for m in messages %}<|start|>{{ m.role }}<|head|>\n{{ '\\n' }}{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if PROMPT %}<|start|>assistant<|head|>\n{{ '\\n' }}{% endif %}"
)
ENDS = {  # how templates end a turn: with the learned texts of two turns
    "end of text in place of a prompt": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{{ '' }}{% else %}{{ eos_token }}{% endif %}",
        ["b<|end|>\n", "d<|end|>\n</s>"],
    ),
    "a prompt when asked for": (HEADED.replace("PROMPT", "add_generation_prompt"), ["b<|eot|>", "d<|eot|>"]),
    "a prompt in any case": (HEADED.replace("PROMPT", "true"), ["b<|eot|>", "d<|eot|>"]),
    "a plain prompt in any case": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor %}{{ 'assistant: ' }}", ["b\n", "d\n"],
    ),
    "an end that is not marked": (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>{{ '\\n' }}{% endfor %}",
        ["b<|im_end|>", "d<|im_end|>"],
    ),
    "no prompt": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>"
        "{% endif %}{% endfor %}", [" b </s>", " d </s>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDS)
def test_an_answer_is_learned_with_its_end_and_nothing_of_the_next_turn(kind):
    text, wanted = ENDS[kind]
    template = ChatTemplate(kind, text, tuple(TOKENS.items()))
    (sample,) = cut(template, TURNS)
    answers = [text for text, flag in sample if flag]
    assert [a.removesuffix("\n") for a in answers] == [w.removesuffix("\n") for w in wanted]
    assert learned(template, TURNS[:2])[-1:] == [wanted[-1].replace("d", "b", 1)]
    theirs = tokenizer().apply_chat_template(TURNS, chat_template=text, tokenize=False)
    assert "".join(text for text, _ in sample) == theirs


CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
ASKED = [
    {"role": "user", "content": "time?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "12:00", "name": "now", "tool_call_id": "1"},
    {"role": "assistant", "content": "Noon."},
]
THOUGHT = [*talk("a", "b"), {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "reasoning_content": "why"}]
CALLING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}</s>{% endfor %}"
)


@pytest.mark.parametrize(
    ("messages", "tools", "left_out"),
    [
        (ASKED, None, "'tool_calls' of message 2"),
        (THOUGHT, None, "'reasoning_content' of message 4"),
        ([*talk("a"), {"role": "assistant", "content": "b", "thinking": "b"}], None, "'thinking' of message 2"),
        ([*talk("a"), {"role": "assistant", "content": "b", "function_call": CALL["function"]}], None, "'function_call'"),
        ([{"role": "user", "name": "Ann", "content": "a"}, *talk("a", "b")[1:]], None, "'name' of message 1"),
        ([*talk("a"), {"role": "assistant", "content": "b", "refusal": "no"}], None, "'refusal' of message 2"),
        (TURNS, [CALL], "the column of tools"),
        (TURNS, json.dumps([CALL]), "the column of tools"),
    ],
)
def test_what_a_template_does_not_write_is_named(messages, tools, left_out):
    with pytest.raises(ChatProblem, match=f"^not written: the template 'chatml' leaves out {left_out}"):
        chat_parts(load_chat_template(CHATML), messages, tools=tools)


def test_what_a_template_writes_is_read():
    template = ChatTemplate("calling", CALLING)
    assert learned(template, ASKED) == ['<assistant>now({"zone": "UTC"})</s>', "<assistant>Noon.</s>"]
    assert learned(template, THOUGHT)[-1] == "<assistant>whyd</s>"
    # By chance the same letters stand elsewhere: the name of the function is lost all the same.
    with pytest.raises(ChatProblem, match=r"leaves out 'tool_calls' of message 2"):
        chat_parts(ChatTemplate("half", CALLING.replace("c.function.name", "'now'")), ASKED)
    with pytest.raises(ChatProblem, match=r"leaves out 'tool_calls \(the arguments\)' of message 2"):
        chat_parts(ChatTemplate("half", CALLING.replace("c.function.arguments | tojson", "''")), ASKED)
    about = [{**message, "id": 7, "created_at": "today"} for message in TURNS]
    assert cut(load_chat_template(CHATML), about) == cut(load_chat_template(CHATML), TURNS)


def test_tools_come_from_their_column_or_from_json(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(
        "{% if tools %}TOOLS:{{ tools | tojson }}|{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    template = load_chat_template(str(tmp_path))
    how = row_reader(SourceSpec("x", chat=str(tmp_path)), template)
    for tools in ([CALL], json.dumps([CALL]), [json.dumps(CALL)]):
        document = how.row("here:1", {"messages": TURNS, "tools": tools})
        assert document.text.startswith(f"TOOLS:{json.dumps([CALL])}|[user]a")
    for nothing in (None, [], "", "[]", "null"):
        assert how.row("here:1", {"messages": TURNS, "tools": nothing}).text.startswith("[user]a")
    for bad in ("{", "3", ["x"], [3], {"a": 1}):
        assert how.row("here:1", {"messages": TURNS, "tools": bad}).problem.startswith("tools: the column ")
    assert "<|im_end|>" in how.row("x", {"messages": TURNS, "tools": [{"name": "<|im_end|>"}]}).text  # no token that is known
    strict = row_reader(SourceSpec("x", chat=str(tmp_path)), template, frozenset({"<|im_end|>"}))
    assert strict.row("x", {"messages": TURNS, "tools": [{"name": "<|im_end|>"}]}).problem.startswith("special token")


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_a_message_that_says_so_is_not_learned(key):
    for text in (load_chat_template(CHATML).text, ENDS["a prompt when asked for"][0]):
        template = ChatTemplate("t", text)
        (sample,) = cut(template, [TURNS[0], TURNS[1] | {key: 0}, TURNS[2], TURNS[3] | {key: True}])
        (other,) = cut(template, TURNS)
        assert [(t, f) for t, f in sample if t.startswith(("b<", "d<"))] == [(t, t[0] == "d") for t, _ in other if t[0] in "bd"]
        assert "".join(t for t, _ in sample) == "".join(t for t, _ in other)
        for messages, problem in (
            ([TURNS[0], TURNS[1] | {key: False}], "no answer: every message of the assistant"),
            ([TURNS[0], TURNS[1] | {key: 0.5}], f"weight: {key} of message 2 is 0.5: a message is learned"),
            ([TURNS[0] | {key: 1}, TURNS[1]], f"weight: {key} of message 1, of the user, is 1: answers alone"),
        ):
            with pytest.raises(ChatProblem, match=f"^{problem}"):
                chat_parts(template, messages)
        assert cut(template, [TURNS[0] | {key: 0}, TURNS[1] | {key: None}]) == cut(template, TURNS[:2])


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}{% if m.role == 'assistant' and loop.last %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)


def test_an_answer_that_is_rewritten_once_the_user_goes_on_is_a_text_without_what_follows():
    text = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    samples = chat_samples(ChatTemplate("qwen", text), talk("a", "b", "and?"))
    assert [[(p.text, p.learned) for p in parts] for parts in samples] == [
        [("[user]a[assistant]", False), ("<think></think>b", True)]
    ]


def test_where_the_past_is_rewritten_each_answer_is_a_text_of_its_own(tmp_path):
    """As Qwen 3 does it, where the reasoning of earlier answers is left out: the model sees each as it will in use."""
    told = [TURNS[0], TURNS[1] | {"reasoning_content": "r1"}, TURNS[2], TURNS[3] | {"reasoning_content": "r2"}]
    template = ChatTemplate("thinking", THINKING)
    first, second = cut(template, told)
    assert [t for t, flag in first if flag] == ["<think>r1</think>b<|im_end|>\n"]
    assert [t for t, flag in second if flag] == ["<think>r2</think>d<|im_end|>\n"]
    theirs = tokenizer().apply_chat_template(told, chat_template=THINKING, tokenize=False)
    assert "".join(t for t, _ in second) == theirs
    assert cut(template, [told[0], told[1] | {"weight": 0}, *told[2:]]) == [second]
    # In files they are documents of one row, on one side of the held-out split.
    (tmp_path / "t.jinja").write_text(THINKING)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": told}) + "\n")
    source = open_source(SourceSpec(str(tmp_path / "a.jsonl"), chat=str(tmp_path / "t.jinja")))
    one, two = [d for piece in pieces(source, 1 << 20) for d in documents(source, piece)]
    assert ["".join(t for t, _ in s) for s in (first, second)] == [one.text, two.text]
    assert one.split_key == two.split_key == one.text and not one.more and two.parts


def test_a_name_that_is_not_defined_is_an_error(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    with pytest.raises(ChatProblem, match=r"'eos_token' is not defined; tokenizer_config\.json or special_tokens_map"):
        chat_parts(load_chat_template(str(tmp_path)), TURNS)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert learned(load_chat_template(str(tmp_path)), TURNS) == ["b</s>", "d</s>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    assert learned(load_chat_template(str(tmp_path)), TURNS) == ["b<eos>", "d<eos>"]
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))  # it has none, and says so
    assert learned(load_chat_template(str(tmp_path)), TURNS) == ["b", "d"]
    asking = "{% if enable_thinking is defined and x %}{% endif %}{{ messages[0].nothing }}{{ y if false }}"
    assert learned(ChatTemplate("t", asking + "{% for m in messages %}{{ m.content }}{% endfor %}"), TURNS) == ["b", "d"]


def test_the_day_is_the_one_that_is_given(tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{{ strftime_now('%d %B %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ChatProblem, match=r"it writes the day \('strftime_now'\), which is not given: set data\.chat_date"):
        chat_parts(load_chat_template(str(tmp_path / "t.jinja")), TURNS)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    told = []
    for date in ("2026-01-31", "2026-02-01"):
        source = open_source(SourceSpec(str(tmp_path / "a.jsonl"), chat=str(tmp_path / "t.jinja"), chat_date=date))
        told.append(source.describe())
        (document,) = documents(source, pieces(source, 1 << 20)[0])
        assert document.text.startswith({"2026-01-31": "31 January 2026", "2026-02-01": "01 February 2026"}[date])
    assert told[0] != told[1]
    with pytest.raises(DataError, match=r"^data\.chat_date = 'today' is no day"):
        load_chat_template(CHATML, "today")


def test_texts_in_a_list_are_read_where_the_template_writes_them():
    listed = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TURNS]
    text = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"
    assert learned(ChatTemplate("lists", text), listed) == ["<assistant>b</s>", "<assistant>d</s>"]
    printed = ChatTemplate("prints", "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}")
    with pytest.raises(ChatProblem, match="no text: the content of message 1 is a list, and the template 'prints' does not"):
        chat_parts(printed, listed)
    for part in ({"type": "image"}, {"type": "text"}, "b"):
        with pytest.raises(ChatProblem, match="no text: the content of message 2 is a list with a part"):
            chat_parts(ChatTemplate("lists", text), [TURNS[0], {"role": "assistant", "content": [part]}])


def test_a_template_is_the_same_after_it_was_written():
    template = ChatTemplate("t", PLAIN, tuple(TOKENS.items()), frozenset({"<s>"}), frozenset({"pad_token"}), "2026-01-31")
    again = parse_chat_template(dump_chat_template(template))
    assert again == template and again.fingerprint == template.fingerprint
    assert load_chat_template(CHATML).fingerprint != load_chat_template(CHATML, "2026-01-31").fingerprint
    assert (end_of_turn(template, frozenset(TOKENS.values())), end_of_turn(template, frozenset())) == ("</s>", "")
    assert chat_prompt(load_chat_template(CHATML), "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def templates_of_trl():
    found = importlib.util.find_spec("trl")
    places = [Path(place) / "chat_templates" for place in (found.submodule_search_locations or []) if found] if found else []
    return sorted(file for place in places for file in place.glob("*.jinja"))


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed: its templates are not at hand")
def test_templates_of_trl_are_read_or_refused_by_name():
    """Whatever is read is the text of transformers, and what is learned its mask where there are marks."""
    tokens = {**TOKENS, "pad_token": "<pad>", "image_token": "<image>", "unk_token": "<unk>"}
    read = 0
    for file in templates_of_trl():
        text = file.read_text(encoding="utf-8").replace("strftime_now", "'2026-01-31' or strftime_now")
        template = ChatTemplate(file.stem, text, tuple(tokens.items()))
        for messages in (TURNS[:2], TURNS, [*TURNS, *TURNS]):
            try:
                samples = chat_samples(template, messages)
            except ChatProblem as problem:
                assert template.name in str(problem)
                continue
            (theirs,), (marks,) = render_jinja_template(
                [messages], chat_template=text, return_assistant_tokens_mask=True, **tokens
            )
            assert "".join(p.text for p in samples[-1]) == theirs
            if marks:
                flags = [any(a <= at < b for a, b in marks) for at in range(len(theirs))]
                assert [p.learned for p in samples[0] for _ in p.text] == flags
            read += 1
    assert read >= 0.8 * 3 * len(templates_of_trl())


WORDS = "Was ist 2+2?\n\n  Four. naïve 🙂 and a b c d  [INST] user assistant Fünf"
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{% generation %}"
    "{{ ' ' + m.content + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def kinds_of_tokenizers():
    """Pre-tokenizers, normalizers and post-processors as those of well-known models."""
    level, byte = pre_tokenizers.ByteLevel(add_prefix_space=False), sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    space, underline = normalizers.Replace(" ", "▁"), sorted({*WORDS.replace(" ", "▁"), "▁"})
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), space])
    first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return {  # alphabet, normalizer, pre-tokenizer, post-processor
        "gpt-2, smollm": (byte, None, level, processors.ByteLevel(trim_offsets=True)),
        "llama 3": (byte, None, whole, processors.ByteLevel(trim_offsets=False)),
        "qwen": (byte, normalizers.NFC(), level, processors.ByteLevel(trim_offsets=False)),
        "llama 2": (underline, prepend, None, processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])),
        "mistral": (underline, None, first, processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])),
        "gemma": (underline, space, split, processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])),
    }


@pytest.mark.parametrize("kind", kinds_of_tokenizers())
def test_ids_and_mask_are_those_of_transformers_under_every_kind_of_tokenizer(kind):
    alphabet, normalizer, before, after = kinds_of_tokenizers()[kind]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    space, f, o = ("Ġ", "F", "o") if "Ġ" in vocab else ("▁", "F", "o")
    merges = [(space, f), (f, o), (space, space), (".", space)]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True))
    backend.post_processor = after
    if normalizer is not None:
        backend.normalizer = normalizer
    if before is not None:
        backend.pre_tokenizer = before
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    theirs, ours = PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENS), parse_tokenizer(backend.to_str().encode(), "t")
    template = ChatTemplate("t", MARKED, tuple(TOKENS.items()))
    for messages in (talk("Was ist 2+2?", "Four."), talk(" a b", "Four.\n\n  Fünf", "c  d\n", " naïve 🙂 and")):
        whole = theirs.apply_chat_template(
            messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        parts = chat_parts(template, messages, ours.special_tokens)
        ((ids, flags),) = encode_documents(ours, [Document("d", "".join(p.text for p in parts), parts=parts)])
        assert ids[:-1].tolist() == whole["input_ids"]
        if "gpt-2" not in kind:  # there transformers does not find the space that an answer begins with
            assert flags[:-1].tolist() == [bool(flag) for flag in whole["assistant_masks"]]
        assert ours.decode(ids[flags].tolist()).count("</s>") == len(messages) // 2
        assert not flags[-1]  # </s> is what generation stops at already


GEMMA_END = "{% for m in messages %}{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
TRL_END = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)


def test_the_separator_is_learned_where_nothing_else_ends_the_text():
    ours = train_tokenizer([WORDS] * 9, 300, ["<|im_start|>", "<|im_end|>"])
    plain = ChatTemplate("plain", "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n' }}{% endfor %}")
    ending = ChatTemplate("ending", "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    for template, messages, wanted in (
        (load_chat_template(CHATML), talk("a", "b"), ["b<|im_end|>\n<|endoftext|>"]),
        (load_chat_template(CHATML), talk("a", "b", "c", "d"), ["b<|im_end|>", "d<|im_end|>\n<|endoftext|>"]),
        (load_chat_template(CHATML), talk("a", "b", "c"), ["b<|im_end|>"]),
        (
            load_chat_template(CHATML),
            [*talk("a", "b", "c"), {"role": "assistant", "content": "d", "weight": 0}],
            ["b<|im_end|>"],
        ),
        (plain, talk("a", "b"), ["assistant: b\n<|endoftext|>"]),
        (ending, talk("a", "b"), ["b<|endoftext|>"]),
        # A turn's end of its own, which the tokenizer's files do not name as a stop: Llama 3, Gemma, TRL's marked templates.
        (
            ChatTemplate("llama", "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"),
            talk("a", "b"),
            ["b<|im_end|>"],
        ),
        (ChatTemplate("gemma", GEMMA_END), talk("a", "b"), ["b<|im_end|>\n"]),
        (ChatTemplate("trl", TRL_END), talk("a", "b"), ["b<|im_end|>"]),
    ):
        parts = chat_parts(template, messages)
        ((ids, flags),) = encode_documents(ours, [Document("d", "".join(p.text for p in parts), parts=parts)])
        edges = [0, *(1 + i for i in range(len(ids) - 1) if flags[i] != flags[i + 1]), len(ids)]
        told = [(ours.decode(ids[a:b].tolist()), flags[a]) for a, b in itertools.pairwise(edges)]
        assert [text for text, flag in told if flag] == wanted
