"""A row becomes a document in the same way whatever file it is from, or has a one-line problem.

A problem reads "kind: detail"; problems are counted by kind.
"""

from __future__ import annotations

import ast
import operator
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from mikoshi.data.errors import DataError
from mikoshi.data.sources.chat import ChatProblem, ChatTemplate, Part, chat_samples

Row = Mapping[str, Any]

TOOLS = "tools"
"""The column of what the assistant of a conversation may call."""

ALLOWED_IN_WHERE = "column names, constants, == != < <= > >=, in, not in, and, or, not, len(), lists and brackets"


@dataclass(frozen=True, slots=True)
class Document:
    """A document, or the reason why there is none.

    name: where it is ("web/a.jsonl:17").
    text: None if it could not be read or was left out.
    problem: why there is no text.
    dropped: the user's own filter left it out; no error.
    broken: the file breaks off here, and at least `count` documents are lost.
    parts: the parts of an instruction document, which together are the text; without parts, all of it is learned.
    more: the parts of further texts, if a conversation becomes several.
    row: of a further text, the first text of its row.
    """

    name: str
    text: str | None
    problem: str = ""
    parts: tuple[Part, ...] = ()
    dropped: bool = False
    broken: bool = False
    count: int = 1
    more: tuple[tuple[Part, ...], ...] = ()
    row: str = ""

    @property
    def split_key(self) -> str:
        """The text that decides on which side of the held-out split the document is: all texts of a row are on one side."""
        return self.row or self.text or ""

    def texts(self) -> tuple[Document, ...]:
        """One document for each text."""
        further = (Document(self.name, _joined(parts), parts=parts, row=self.text or "") for parts in self.more)
        return (replace(self, more=()), *further) if self.more else (self,)


