"""A conversation becomes text by a chat template, cut so that only the assistant's answers are learned, each with its end.

What is learned is a function of the template and the conversation alone: what {% generation %} marks, as in transformers,
or where nothing is marked, what the conversation up to an answer has more than the one before it with the header of an
answer, as in TRL. See template.py for how templates are rendered, conversation.py for what is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from mikoshi.data.sources.conversation import ROLES, Conversation, checked, unwritten
from mikoshi.data.sources.template import (
    CHATML,
    CLOSE,
    OPEN,
    ChatProblem,
    ChatTemplate,
    load_chat,
    parse_chat,
    render,
    write_chat,
)

__all__ = [
    "CHATML", "ROLES", "ChatProblem", "ChatTemplate", "Part", "chat_parts", "chat_prompt", "chat_samples", "end_of_turn",
    "load_chat", "parse_chat", "write_chat",
]  # fmt: skip

_TAG = r"<[^<>\s]{1,64}>"  # how templates write special tokens, where the tokenizer has not told which there are


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a document. `learned` False: read but never predicted, as a prompt is. `special`: written by a chat
    template, so that the special tokens in it are real ones."""

    text: str
    learned: bool = True
    special: bool = False


class _Rewritten(ChatProblem):
    """The template writes a turn otherwise once more turns follow."""


def chat_samples(
    template: ChatTemplate, messages: object, specials: frozenset[str] = frozenset(), tools: object = None
) -> tuple[tuple[Part, ...], ...]:
    """The texts that a conversation becomes, each in parts: the answers, each with what the template ends it with, learned;
    all else read only. All parts are special: no message holds a special token of the template or of `specials` as its
    text.

    It is one text, but where the template writes an answer otherwise once more turns follow (without its reasoning, say):
    then it is one text for each answer that is learned, which ends with it, as the model will see it in use. Raises
    ChatProblem, also for what the template would leave out.
    """
    known = template.specials | specials
    talk = checked(messages, tools, known)
    try:
        samples, left = _samples(template, talk, known)
    except ChatProblem as problem:
        listed = next((n for n, m in enumerate(talk.messages, 1) if isinstance(m.get("content"), list)), 0)
        if listed and str(problem).startswith("chat template"):
            told = f"no text: the content of message {listed} is a list, and the template {template.name!r} writes texts alone"
            raise ChatProblem(told) from None
        raise
    if not any(part.learned for parts in samples for part in parts):
        raise ChatProblem(f"no answer: the template {template.name!r} writes none of the assistant's messages")
    _check_written(template, left)
    return samples


def _samples(
    template: ChatTemplate, talk: Conversation, specials: frozenset[str]
) -> tuple[tuple[tuple[Part, ...], ...], dict[int, str]]:
    """The texts in parts, and what the template leaves out, by the number of the message."""
    whole = render(template, talk.messages, talk.tools)
    left, owners = unwritten(template, talk, whole)
    try:
        whole_parts = _learned_parts(template, talk, whole, owners, specials)
    except _Rewritten:
        if talk.answers == [len(talk.messages) - 1]:
            raise
        samples, left = _one_by_one(template, talk, specials)
        if "content" in left.values():  # not what an answer thought is left out later, but what was said
            raise
        return samples, left
    if len(talk.answers) > 1 and left.keys() & set(talk.answers[:-1]):
        return _one_by_one(template, talk, specials)
    return (whole_parts,), left


def chat_parts(
    template: ChatTemplate, messages: object, specials: frozenset[str] = frozenset(), tools: object = None
) -> tuple[Part, ...]:
    """As chat_samples, of a conversation that becomes one text. Raises ChatProblem where it becomes several."""
    samples = chat_samples(template, messages, specials, tools)
    if len(samples) > 1:
        raise ChatProblem(
            f"chat template: {template.name!r} writes an answer otherwise once more turns follow: it is a text for each answer"
        )
    return samples[0]


def _check_written(template: ChatTemplate, left: dict[int, str]) -> None:
    for number, name in sorted(left.items()):
        if name == "content (a list)":
            raise ChatProblem(
                f"no text: the content of message {number + 1} is a list, and the template {template.name!r} does not write it"
            )
        what = "the column of tools" if number < 0 else f"{name!r} of message {number + 1}"
        raise ChatProblem(f"not written: the template {template.name!r} leaves out {what}: use a template that writes it")


