"""Text to token ids and back, and the fingerprint that ties a dataset to the tokenizer that made it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.errors import DataError

SEPARATOR = "<|endoftext|>"
"""The token that ends every document."""


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face `tokenizers` file in use. `separator` is the id that ends a document."""

    backend: Backend
    separator: int
    fingerprint: str

    @property
    def vocab(self) -> int:
        """One more than the largest id: the rows that an embedding needs, also where ids have gaps."""
        return max(self.backend.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, on all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=False)
        return text

    def save(self, path: Path) -> None:
        path.write_text(self.backend.to_str(), encoding="utf-8")


def _wrap(backend: Backend, origin: str) -> Tokenizer:
    # A file may say how one application cut and filled its inputs, and would turn a separator that is written out in a
    # text into a real one: none of that is part of the vocabulary.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    separator = backend.token_to_id(SEPARATOR)
    if separator is None:
        ends = [t for t in ("</s>", "<|end_of_text|>", "<eos>", "<|im_end|>") if backend.token_to_id(t) is not None]
        if not ends:
            raise DataError(f"{origin}: the tokenizer has no {SEPARATOR!r} token to end documents with: add one")
        separator = backend.token_to_id(ends[0])
    assert separator is not None
    return Tokenizer(backend, separator, hashlib.sha256(backend.to_str().encode()).hexdigest())


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises DataError if it is missing, broken, or cannot end a document."""
    try:
        return _wrap(Backend.from_str(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise DataError(f"data.tokenizer: cannot read {path}: {error.strerror}") from None
    except DataError:
        raise
    except Exception as error:  # the Rust side raises bare Exception
        raise DataError(f"data.tokenizer: {path} is not a tokenizer.json: {error}") from None


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with `vocab` tokens, the separator first and all 256 bytes among them: any text can be encoded."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrap(backend, "the trained tokenizer")
