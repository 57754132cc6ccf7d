"""Filters, templates and chat templates: what they may say, and that a conversation is rendered as transformers does."""

import pytest

from mikoshi.data.errors import DataError
from mikoshi.data.sources.sources import SourceSpec, open_source
from mikoshi.data.sources.text import row_reader

ROW = {"text": "some text", "lang": "en", "stars": 12, "share": 0.5, "fork": False, "note": None, "tags": ["a", "b"]}


def kept(where, row=ROW):
    return row_reader(SourceSpec("x", where=where), None).row("here:1", row)


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
        return row_reader(SourceSpec("x", template=template), None).row("here:1", row)

    assert filled("{lang}/{stars} {{{text}}}\n").text == "en/12 {some text}\n"
    assert filled("{text}{share}").text == "some text0.5"
    assert filled("{title}").problem.startswith("no column: 'title' is not there")
    assert filled("{note}").problem == "no text: column 'note' of the template holds nothing (null)"
    assert filled("{text}", {"text": "\ud800"}).problem == "not text: half of a surrogate pair at character 0"
    for template in ("{text.upper}", "{tags[0]}", "{text!r}", "{stars:>9}", "{}", "{text", "}", "no column"):
        with pytest.raises(DataError, match=r"^data\.template = "):
            filled(template)