def _parts(whole: str, cuts: list[tuple[int, int, bool]]) -> tuple[Part, ...]:
    """The text in parts, cut where each of `cuts` starts and stops; its last entry says whether that is learned."""
    parts, at = [], 0
    for start, stop, learned in cuts:
        parts += [Part(whole[at:start], False, True), Part(whole[start:stop], learned, True)]
        at = stop
    parts.append(Part(whole[at:], False, True))
    return tuple(part for part in parts if part.text)


def _learned_parts(
    template: ChatTemplate, talk: Conversation, whole: str, owners: list[int], specials: frozenset[str]
) -> tuple[Part, ...]:
    if OPEN in whole:
        return _marked(template, talk, whole, owners, specials)
    return _parts(whole, list(_answers(template, talk, whole, specials)))


def _marked(
    template: ChatTemplate, talk: Conversation, whole: str, owners: list[int], specials: frozenset[str]
) -> tuple[Part, ...]:
    """By {% generation %}. Where its end marker follows an answer and is not marked with it, it is learned all the same:
    what is never learned is never written, and generation would not end."""
    text, cuts, at = "", list[tuple[int, int]](), 0
    for found in re.finditer(f"{OPEN}([^{CLOSE}]*){CLOSE}", whole):
        text += whole[at : found.start()]
        cuts.append((len(text), len(text) + len(found[1])))
        text += found[1]
        at = found.end()
    text += whole[at:]
    if len(owners) != len(cuts) or (not all(talk.learned[i] for i in talk.answers) and -1 in owners):
        raise ChatProblem(
            f"chat template: it cannot be told which answers the {{% generation %}} of {template.name!r} marks: its blocks "
            "come and go with what the messages say"
        )
    marker = _unmarked_end(template, specials)
    out = []
    for n, (start, stop) in enumerate(cuts):
        last_of_turn = n + 1 == len(cuts) or owners[n + 1] != owners[n]
        if marker and last_of_turn and text.startswith(marker, stop):
            stop += len(marker)
        out.append((start, stop, owners[n] < 0 or talk.learned[owners[n]]))
    return _parts(text, out)


@lru_cache(maxsize=64)
def _unmarked_end(template: ChatTemplate, specials: frozenset[str]) -> str:
    """The special token that ends an answer after what {% generation %} marks of it, with white space before; "" for none."""
    try:
        talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        marked, _, rest = render(template, talk, None).rpartition(CLOSE)
    except ChatProblem:
        return ""
    if _ends_in_tag(marked, specials):
        return ""
    found = re.match(rf"\s*(?:{_tags(specials)})", rest)
    return found[0] if found else ""


def _answers(
    template: ChatTemplate, talk: Conversation, whole: str, specials: frozenset[str]
) -> Iterator[tuple[int, int, bool]]:
    """Where each answer starts and stops in `whole`, and whether it is learned."""
    for i in talk.answers:
        try:
            yield (*_answer(template, talk, i, whole, specials), talk.learned[i])
        except _Rewritten:
            if talk.learned[i]:
                raise


def _answer(template: ChatTemplate, talk: Conversation, i: int, whole: str, specials: frozenset[str]) -> tuple[int, int]:
    """Where the answer that is message `i` starts and stops in `whole`. Raises _Rewritten where that cannot be told."""
    before = render(template, talk.messages[:i], talk.tools, True)
    after = render(template, talk.messages[: i + 1], talk.tools)
    start, by_marks = len(before), "mark answers by {% generation %} in the template"
    if not after.startswith(before):
        raise _Rewritten(
            f"chat template: {template.name!r} asks for an answer by {before[-24:]!r}, and message {i + 1} is not written "
            f"behind that, so that it cannot be told what of it is learned: {by_marks}"
        )
    if whole.startswith(before):
        if _prompt_always(template):
            stop = _end_of_answer(template, talk, i, after, start, specials)
            if whole.startswith(after[:stop]):
                return start, stop
        elif whole.startswith(after):
            return start, len(after)
        # Else the end of the text has something of its own, as an end of text, in place of the next turn.
        elif (stop := _outside(whole, _shared(whole, after), specials)) > start:
            return start, stop
    raise _Rewritten(
        f"chat template: under {template.name!r} the conversation up to message {i + 1} is not how the whole one begins, so "
        f"that its answers cannot be told: {by_marks}"
    )


