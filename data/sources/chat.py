"""A conversation becomes text by a chat template, in parts of which only the assistant's answers, each with its end, are
learned.

What is learned depends on the template and the conversation alone. It is what {% generation %} marks, as in transformers;
without such marks it is what the conversation up to an answer adds to the conversation before it with the header of an answer,
as in TRL. template.py renders templates, conversation.py checks conversations.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from mikoshi.data.sources.conversation import ROLES, Conversation, find_omitted, parse_conversation
from mikoshi.data.sources.template import (
    CHATML,
    CLOSE,
    OPEN,
    ChatProblem,
    ChatTemplate,
    dump_chat_template,
    load_chat_template,
    parse_chat_template,
    render,
)

__all__ = [
    "CHATML",
    "ROLES",
    "ChatProblem",
    "ChatTemplate",
    "Part",
    "chat_parts",
    "chat_prompt",
    "chat_samples",
    "dump_chat_template",
    "end_of_turn",
    "load_chat_template",
    "parse_chat_template",
]  # fmt: skip

_TAG = r"<[^<>\s]{1,64}>"  # how templates write special tokens, where the tokenizer has not told which there are


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a document.

    learned: False for text that is read but never predicted, such as a prompt.
    special: written by a chat template, so that special tokens in it are real ones.
    """

    text: str
    learned: bool = True
    special: bool = False


class _RewrittenTurn(ChatProblem):
    """The template writes a turn differently once more turns follow."""


def chat_samples(
    template: ChatTemplate, messages: object, specials: frozenset[str] = frozenset(), tools: object = None
) -> tuple[tuple[Part, ...], ...]:
    """The texts that a conversation becomes, each in parts: the answers with their ends are learned, all else is only read.

    All parts are special, since no message may hold a special token of the template or of `specials`. Usually there is one
    text. If the template writes an answer differently once more turns follow (without its reasoning, say), there is one text
    for each learned answer, ending with it, as the model will see it in use.

    Raises ChatProblem, also for content that the template would leave out.
    """
    known = template.specials | specials
    conversation = parse_conversation(messages, tools, known)
    try:
        samples, omitted = _samples(template, conversation, known)
    except ChatProblem as problem:
        listed = next((n for n, m in enumerate(conversation.messages, 1) if isinstance(m.get("content"), list)), 0)
        if listed and str(problem).startswith("chat template"):
            reason = (
                f"no text: the content of message {listed} is a list, and the template {template.name!r} writes texts alone"
            )
            raise ChatProblem(reason) from None
        raise
    if not any(part.learned for parts in samples for part in parts):
        raise ChatProblem(f"no answer: the template {template.name!r} writes none of the assistant's messages")
    _check_written(template, omitted)
    return samples


def _samples(
    template: ChatTemplate, conversation: Conversation, specials: frozenset[str]
) -> tuple[tuple[tuple[Part, ...], ...], dict[int, str]]:
    """The texts in parts, and what the template leaves out, by message number."""
    whole = render(template, conversation.messages, conversation.tools)
    omitted, owners = find_omitted(template, conversation, whole)
    try:
        whole_parts = _learned_parts(template, conversation, whole, owners, specials)
    except _RewrittenTurn:
        if conversation.answers == [len(conversation.messages) - 1]:
            raise
        samples, omitted = _sample_per_answer(template, conversation, specials)
        if "content" in omitted.values():  # not what an answer thought is left out later, but what was said
            raise
        return samples, omitted
    if len(conversation.answers) > 1 and omitted.keys() & set(conversation.answers[:-1]):
        return _sample_per_answer(template, conversation, specials)
    return (whole_parts,), omitted


def chat_parts(
    template: ChatTemplate, messages: object, specials: frozenset[str] = frozenset(), tools: object = None
) -> tuple[Part, ...]:
    """The parts of a conversation that becomes one text. Raises ChatProblem as chat_samples does, and if it becomes several."""
    samples = chat_samples(template, messages, specials, tools)
    if len(samples) > 1:
        raise ChatProblem(
            f"chat template: {template.name!r} writes an answer otherwise once more turns follow: it is a text for each answer"
        )
    return samples[0]


