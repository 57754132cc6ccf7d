"""Conversations are checked before a template sees them, and the template must write all of their content.

What a template leaves out is named, and so is an unknown key of a message. To find out, the conversation is rendered again with
markers inserted in all of its content, and every marker must appear; searching the text itself would find chance matches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mikoshi.data.sources.template import CLOSE, OPEN, ChatProblem, ChatTemplate, Message, render

ROLES = ("system", "developer", "user", "assistant", "tool")
_LEARNED_KEYS = ("weight", "train", "training", "trainable", "loss")
"""Keys of a message that say whether it is learned."""
_CONTENT_KEYS = ("content", "reasoning_content", "thinking", "reasoning", "tool_calls", "function_call")
_METADATA_KEYS = (
    "role", "id", "message_id", "parent_id", "type", "index", "tool_call_id", "model", "language", "lang", "timestamp",
    "created", "created_at",
)  # fmt: skip
"""Keys that say something about a message and are no part of it: a template may leave them out."""

_RESERVED = re.compile("[\ufdd0-\ufdef]")  # code points that Unicode keeps out of all text: our marks are made of them
_MARKER = re.compile("\ufdd2([\ufde0-\ufdef]+)\ufdd3")
_ESCAPED = re.compile(r"\\u(fd[de][0-9a-f])")


@dataclass(frozen=True)
class Conversation:
    """A checked conversation.

    messages: plain values, without the keys that say what is learned.
    learned: for each message whether it is an answer that is learned.
    tools: what the assistant may call, None for nothing.
    """

    messages: list[Message]
    learned: tuple[bool, ...]
    tools: list[Any] | None = None

    @property
    def answers(self) -> list[int]:
        """The indices of the assistant's messages."""
        return [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]


def parse_conversation(messages: object, tools: object, specials: frozenset[str]) -> Conversation:
    """The conversation in a row's values. Raises ChatProblem if nothing can be learned from it."""
    if not isinstance(messages, list) or not messages:
        reason = "is empty" if messages == [] else f"is a {type(messages).__name__}, not a list"
        raise ChatProblem(f"not a conversation: the list of messages {reason}")
    plain, learned = [], []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or "role" not in message or not ({"content", "tool_calls"} & set(message)):
            has = f"has {', '.join(map(str, message))}" if isinstance(message, Mapping) else f"is a {type(message).__name__}"
            raise ChatProblem(f"not a conversation: message {number} {has}; a message has role and content")
        location = f"message {number}"
        if message["role"] not in ROLES:
            raise ChatProblem(f"unknown role: {message['role']!r} in {location}; known are {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list | tuple):
            _check_parts(content, location)
        elif content is not None and not isinstance(content, str):
            raise ChatProblem(f"no text: the content of {location} is a {type(content).__name__}")
        if not _has_text(content) and not message.get("tool_calls"):
            raise ChatProblem(f"empty content: {location}, of the {message['role']}, says nothing")
        learned.append(_is_learned(message, location))
        plain.append({
            str(key): _plain(value, location, specials)
            for key, value in message.items() if value is not None and key not in _LEARNED_KEYS
        })  # fmt: skip
    if not any(message["role"] == "assistant" for message in plain):
        raise ChatProblem("no answer: the conversation has no message of the assistant")
    if not any(learned):
        raise ChatProblem("no answer: every message of the assistant says that it is not to be learned")
    return Conversation(plain, tuple(learned), _tools(tools, specials))


def _has_text(content: object) -> bool:
    if isinstance(content, list | tuple):
        return any(_has_text(part.get("text")) for part in content)
    return bool(content.strip()) if isinstance(content, str) else False


def _check_parts(parts: Sequence[Any], location: str) -> None:
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            description = "a part that is no text" if kind in (None, "text") else f"a part of type {kind!r}"
            raise ChatProblem(f"no text: the content of {location} is a list with {description}")


def _is_learned(message: Mapping[str, Any], location: str) -> bool:
    """Whether the message is an answer that is learned: all are, but those with `weight` 0 or `train` false."""
    answer = bool(message["role"] == "assistant")
    for key in _LEARNED_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ChatProblem(f"weight: {key} of {location} is {value!r}: a message is learned (1, true) or not (0, false)")
        if value and message["role"] != "assistant":
            raise ChatProblem(f"weight: {key} of {location}, of the {message['role']}, is {value!r}: answers alone are learned")
        answer = answer and bool(value)
    return answer


def _tools(tools: object, specials: frozenset[str]) -> list[Any] | None:
    """The tools in the column: a list, or JSON of one."""
    try:
        found = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
        if isinstance(found, list):
            found = [json.loads(tool) if isinstance(tool, str) else tool for tool in found]
    except ValueError as error:
        raise ChatProblem(f"tools: the column is no JSON: {error}") from None
    if not found or (isinstance(found, str) and not found.strip()):
        return None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise ChatProblem(f"tools: the column holds a {type(found).__name__}, not a list of tools, each a mapping")
    return [_plain(tool, "the tools", specials) for tool in found]


def _plain(value: Any, location: str, specials: frozenset[str]) -> Any:
    """`value` as plain JSON values, so that a template gets no object with methods."""
    if isinstance(value, str):
        found = _special_in(specials).search(value)
        if found:
            raise ChatProblem(f"special token: the text of {location} holds {found[0]!r}, which would be a real one")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ChatProblem(f"not text: half of a surrogate pair at character {error.start} of {location}") from None
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_plain(str(key), location, specials): _plain(item, location, specials) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, location, specials) for item in value]
    return str(value)


