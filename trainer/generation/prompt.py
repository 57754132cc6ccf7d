"""Encodes a prompt, plain or by the run's chat template, and finds the tokens that end generation."""

from __future__ import annotations

from mikoshi.data.errors import DataError
from mikoshi.data.sources.chat import (
    ChatProblem,
    ChatTemplate,
    chat_prompt,
    end_of_turn,
    load_chat_template,
    parse_chat_template,
)
from mikoshi.data.tokenizer.tokenizer import Tokenizer
from mikoshi.trainer.config.data import DataSection
from mikoshi.trainer.config.run import load_config
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.record.run_folder import RunFolder


def chat_of(data: DataSection) -> ChatTemplate | None:
    """The chat template of a run's data; None where it has none, or several, or its file is here no more."""
    mixed = data.mixture.values()
    inherited = (data.chat, data.chat_date)
    templates = {(m.chat or data.chat, m.chat_date or data.chat_date) for m in mixed} if data.mixture else {inherited}
    templates = {pair for pair in templates if pair[0]}
    if len(templates) != 1:
        return None
    try:
        return load_chat_template(*templates.pop())
    except DataError:
        return None


def template_of(folder: RunFolder) -> ChatTemplate | None:
    """The chat template that the run has kept; of a run of before, the one that its config names."""
    if folder.chat.is_file():
        return parse_chat_template(folder.chat.read_text(encoding="utf-8"))
    return chat_of(load_config(folder.path).data)


def encode_prompt(
    folder: RunFolder, tokenizer: Tokenizer, prompt: str, chat: bool, special: bool | None
) -> tuple[list[int], frozenset[int]]:
    """The ids to go on from, never empty, and those at which generation stops: the tokenizer's, and the end of a turn under
    the run's template.

    `chat`: the prompt is a user's turn, and what the template writes around it is added. `special`: special tokens that are
    written out in the prompt are real ones; None: where the run is of conversations. Raises ConfigError.
    """
    template = template_of(folder)
    ending = "" if template is None else end_of_turn(template, tokenizer.special_tokens)
    stops = tokenizer.stops | {i for i in [tokenizer.backend.token_to_id(ending)] if ending and i is not None}
    if not chat:
        real = template is not None if special is None else special
        ids = tokenizer.encode(prompt, special=real)
        # What a template writes of a conversation has its own beginning, or none.
        return ((ids or [tokenizer.separator]) if real and template is not None else tokenizer.start(ids)), stops
    if template is None:
        raise ConfigError(f"--chat: {folder.path} has no chat template, or several: give the whole text with --prompt")
    if special:
        raise ConfigError("--chat and --special: a user's turn has no special tokens; leave out one of the two")
    try:
        return tokenizer.encode(chat_prompt(template, prompt, tokenizer.special_tokens), special=True), stops
    except ChatProblem as problem:
        raise ConfigError(f"--chat: {problem}") from None