@dataclass(frozen=True)
class SourceSpec:
    """What a user says of one source, all of it plain values.

    source: "python-stdlib", a path, a glob, an URL (s3:// gs:// az:// hf:// file://) or "hub:org/name@revision[:split]"
        or "hub:org/name@revision:config/split".
    format: "auto" (by the file's suffix), "jsonl", "json" (an object a line, an array of them, or one),
        "parquet", "arrow", "text" or "webdataset".
    column: the column that holds the text; in a WebDataset a suffix, or a key of the member called "json".
    template: columns put together to one text, "{title}\\n\\n{text}", instead of `column`.
    where: keeps the rows for which this is true, 'lang == "en" and stars >= 10'.
    chat: "" for plain text; "chatml", or a file with a chat template, where rows are conversations: the column
        `messages` ([{role, content}]) where there is one, else the columns `prompt` and `response`; a column "tools" (a
        list, or JSON of one) goes to the template. `chat_date`: the day that a template may write, as 2026-01-31.
    on_invalid: "error" stops at the first document that cannot be read, "skip" leaves it out by name.
    on_broken: the same for the rest of a file that breaks off.
    """

    source: str
    format: str = "auto"
    column: str = "text"
    template: str = ""
    where: str = ""
    chat: str = ""
    messages: str = "messages"
    prompt: str = "prompt"
    response: str = "response"
    on_invalid: str = "error"
    chat_date: str = ""
    on_broken: str = "error"

    def identity(self) -> dict[str, Any]:
        """What the readable documents depend on, as plain values."""
        without = ("on_invalid", "on_broken", "chat_date")  # a date is told by the template, which is one of the files
        return {name: value for name, value in asdict(self).items() if name not in without}


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one source.

    columns: those it needs, where a row has them.
    keep: the row filter, None for none.
    template_fields: pairs of the text before a column and the column.
    """

    spec: SourceSpec
    columns: frozenset[str]
    keep: Callable[[Row], bool] | None
    template_fields: tuple[tuple[str, str], ...]
    chat: ChatTemplate | None
    specials: frozenset[str]

    @property
    def only_text(self) -> bool:
        """Whether a document is a column's text, and nothing else of the row is needed."""
        return self.keep is None and not self.template_fields and self.chat is None

    def missing_columns(self, columns: Iterable[str]) -> str:
        """What is wrong with a file that has these columns; "" if every row of it can be read."""
        there = set(columns)
        missing = self.columns - there
        if self.chat is not None:
            missing -= {TOOLS}
            pair = {self.spec.prompt, self.spec.response}
            missing -= {self.spec.messages} if pair <= there else set()
            missing -= pair if self.spec.messages in there else set()
        return _no_column(min(missing), columns) if missing else ""

    def row(self, name: str, row: Row) -> Document:
        """The document of a row, which may have more columns than needed."""
        try:
            if self.keep is not None and not self.keep(row):
                return Document(name, None, "where", dropped=True)
            if self.chat is not None:
                first, *more = chat_samples(self.chat, _messages(row, self.spec), self.specials, row.get(TOOLS))
                return Document(name, _joined(first), parts=first, more=tuple(more))
            text = self._fill(row) if self.template_fields else _column(row, self.spec.column)
        except (_Problem, ChatProblem) as problem:
            return Document(name, None, str(problem))
        return self.text(name, text)

    def text(self, name: str, text: object) -> Document:
        """The document of a value of the text column."""
        if not isinstance(text, str):
            return Document(name, None, f"no text: column {self.spec.column!r} holds {_kind(text)}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return Document(name, None, f"not text: half of a surrogate pair at character {error.start}")
        return Document(name, text)

    def _fill(self, row: Row) -> str:
        pieces = []
        for literal, column in self.template_fields:
            pieces.append(literal)
            if column:
                value = _column(row, column)
                if isinstance(value, bool) or not isinstance(value, str | int | float):
                    raise _Problem(f"no text: column {column!r} of the template holds {_kind(value)}")
                pieces.append(str(value))
        return "".join(pieces)


def _joined(parts: Iterable[Part]) -> str:
    return "".join(part.text for part in parts)


class _Problem(Exception):
    """What is wrong with one row."""


@lru_cache(maxsize=16)
def row_reader(spec: SourceSpec, chat: ChatTemplate | None, specials: frozenset[str] = frozenset()) -> RowReader:
    """The reader of a source's rows. Raises DataError for an invalid filter or template.

    specials: the tokenizer's special tokens, which no message may contain.
    """
    keep, looked_at = _compile_where(spec.where) if spec.where else (None, set())
    filled = _parse_template(spec.template) if spec.template else ()
    if chat is not None:
        looked_at |= {spec.messages, spec.prompt, spec.response, TOOLS}
    elif filled:
        looked_at |= {column for _, column in filled if column}
    else:
        looked_at |= {spec.column}
    return RowReader(spec, frozenset(looked_at), keep, filled, chat, specials)


def _kind(value: object) -> str:
    return "nothing (null)" if value is None else f"a {type(value).__name__}"


def _no_column(column: str, columns: Iterable[str]) -> str:
    has = ", ".join(columns)
    return f"no column: {column!r} is not there; " + (f"it has {has}" if has else "it has none")


def _column(row: Row, column: str) -> Any:
    try:
        return row[column]
    except KeyError:
        raise _Problem(_no_column(column, row)) from None


def _messages(row: Row, spec: SourceSpec) -> object:
    if row.get(spec.messages) is not None:
        return row[spec.messages]
    if spec.prompt in row and spec.response in row:
        prompt, response = row[spec.prompt], row[spec.response]
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    missing = f"neither {spec.messages!r} nor {spec.prompt!r} and {spec.response!r} are there"
    raise _Problem(f"no column: {missing}; it has {', '.join(row)}")


def _parse_template(template: str) -> tuple[tuple[str, str], ...]:
    """Pairs of the text before a column and the column ("" after the last)."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"data.template = {template!r}: {error}; write columns as {{name}} and a brace as {{{{ or }}}}"
        ) from None
    pairs = []
    for literal, column, form, conversion in fields:
        if column is not None and (not column or set(column) & set(".[]") or form or conversion):
            raise DataError(
                f"data.template = {template!r}: a field is the plain name of a column, such as {{text}}, and nothing else"
            )
        pairs.append((literal, column or ""))
    if not any(column for _, column in pairs):
        raise DataError(f"data.template = {template!r} names no column: write one as {{text}}")
    return tuple(pairs)


Value = Callable[[Row], Any]

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def _compile_where(text: str) -> tuple[Callable[[Row], bool], set[str]]:
    """The filter as a function of a row, and the columns it needs. The expression is interpreted and never executed as
    Python: only what ALLOWED_IN_WHERE names has a meaning."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        value = _value(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = f": {error}" if type(error) is ValueError else ""
        raise DataError(f"data.where = {text!r} cannot be read{why}; it is made of {ALLOWED_IN_WHERE}") from None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {"len"}

    def keep(row: Row) -> bool:
        try:
            return bool(value(row))
        except TypeError as error:
            raise _Problem(f"no answer to where: {error}") from None

    return keep, names


def _value(node: ast.expr) -> Value:
    """Raises ValueError, naming what is not allowed."""
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            constant = node.value
            return lambda _: constant
        case ast.Name(id=name) if name != "len":
            return lambda row: _column(row, name)
        case ast.List(elts=nodes) | ast.Tuple(elts=nodes):
            items = [_value(item) for item in nodes]
            return lambda row: [item(row) for item in items]
        case ast.BoolOp(op=ast.And(), values=nodes):
            terms = [_value(term) for term in nodes]
            return lambda row: all(term(row) for term in terms)
        case ast.BoolOp(op=ast.Or(), values=nodes):
            terms = [_value(term) for term in nodes]
            return lambda row: any(term(row) for term in terms)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            term = _value(operand)
            return lambda row: not term(row)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return lambda _: -number
        case ast.Call(func=ast.Name(id="len"), args=[argument], keywords=[]) if not isinstance(argument, ast.Starred):
            inner = _value(argument)
            return lambda row: len(inner(row))
        case ast.Compare() if all(type(op) in _COMPARE for op in node.ops):
            return _comparison(node)
    raise ValueError(f"{ast.unparse(node)!r} is not allowed")


def _comparison(node: ast.Compare) -> Value:
    terms = [_value(term) for term in (node.left, *node.comparators)]
    tests = [_COMPARE[type(op)] for op in node.ops]

    def compare(row: Row) -> bool:
        left = terms[0](row)
        for test, term in zip(tests, terms[1:], strict=True):
            right = term(row)
            if not test(left, right):
                return False
            left = right
        return True

    return compare