@lru_cache(maxsize=64)
def _prompt_always(template: ChatTemplate) -> bool:
    """Whether the template ends every text with the header of an answer, asked for or not."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    try:
        plain, asked = render(template, talk, None), render(template, talk, None, True)
        longer = render(template, [*talk, {"role": "user", "content": "More"}], None)
    except ChatProblem:
        return False
    return OPEN not in plain and plain == asked and not longer.startswith(plain)


def _end_of_answer(template: ChatTemplate, talk: Conversation, i: int, after: str, start: int, specials: frozenset[str]) -> int:
    """Where the answer ends in `after`, which goes on with the header of another: after the first special token behind what
    it says, and the white space that follows whatever comes."""
    message = talk.messages[i]
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else ""
    at = after.find(said, start) if said and not message.get("tool_calls") else -1
    if at < 0:
        raise ChatProblem(
            f"chat template: {template.name!r} ends every text with the header of an answer, so that it cannot be told where "
            f"message {i + 1} ends: mark answers by {{% generation %}} in the template"
        )
    at += len(said)
    marker = re.compile(rf"\s*(?:{_tags(specials)})?\s*").match(after, at)
    assert marker is not None  # it may match nothing
    longer = render(template, [*talk.messages[: i + 1], {"role": "user", "content": "More"}], talk.tools)
    return max(at, min(marker.end(), _outside(after, _shared(longer, after), specials)))


def _one_by_one(
    template: ChatTemplate, talk: Conversation, specials: frozenset[str]
) -> tuple[tuple[tuple[Part, ...], ...], dict[int, str]]:
    """A text for each answer that is learned, and what of the conversation stands in none of them."""
    samples, left = [], dict[int, str]()
    for i in (i for i in talk.answers if talk.learned[i]):
        upto = replace(talk, messages=talk.messages[: i + 1], learned=(False,) * i + (True,))
        whole = render(template, upto.messages, upto.tools)
        lost, owners = unwritten(template, upto, whole)
        samples.append(_learned_parts(template, upto, whole, owners, specials))
        for number, name in lost.items():
            # What an earlier answer thought is learned in a text of its own; what it said is not to be lost from this one.
            if number == i or number not in upto.answers or not name.startswith(("reasoning", "thinking")):
                left.setdefault(number, name)
    return tuple(samples), left


@lru_cache(maxsize=64)
def _tags(specials: frozenset[str]) -> str:
    """A regular expression that finds special tokens."""
    return "|".join([*map(re.escape, sorted(specials - {""}, key=lambda s: (-len(s), s))), _TAG])


def _shared(one: str, other: str) -> int:
    """How many characters the two begin with alike."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _outside(text: str, at: int, specials: frozenset[str]) -> int:
    """`at`, or where the special token begins that it lies within."""
    for found in re.finditer(_tags(specials), text[max(0, at - 256) : at + 256]):
        start, stop = found.start() + max(0, at - 256), found.end() + max(0, at - 256)
        if start < at < stop:
            return start
    return at


def _ends_in_tag(text: str, specials: frozenset[str]) -> bool:
    return re.search(rf"(?:{_tags(specials)})\Z", text.rstrip()) is not None


def chat_prompt(template: ChatTemplate, text: str, specials: frozenset[str] = frozenset()) -> str:
    """What a model is given that is to answer the user's `text`. Raises ChatProblem, also where `text` has a special token of
    the template or of `specials` written out."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "-"}]
    return render(template, checked(messages, None, template.specials | specials).messages[:1], None, True)


def end_of_turn(template: ChatTemplate, specials: frozenset[str]) -> str:
    """The special token by which an answer ends, of those in `specials`; "" where the template has none."""
    try:
        parts = chat_parts(template, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    except ChatProblem:
        return ""
    _, _, rest = "".join(part.text for part in parts).rpartition("Hello")
    found = re.match(r"\s*(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")", rest)
    return found[1] if found and specials else ""
