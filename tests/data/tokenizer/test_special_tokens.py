"""What begins and ends a document: as the tokenizer's files say, compared with what transformers makes of the same files."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from mikoshi.data.dataset.shards import INDEX, TRAIN, open_shard, parse_index, read_index
from mikoshi.data.errors import DataError
from mikoshi.data.prepare.prepare import Recipe, prepare
from mikoshi.data.sources.text import SourceSpec
from mikoshi.data.tokenizer.special_tokens import legacy_separator
from mikoshi.data.tokenizer.tokenizer import load_saved, load_tokenizer, parse_tokenizer, train_tokenizer

GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


def make(folder, specials, plain=(), post=None, **files):
    """A byte-level tokenizer.json with these tokens, and beside it files of Hugging Face's, by their name."""
    folder.mkdir(exist_ok=True, parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *plain, *alphabet])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    backend.add_tokens([AddedToken(token, special=False) for token in plain])
    if post:
        single = " ".join([*post, "$A"])
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, backend.token_to_id(token)) for token in post]
        )
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


def names(tokenizer):
    name = tokenizer.backend.id_to_token
    return None if tokenizer.bos is None else name(tokenizer.bos), name(tokenizer.separator)


CASES = {
    "gemma": (GEMMA, ["<h1>", "</s>"], ["<bos>"], {}, ("<bos>", "<eos>"), {"<eos>"}),
    "gemma, told": (
        GEMMA, ["</s>", "<end_of_turn>"], ["<bos>"],
        {"tokenizer_config": {"eos_token": "<eos>", "bos_token": "<bos>", "add_bos_token": True},
         "generation_config": {"eos_token_id": [1, 5]}}, ("<bos>", "<eos>"), {"<eos>", "<end_of_turn>"},
    ),
    "deepseek": (
        DEEPSEEK, [], None,
        {"tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": DEEPSEEK[1]}, "add_bos_token": True,
                              "bos_token": {"content": DEEPSEEK[0], "special": True}}},
        (DEEPSEEK[0], DEEPSEEK[1]), {DEEPSEEK[1]},
    ),
    "qwen": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [], None,
        {"tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": None, "add_bos_token": False},
         "generation_config": {"eos_token_id": [2, 0]}}, (None, "<|im_end|>"), {"<|im_end|>", "<|endoftext|>"},
    ),
    "the map": (
        LLAMA3, [], None, {"special_tokens_map": {"eos_token": {"content": "<|eot_id|>"}}}, (None, "<|eot_id|>"),
        {"<|eot_id|>"},
    ),
    "an id": (LLAMA3, [], None, {"generation_config": {"eos_token_id": 2}}, (None, "<|eot_id|>"), {"<|eot_id|>"}),
    "ids of a model": (
        LLAMA3, [], LLAMA3[:1], {"config": {"text_config": {"eos_token_id": [1, 2]}}}, (LLAMA3[0], LLAMA3[1]), set(LLAMA3[1:]),
    ),
    "told not to begin": (
        ["<s>", "</s>"], [], ["<s>"], {"tokenizer_config": {"add_bos_token": False, "bos_token": "<s>"}}, (None, "</s>"),
        {"</s>"},
    ),
    "an odd name": (["<fin>"], [], None, {"tokenizer_config": {"eos_token": "<fin>"}}, (None, "<fin>"), {"<fin>"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_documents_begin_and_end_as_the_files_say(case, tmp_path):
    specials, plain, post, files, expected, stops = CASES[case]
    made = load_tokenizer(make(tmp_path / "in", specials, plain, post, **files))
    assert names(made) == expected
    assert {made.backend.id_to_token(i) for i in made.stops} == stops
    made.save(tmp_path / "tokenizer.json")  # as a run folder keeps it
    saved = load_saved(tmp_path / "tokenizer.json")
    assert (saved.boundaries, saved.fingerprint) == (made.boundaries, made.fingerprint)


def test_what_a_run_folder_keeps_transformers_reads_alike(tmp_path):
    files = {"tokenizer_config": {"eos_token": "<eos>", "bos_token": "<bos>", "add_bos_token": True}}
    made = load_tokenizer(make(tmp_path / "in", GEMMA, ["</s>"], ["<bos>"], **files))
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out" / "tokenizer.json")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.eos_token_id, theirs.bos_token_id) == (made.separator, made.bos)
    assert theirs("a b")["input_ids"] == made.start(made.encode("a b"))


def test_a_name_in_the_settings_goes_first(tmp_path):
    path = make(tmp_path, GEMMA, ["</s>"], ["<bos>"], tokenizer_config={"eos_token": "<eos>"})
    assert names(load_tokenizer(path, separator="</s>", bos="none")) == (None, "</s>")
    assert names(load_tokenizer(path, bos="<pad>")) == ("<pad>", "<eos>")
    both = make(tmp_path / "both", ["<|endoftext|>", "</s>"])
    assert names(load_tokenizer(both, separator="</s>")) == (None, "</s>")


@pytest.mark.parametrize(
    ("specials", "plain", "files", "told"),
    [
        (["<a>"], ["</s>"], {}, "no special token .*it has <a>.*'</s>' is ordinary text in it.*data.separator"),
        (["<|endoftext|>", "</s>"], [], {}, "several .*<|endoftext|>, </s>.*data.separator"),
        (["<s>"], [], {"tokenizer_config": {"eos_token": "<gone>"}}, "eos_token of .*'<gone>': no token of .*data.separator"),
        (["</s>"], [], {"generation_config": {"eos_token_id": 9999}}, "no token of the id 9999.*data.separator"),
        (["</s>"], [], {"tokenizer_config": {"add_bos_token": True}}, "add_bos_token.*data.bos"),
        (["</s>"], [], {"tokenizer_config": []}, "tokenizer_config.json.*no object"),
    ],
)
def test_nothing_is_guessed(specials, plain, files, told, tmp_path):
    path = make(tmp_path, specials, plain, **files)
    with pytest.raises(DataError, match=told):
        load_tokenizer(path)


def test_files_that_are_broken_and_prefixes_of_several_tokens_are_refused(tmp_path):
    path = make(tmp_path / "one", ["</s>"])
    (tmp_path / "one" / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(DataError, match=r"generation_config.json, beside the tokenizer, is not JSON"):
        load_tokenizer(path)
    with pytest.raises(DataError, match=r"writes 2 tokens before a text.*data.bos"):
        load_tokenizer(make(tmp_path / "two", ["</s>", "<g>", "<p>"], post=["<g>", "<p>"]))
    with pytest.raises(DataError, match=r"data.bos = '<q>': no token of"):
        load_tokenizer(path.parent.parent / "two" / "tokenizer.json", bos="<q>")


def test_ids_that_stay_keep_their_fingerprint_and_others_get_another(tmp_path):
    plain = load_tokenizer(make(tmp_path / "a", ["</s>", "<s>"]))
    told = load_tokenizer(make(tmp_path / "b", ["</s>", "<s>"], tokenizer_config={"eos_token": "</s>"}))
    begun = load_tokenizer(make(tmp_path / "c", ["</s>", "<s>"], tokenizer_config={"bos_token": "<s>", "add_bos_token": True}))
    ended = load_tokenizer(make(tmp_path / "d", ["</s>", "<s>"], tokenizer_config={"eos_token": "<s>"}))
    assert plain.fingerprint == plain.digest == told.fingerprint == begun.digest
    assert len({plain.fingerprint, begun.fingerprint, ended.fingerprint}) == 3


def test_a_tokenizer_trained_here_takes_the_names_that_are_asked_for():
    made = train_tokenizer(["some text"] * 3, 300, separator="<end>", bos="<begin>")
    assert names(made) == ("<begin>", "<end>")
    assert made.backend.encode("<end>", add_special_tokens=False).ids != [made.separator], "a text's own is no separator"


def texts(folder, rows=60):
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"word {i} and more"}) + "\n" for i in range(rows)))
    return str(folder / "text.jsonl")