@lru_cache(maxsize=16)
def _special_in(specials: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(specials - {""}, key=lambda s: (-len(s), s))
    return re.compile("|".join([*map(re.escape, longest_first), _RESERVED.pattern]))


class _MarkerWriter:
    """Inserts markers in the texts of a conversation, and records what each stands for."""

    def __init__(self) -> None:
        self.names: list[tuple[str, int, bool]] = []  # what it is, of which message, and whether as it is

    def new(self, name: str, message: int, exact: bool = False) -> str:
        """A new marker for field `name` of a message. `exact`: it must appear unescaped."""
        self.names.append((name, message, exact))
        return "\ufdd2" + "".join(chr(0xFDE0 + int(digit, 16)) for digit in f"{len(self.names) - 1:x}") + "\ufdd3"

    def text(self, text: str, name: str, message: int, exact: bool = False) -> str:
        """`text` with one marker near its start and one near its end: inside of white space, which templates strip, and
        outside of tags, which they may search for."""
        start = len(text) - len(text.lstrip())
        stop = len(text.rstrip())
        if start >= stop:
            return text
        first = re.match(r"<[^<>\s]*>|.", text[start:stop], re.DOTALL)
        last = re.search(r"(?:<[^<>\s]*>|.)\Z", text[start:stop], re.DOTALL)
        assert first is not None and last is not None
        a = start + first.end()
        b = max(a, start + last.start())
        one, two = self.new(name, message, exact), self.new(name, message, exact)
        return text[:a] + one + text[a:b] + two + text[b:]

    def arguments(self, value: Any, message: int) -> Any:
        """Arguments of a tool call, a string or a mapping, with markers."""
        name = "tool_calls (the arguments)"
        if isinstance(value, str):
            return self.text(value, name, message)
        if isinstance(value, dict) and value:
            marked = {key: self.text(v, name, message) if isinstance(v, str) else v for key, v in value.items()}
            return marked | {self.new(name, message): 1}
        return value

    def call(self, call: Any, message: int, name: str) -> Any:
        """A tool call with markers in its name and arguments."""
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return call | {"function": self.call(call["function"], message, name)}
        marked = dict(call)
        if isinstance(call.get("name"), str):
            marked["name"] = self.text(call["name"], name, message)
        if "arguments" in call:
            marked["arguments"] = self.arguments(call["arguments"], message)
        return marked

    def message(self, message: Message, number: int) -> Message:
        """A message with markers in all of its content."""
        marked = dict(message)
        for key in _CONTENT_KEYS:
            value = message.get(key)
            if isinstance(value, str):
                marked[key] = self.text(value, key, number, key == "content")
            elif key == "content" and isinstance(value, list):
                marked[key] = [part | {"text": self.text(part["text"], "content (a list)", number, True)} for part in value]
            elif key == "tool_calls" and isinstance(value, list):
                marked[key] = [self.call(call, number, key) for call in value]
            elif key == "function_call" and isinstance(value, dict):
                marked[key] = self.call(value, number, key)
        return marked

    def tool(self, tool: Any) -> Any:
        """A tool's description with markers."""
        inner = tool.get("function") if isinstance(tool.get("function"), dict) else tool
        texts = {key: self.text(inner[key], "tools", -1) for key in ("name", "description") if isinstance(inner.get(key), str)}
        return tool | {"function": inner | texts} if inner is not tool else tool | texts


def find_omitted(template: ChatTemplate, conversation: Conversation, whole: str) -> tuple[dict[int, str], list[int]]:
    """What the template leaves out, by message number (-1: the tools), and for each text marked by {% generation %} its
    message.

    whole: the rendered conversation.
    """
    marks = _MarkerWriter()
    messages = [marks.message(message, number) for number, message in enumerate(conversation.messages)]
    tools = None if conversation.tools is None else [marks.tool(tool) for tool in conversation.tools]
    text = render(template, messages, tools)
    exact = {_marker_number(mark) for mark in _MARKER.finditer(text)}
    found = {_marker_number(mark) for mark in _MARKER.finditer(_ESCAPED.sub(lambda m: chr(int(m[1], 16)), text))}
    omitted: dict[int, str] = {}
    for at, (name, number, as_it_is) in enumerate(marks.names):
        if at not in (exact if as_it_is else found):
            omitted.setdefault(number, name)
    for number, key in _unknown_keys(template, conversation, whole):
        omitted.setdefault(number, key)
    return omitted, list(_owners(text, [number for _, number, _ in marks.names]))


def _marker_number(mark: re.Match[str]) -> int:
    return int("".join(f"{ord(digit) - 0xFDE0:x}" for digit in mark[1]), 16)


def _owners(text: str, numbers: list[int]) -> Iterator[int]:
    """The message to which each text between OPEN and CLOSE belongs: the one whose markers are in it, else the one before,
    or the first."""
    stretches = re.findall(f"{OPEN}([^{CLOSE}]*){CLOSE}", text)
    inside = [_MARKER.search(_ESCAPED.sub(lambda m: chr(int(m[1], 16)), stretch)) for stretch in stretches]
    known = [-1 if mark is None else numbers[_marker_number(mark)] for mark in inside]
    owner = next((number for number in known if number >= 0), -1)
    for number in known:
        owner = number if number >= 0 else owner
        yield owner


def _unknown_keys(template: ChatTemplate, conversation: Conversation, whole: str) -> Iterator[tuple[int, str]]:
    """Keys of messages that are not known here and that the template leaves out, with the first message that has each."""
    known = {*_CONTENT_KEYS, *_METADATA_KEYS}
    first: dict[str, int] = {}
    for number, message in enumerate(conversation.messages):
        for key, value in message.items():
            if key not in known and value not in ("", [], {}) and not (key == "name" and message["role"] == "tool"):
                first.setdefault(key, number)
    for key, number in first.items():
        without = [{name: value for name, value in message.items() if name != key} for message in conversation.messages]
        if render(template, without, conversation.tools) == whole:
            yield number, key