def _check_written(template: ChatTemplate, omitted: dict[int, str]) -> None:
    for number, name in sorted(omitted.items()):
        if name == "content (a list)":
            raise ChatProblem(
                f"no text: the content of message {number + 1} is a list, and the template {template.name!r} does not write it"
            )
        what = "the column of tools" if number < 0 else f"{name!r} of message {number + 1}"
        raise ChatProblem(f"not written: the template {template.name!r} leaves out {what}: use a template that writes it")


def _parts(whole: str, cuts: list[tuple[int, int, bool]]) -> tuple[Part, ...]:
    """The text in parts, cut at each (start, stop, learned) of `cuts`."""
    parts, at = [], 0
    for start, stop, learned in cuts:
        parts += [Part(whole[at:start], False, True), Part(whole[start:stop], learned, True)]
        at = stop
    parts.append(Part(whole[at:], False, True))
    return tuple(part for part in parts if part.text)


def _learned_parts(
    template: ChatTemplate, conversation: Conversation, whole: str, owners: list[int], specials: frozenset[str]
) -> tuple[Part, ...]:
    if OPEN in whole:
        return _marked(template, conversation, whole, owners, specials)
    return _parts(whole, list(_answers(template, conversation, whole, specials)))


def _marked(
    template: ChatTemplate, conversation: Conversation, whole: str, owners: list[int], specials: frozenset[str]
) -> tuple[Part, ...]:
    """Parts by {% generation %}. An end marker right after an answer is learned even if it is not marked, or generation
    would never end."""
    text, cuts, at = "", list[tuple[int, int]](), 0
    for found in re.finditer(f"{OPEN}([^{CLOSE}]*){CLOSE}", whole):
        text += whole[at : found.start()]
        cuts.append((len(text), len(text) + len(found[1])))
        text += found[1]
        at = found.end()
    text += whole[at:]
    if len(owners) != len(cuts) or (not all(conversation.learned[i] for i in conversation.answers) and -1 in owners):
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
        out.append((start, stop, owners[n] < 0 or conversation.learned[owners[n]]))
    return _parts(text, out)


@lru_cache(maxsize=64)
def _unmarked_end(template: ChatTemplate, specials: frozenset[str]) -> str:
    """The special token, with white space before it, that ends an answer outside of what {% generation %} marks; "" for
    none."""
    try:
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        marked, _, rest = render(template, messages, None).rpartition(CLOSE)
    except ChatProblem:
        return ""
    if _ends_in_tag(marked, specials):
        return ""
    found = re.match(rf"\s*(?:{_tags(specials)})", rest)
    return found[0] if found else ""


def _answers(
    template: ChatTemplate, conversation: Conversation, whole: str, specials: frozenset[str]
) -> Iterator[tuple[int, int, bool]]:
    """For each answer its start and stop in `whole`, and whether it is learned."""
    for i in conversation.answers:
        try:
            yield (*_answer(template, conversation, i, whole, specials), conversation.learned[i])
        except _RewrittenTurn:
            if conversation.learned[i]:
                raise


def _answer(
    template: ChatTemplate, conversation: Conversation, i: int, whole: str, specials: frozenset[str]
) -> tuple[int, int]:
    """Start and stop in `whole` of the answer that is message `i`. Raises _RewrittenTurn if they cannot be determined."""
    before = render(template, conversation.messages[:i], conversation.tools, True)
    after = render(template, conversation.messages[: i + 1], conversation.tools)
    start, remedy = len(before), "mark answers by {% generation %} in the template"
    if not after.startswith(before):
        raise _RewrittenTurn(
            f"chat template: {template.name!r} asks for an answer by {before[-24:]!r}, and message {i + 1} is not written "
            f"behind that, so that it cannot be told what of it is learned: {remedy}"
        )
    if whole.startswith(before):
        if _prompt_always(template):
            stop = _end_of_answer(template, conversation, i, after, start, specials)
            if whole.startswith(after[:stop]):
                return start, stop
        elif whole.startswith(after):
            return start, len(after)
        # Else the end of the text has something of its own, as an end of text, in place of the next turn.
        elif (stop := _before_special(whole, _common_prefix(whole, after), specials)) > start:
            return start, stop
    raise _RewrittenTurn(
        f"chat template: under {template.name!r} the conversation up to message {i + 1} is not how the whole one begins, so "
        f"that its answers cannot be told: {remedy}"
    )