def documents(folder):
    info = read_index(folder)
    for line in info.splits[TRAIN]:
        shard = open_shard(folder / line.file, line)
        yield from np.split(np.asarray(shard.tokens), np.asarray(shard.ends).astype(int)[:-1])


def test_plain_text_is_prepared_as_the_tokenizer_writes_it(tmp_path):
    files = {"tokenizer_config": {"eos_token": "<eos>", "bos_token": "<bos>", "add_bos_token": True}}
    path = make(tmp_path / "t", GEMMA, ["</s>"], ["<bos>"], **files)
    recipe = Recipe(texts(tmp_path), path, held_out=0.2)
    info, _ = prepare(recipe, tmp_path / "data", workers=1)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    found = list(documents(tmp_path / "data"))
    assert all(ids[0] == theirs.bos_token_id and ids[-1] == theirs.eos_token_id for ids in found)
    written = [theirs(f"word {i} and more")["input_ids"] for i in range(60)]
    assert all(ids[:-1].tolist() in written for ids in found)
    assert (info.bos, info.separator, info.vocab) == (2, 1, load_tokenizer(path).vocab)
    assert prepare(recipe, tmp_path / "data", workers=1)[1] is False
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(files["tokenizer_config"] | {"add_bos_token": False}))
    with pytest.raises(DataError, match="made from another source or settings"):
        prepare(recipe, tmp_path / "data", workers=1)
    info, _ = prepare(Recipe(texts(tmp_path), path, bos="none"), tmp_path / "bare", workers=1)
    assert info.bos is None
    assert all(2 not in ids for ids in documents(tmp_path / "bare"))


