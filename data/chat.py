"""A conversation becomes text by a chat template, cut so that only the assistant's answers are learned.

Templates are rendered as Hugging Face transformers renders them, in jinja2's sandbox, with one difference: the date
of today is not given to them, because the same data must give the same tokens tomorrow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data.errors import DataError, of_storage

if TYPE_CHECKING:
    import jinja2

CHATML = "chatml"
ROLES = ("system", "developer", "user", "assistant", "tool")

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Stand around what {% generation %} encloses while it is rendered: code points that Unicode keeps out of all text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a document. `learned` False: read but never predicted, as a prompt is. `special`: written by a chat
    template, so that the special tokens in it are real ones."""

    text: str
    learned: bool = True
    special: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what it may name: `tokens` are pairs such as ("bos_token", "<s>"), `specials` the special tokens
    that are known to stand in it."""

    name: str
    text: str
    tokens: tuple[tuple[str, str], ...] = ()
    specials: frozenset[str] = frozenset()


class ChatProblem(Exception):
    """What is wrong with one conversation, as "kind: detail"."""


def load_chat(chat: str) -> ChatTemplate:
    """The template called `chat`: "chatml", a tokenizer_config.json with a `chat_template`, a folder with one, or a file
    with the template alone (special tokens then come from a tokenizer_config.json beside it). Raises DataError."""
    if chat == CHATML:
        return ChatTemplate(CHATML, _CHATML, (), frozenset({"<|im_start|>", "<|im_end|>"}))
    path = Path(chat).expanduser()
    if path.is_dir():
        path = path / "chat_template.jinja" if (path / "chat_template.jinja").is_file() else path / "tokenizer_config.json"
    beside = path if path.suffix == ".json" else path.with_name("tokenizer_config.json")
    config: dict[str, Any] = {}
    try:
        text: object = path.read_text(encoding="utf-8")
        if beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        told = f"data.chat = {chat!r}: {path} cannot be read: {why}"
        raise of_storage(error, told, 'give "chatml" or a file with a template') from None
    if path.suffix == ".json":
        text = config.get("chat_template") if isinstance(config, dict) else None
        if isinstance(text, list):  # several templates under names of their own
            text = next((t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None)
        if not isinstance(text, str):
            raise DataError(f"data.chat = {chat!r}: {path} has no text under 'chat_template': give the file of a template")
    template = ChatTemplate(chat, str(text), *_tokens(config if isinstance(config, dict) else {}))
    _compiled(template)
    return template


def _tokens(config: dict[str, Any]) -> tuple[tuple[tuple[str, str], ...], frozenset[str]]:
    """The special tokens of a tokenizer_config.json: those with a name, and all."""

    def content(token: object) -> str:
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else ""

    named = {key: content(token) for key, token in config.items() if key.endswith("_token") and content(token)}
    added = config.get("added_tokens_decoder")
    entries = added.values() if isinstance(added, dict) else ()
    others = {content(entry) for entry in entries if isinstance(entry, dict) and entry.get("special")}
    return tuple(sorted(named.items())), frozenset({*named.values(), *others} - {""})


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
            return f"{_OPEN}{caller()}{_CLOSE}"

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own writes < and > as escapes, for web pages.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template.text)
    except jinja2.TemplateError as error:
        raise DataError(f"data.chat = {template.name!r} is not a template that can be used: {_line(error)}") from None


def chat_parts(template: ChatTemplate, messages: object, specials: frozenset[str] = frozenset()) -> tuple[Part, ...]:
    """The text of a conversation in parts: the answers, each with what the template ends it with, learned; all else
    read only. All parts are special: no message holds a special token of the template or of `specials` as its text.

    Where the template marks answers by {% generation %}, those are learned. Else an answer is what the conversation up
    to it has more than the one before it with the generation prompt. Raises ChatProblem.
    """
    plain = _checked(messages, template.specials | specials)
    whole = _render(template, plain, False)
    if _OPEN in whole:
        cuts = [(m.start(), m.end()) for m in re.finditer(f"{_OPEN}[^{_CLOSE}]*{_CLOSE}", whole)]
    else:
        cuts = list(_answers(template, plain, whole))
    parts, at = [], 0
    for start, stop in cuts:
        parts += [Part(whole[at:start], False, True), Part(whole[start:stop].strip(_OPEN + _CLOSE), True, True)]
        at = stop
    parts.append(Part(whole[at:], False, True))
    parts = [part for part in parts if part.text]
    if not any(part.learned for part in parts):
        raise ChatProblem(f"no answer: the template {template.name!r} writes none of the assistant's messages")
    return tuple(parts)


def _answers(template: ChatTemplate, messages: list[dict[str, Any]], whole: str) -> Any:
    """Where each answer starts and stops in `whole`."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = _render(template, messages[:i], True), _render(template, messages[: i + 1], False)
            if not (whole.startswith(before) and whole.startswith(after) and len(before) <= len(after)):
                raise ChatProblem(
                    f"chat template: under {template.name!r} the conversation up to message {i + 1} is not how the whole one "
                    "begins, so that its answers cannot be told: mark them by {% generation %} in the template"
                )
            yield len(before), len(after)


def _render(template: ChatTemplate, messages: list[dict[str, Any]], prompt: bool) -> str:
    import jinja2

    try:
        return _compiled(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **dict(template.tokens)
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise ChatProblem(f"chat template: {template.name!r} refuses the conversation: {_line(error)}") from None


def _checked(messages: object, specials: frozenset[str]) -> list[dict[str, Any]]:
    """The messages as plain values, once they are a conversation that can be learned from."""
    if not isinstance(messages, list) or not messages:
        told = "is empty" if messages == [] else f"is a {type(messages).__name__}, not a list"
        raise ChatProblem(f"not a conversation: the list of messages {told}")
    plain = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            has = f"has {', '.join(map(str, message))}" if isinstance(message, Mapping) else f"is a {type(message).__name__}"
            raise ChatProblem(f"not a conversation: message {number} {has}; a message has role and content")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ChatProblem(f"unknown role: {role!r} in message {number}; known are {', '.join(ROLES)}")
        if content is not None and not isinstance(content, str):
            raise ChatProblem(f"no text: the content of message {number} is a {type(content).__name__}")
        if not (content or "").strip() and not message.get("tool_calls"):
            raise ChatProblem(f"empty content: message {number}, of the {role}, says nothing")
        plain.append({key: _plain(value, number, specials) for key, value in message.items() if value is not None})
        plain[-1].setdefault("content", "")
    if not any(message["role"] == "assistant" for message in plain):
        raise ChatProblem("no answer: the conversation has no message of the assistant")
    return plain


def _plain(value: Any, number: int, specials: frozenset[str]) -> Any:
    """`value` as JSON would give it: a template gets no object whose methods do something."""
    if isinstance(value, str):
        found = _special_in(specials).search(value)
        if found:
            raise ChatProblem(f"special token: the text of message {number} holds {found[0]!r}, which would be a real one")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ChatProblem(f"not text: half of a surrogate pair at character {error.start} of message {number}") from None
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, number, specials) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, number, specials) for item in value]
    return str(value)


@lru_cache(maxsize=16)
def _special_in(specials: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(specials | {_OPEN, _CLOSE}, key=lambda s: (-len(s), s)))))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
