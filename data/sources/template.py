"""Chat templates: loaded, compiled and rendered as Hugging Face transformers does, in jinja2's sandbox, with two differences.

Writing an undefined name is an error rather than an empty text. And the date is the one given with the template rather than
today's, so that the same data always gives the same tokens.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mikoshi.data.errors import DataError, storage_error

if TYPE_CHECKING:
    import jinja2

CHATML = "chatml"
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Stand around what {% generation %} encloses while it is rendered: code points that Unicode keeps out of all text."""

# The line end after the last answer is learned with it, so that what ends the document comes after nothing unlearned.
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% if loop.last %}{% generation %}{{ '\n' }}{% endgeneration %}{% else %}{{ '\n' }}{% endif %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_RULES = 2  # of what a conversation becomes under a template: another number, other datasets
_REASONING = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the values that it may use.

    tokens: pairs such as ("bos_token", "<s>").
    specials: special tokens known to appear in its output.
    unset: names of tokens that its tokenizer does not have; they write nothing.
    date: the date that strftime_now gives, as 2026-01-31; "" for none.
    """

    name: str
    text: str
    tokens: tuple[tuple[str, str], ...] = ()
    specials: frozenset[str] = frozenset()
    unset: frozenset[str] = frozenset()
    date: str = ""

    @property
    def fingerprint(self) -> str:
        """Equal where conversations become the same texts with the same parts learned."""
        plain = [_RULES, self.text, self.tokens, sorted(self.specials), sorted(self.unset), self.date]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()

    @property
    def legacy_fingerprint(self) -> tuple[str, int]:
        """The beginning of the fingerprint, and the bytes of the template, in earlier versions, whose rules did not learn
        the ends of some turns."""
        if self.name == CHATML:
            return "f363ce0b4d3b6b7e", 339
        text = self.text.encode()
        return hashlib.sha256(repr(self.tokens).encode() + text).hexdigest()[:16], len(text)


class ChatProblem(Exception):
    """What is wrong with one conversation, as "kind: detail"."""


def load_chat_template(chat: str, date: str = "") -> ChatTemplate:
    """Load a chat template. Raises DataError.

    chat: "chatml", a tokenizer_config.json or chat_template.json with a `chat_template`, a folder with one of these or a
        chat_template.jinja, or a file with the template alone. Special tokens come from tokenizer_config.json and
        special_tokens_map.json beside it.
    date: the date that the template may write, as 2026-01-31.
    """
    if date:
        _day(date)
    if chat == CHATML:
        return ChatTemplate(CHATML, _CHATML, (), frozenset({"<|im_start|>", "<|im_end|>"}), date=date)
    path = Path(chat).expanduser()
    if path.is_dir():
        names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
        path = next((path / name for name in names if (path / name).is_file()), path / names[-1])
    try:
        text: object = path.read_text(encoding="utf-8")
        own = json.loads(str(text)) if path.suffix == ".json" else {}
        beside = [path.with_name(name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
        found = [json.loads(file.read_text(encoding="utf-8")) for file in beside if file.is_file() and file != path]
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        reason = f"data.chat = {chat!r}: {path} cannot be read: {why}"
        raise storage_error(error, reason, 'give "chatml" or a file with a template') from None
    if path.suffix == ".json":
        text = own.get("chat_template") if isinstance(own, dict) else None
        if isinstance(text, list):  # several templates under names of their own
            text = next((t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None)
        if not isinstance(text, str):
            raise DataError(f"data.chat = {chat!r}: {path} has no text under 'chat_template': give the file of a template")
    configs = [config for config in (own, *found) if isinstance(config, dict)]
    template = ChatTemplate(chat, str(text), *_tokens(configs), date=date)
    _compiled(template)
    return template


def parse_chat_template(content: str) -> ChatTemplate:
    """The template in the JSON that `dump_chat_template` wrote."""
    plain = json.loads(content)
    tokens = tuple((str(key), str(token)) for key, token in plain["tokens"])
    specials, unset = frozenset(plain["specials"]), frozenset(plain["unset"])
    return ChatTemplate(plain["name"], plain["text"], tokens, specials, unset, plain["date"])


def dump_chat_template(template: ChatTemplate) -> str:
    """The template as JSON, with everything it needs, so that its file is not needed any more."""
    plain = {name: getattr(template, name) for name in ("name", "text", "tokens", "date")}
    return json.dumps(plain | {"specials": sorted(template.specials), "unset": sorted(template.unset)}, indent=2) + "\n"


def _tokens(configs: Sequence[dict[str, Any]]) -> tuple[tuple[tuple[str, str], ...], frozenset[str], frozenset[str]]:
    """The special tokens of a tokenizer's files, the first file first: those with a name, all of them, and the names without
    a token."""

    def content(token: object) -> str:
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else ""

    named: dict[str, str] = {}
    others, unset = set[str](), set[str]()
    for config in configs:
        for key, token in config.items():
            if key.endswith("_token") and content(token):
                named.setdefault(key, content(token))
            elif key.endswith("_token") and token is None:
                unset.add(key)
        added = config.get("added_tokens_decoder")
        entries = added.values() if isinstance(added, dict) else ()
        others |= {content(entry) for entry in entries if isinstance(entry, dict) and entry.get("special")}
    return tuple(sorted(named.items())), frozenset({*named.values(), *others} - {""}), frozenset(unset - named.keys())


def _day(date: str) -> datetime.datetime:
    try:
        return datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    except ValueError:
        raise DataError(f"data.chat_date = {date!r} is no day: write it as 2026-01-31") from None


@lru_cache(maxsize=16)
def _compiled(template: ChatTemplate) -> jinja2.Template:
    try:
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise DataError("chat: a chat template needs the package jinja2: pip install jinja2") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %}: what the assistant says, as templates mark it for transformers."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own writes < and > as escapes, for web pages.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols],
        undefined=_undefined(template.unset),
    )  # fmt: skip
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    if template.date:
        day = _day(template.date)
        environment.globals["strftime_now"] = lambda form: day.strftime(form)
    try:
        return environment.from_string(template.text)
    except jinja2.TemplateError as error:
        raise DataError(f"data.chat = {template.name!r} is not a template that can be used: {_line(error)}") from None


def _undefined(unset: frozenset[str]) -> type[jinja2.Undefined]:
    """The class of undefined names: they may be tested, as templates do, but not written, except those in `unset` and
    missing keys of a value, which write nothing."""
    import jinja2
    from jinja2.utils import missing

    class Unknown(jinja2.Undefined):
        @property
        def _undefined_message(self) -> str:
            name = self._undefined_name
            if self._undefined_hint is not None or self._undefined_obj is not missing or not isinstance(name, str):
                return super()._undefined_message
            if name == "strftime_now":
                return "it writes the day ('strftime_now'), which is not given: set data.chat_date"
            where = "; tokenizer_config.json or special_tokens_map.json beside the template name it"
            return f"{name!r} is not defined{where if name.endswith('_token') else ''}"

        def __str__(self) -> str:
            name = self._undefined_name
            if self._undefined_hint is None and self._undefined_obj is missing and name is not None and name not in unset:
                raise jinja2.UndefinedError(self._undefined_message)
            return ""

    return Unknown


def render(template: ChatTemplate, messages: list[Message], tools: list[Any] | None, prompt: bool = False) -> str:
    """The text of a conversation, with OPEN and CLOSE around what {% generation %} marks.

    prompt: end with the header of the next answer.

    Raises ChatProblem if the template refuses the conversation.
    """
    import jinja2

    given = [_named(message) for message in messages]
    try:
        try:
            return _rendered(template, given, tools, prompt)
        except (jinja2.UndefinedError, TypeError):
            if all("content" in message for message in given):
                raise
            return _rendered(template, [{"content": "", **message} for message in given], tools, prompt)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ChatProblem(f"chat template: {template.name!r} refuses the conversation: {_line(error)}") from None


def _rendered(template: ChatTemplate, messages: list[Message], tools: list[Any] | None, prompt: bool) -> str:
    return _compiled(template).render(
        messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **dict(template.tokens)
    )


def _named(message: Message) -> Message:
    """The message with its reasoning under all names that templates use, as transformers gives it."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