def test_a_conversation_begins_with_what_its_template_writes_alone(tmp_path):
    path = make(tmp_path / "t", ["</s>", "<s>"], [], ["<s>"])
    (tmp_path / "plain.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    turns = [[{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "well"}] for i in range(60)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    spec = SourceSpec(str(tmp_path / "chat.jsonl"), chat=str(tmp_path / "plain.jinja"))
    prepare(Recipe(spec, path, held_out=0.2), tmp_path / "data", workers=1)
    for ids in documents(tmp_path / "data"):
        assert ids[0] == 1
        assert 1 not in ids[1:]


def test_data_made_before_goes_on_as_it_is(tmp_path):
    """As an earlier version wrote it: the first known name ends documents, nothing begins them, and the index does not say."""
    path = make(tmp_path / "t", GEMMA, ["</s>"], ["<bos>"], tokenizer_config={"eos_token": "<eos>"})
    recipe = Recipe(texts(tmp_path), path)
    made, _ = prepare(Recipe(recipe.source, path, separator="</s>", bos="none"), tmp_path / "data", workers=1)
    tokenizer = load_tokenizer(path, separator="</s>", bos="none")
    assert (made.separator, made.tokenizer) == (legacy_separator(tokenizer.backend), tokenizer.digest)
    raw = json.loads((tmp_path / "data" / INDEX).read_text())
    old = {key: value for key, value in raw.items() if key not in ("bos", "stops")}
    (tmp_path / "data" / INDEX).write_text(json.dumps(old))
    info, new = prepare(recipe, tmp_path / "data", workers=1)
    assert (new, info.bos, info.separator, info.splits) == (False, None, made.separator, made.splits)
    content = (tmp_path / "data" / "tokenizer.json").read_bytes()
    assert parse_tokenizer(content, "it", info.boundaries).fingerprint == info.tokenizer
    with pytest.raises(DataError, match="made from another source or settings"):
        prepare(Recipe(recipe.source, path, bos="<bos>"), tmp_path / "data", workers=1)
    with pytest.raises(DataError, match="none of the vocabulary"):
        parse_index(json.dumps(raw | {"bos": 1 << 20}).encode(), "it")