@lru_cache(maxsize=64)
def _prompt_always(template: ChatTemplate) -> bool:
    """Whether the template ends every text with the header of an answer, requested or not."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    try:
        plain, prompted = render(template, messages, None), render(template, messages, None, True)
        longer = render(template, [*messages, {"role": "user", "content": "More"}], None)
    except ChatProblem:
        return False
    return OPEN not in plain and plain == prompted and not longer.startswith(plain)


def _end_of_answer(
    template: ChatTemplate, conversation: Conversation, i: int, after: str, start: int, specials: frozenset[str]
) -> int:
    """The end of the answer in `after`, which continues with the header of another: behind the first special token after its
    text, and behind the white space that follows whatever comes next."""
    message = conversation.messages[i]
    content = message.get("content")
    text = content.strip() if isinstance(content, str) else ""
    at = after.find(text, start) if text and not message.get("tool_calls") else -1
    if at < 0:
        raise ChatProblem(
            f"chat template: {template.name!r} ends every text with the header of an answer, so that it cannot be told where "
            f"message {i + 1} ends: mark answers by {{% generation %}} in the template"
        )
    at += len(text)
    marker = re.compile(rf"\s*(?:{_tags(specials)})?\s*").match(after, at)
    assert marker is not None  # it may match nothing
    longer = render(template, [*conversation.messages[: i + 1], {"role": "user", "content": "More"}], conversation.tools)
    return max(at, min(marker.end(), _before_special(after, _common_prefix(longer, after), specials)))


def _sample_per_answer(
    template: ChatTemplate, conversation: Conversation, specials: frozenset[str]
) -> tuple[tuple[tuple[Part, ...], ...], dict[int, str]]:
    """A text for each learned answer, and what of the conversation is in none of them."""
    samples, omitted = [], dict[int, str]()
    for i in (i for i in conversation.answers if conversation.learned[i]):
        upto = replace(conversation, messages=conversation.messages[: i + 1], learned=(False,) * i + (True,))
        whole = render(template, upto.messages, upto.tools)
        lost, owners = find_omitted(template, upto, whole)
        samples.append(_learned_parts(template, upto, whole, owners, specials))
        for number, name in lost.items():
            # What an earlier answer thought is learned in a text of its own; what it said is not to be lost from this one.
            if number == i or number not in upto.answers or not name.startswith(("reasoning", "thinking")):
                omitted.setdefault(number, name)
    return tuple(samples), omitted


@lru_cache(maxsize=64)
def _tags(specials: frozenset[str]) -> str:
    """A regular expression that finds special tokens."""
    return "|".join([*map(re.escape, sorted(specials - {""}, key=lambda s: (-len(s), s))), _TAG])


def _common_prefix(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _before_special(text: str, at: int, specials: frozenset[str]) -> int:
    """`at`, or the start of the special token that it lies within."""
    for found in re.finditer(_tags(specials), text[max(0, at - 256) : at + 256]):
        start, stop = found.start() + max(0, at - 256), found.end() + max(0, at - 256)
        if start < at < stop:
            return start
    return at


def _ends_in_tag(text: str, specials: frozenset[str]) -> bool:
    return re.search(rf"(?:{_tags(specials)})\Z", text.rstrip()) is not None


def chat_prompt(template: ChatTemplate, text: str, specials: frozenset[str] = frozenset()) -> str:
    """The prompt for a model that is to answer the user's `text`.

    Raises ChatProblem, also if `text` spells out a special token of the template or of `specials`.
    """
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "-"}]
    return render(template, parse_conversation(messages, None, template.specials | specials).messages[:1], None, True)


def end_of_turn(template: ChatTemplate, specials: frozenset[str]) -> str:
    """The special token, of those in `specials`, that ends an answer; "" if the template has none."""
    try:
        parts = chat_parts(template, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    except ChatProblem:
        return ""
    _, _, rest = "".join(part.text for part in parts).rpartition("Hello")
    found = re.match(r"\s*(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")", rest)
    return found[1] if found and specials else ""
