"""The `[data]` part of a run's schema: where text comes from, how it becomes rows, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Count = Annotated[int, Field(gt=0, lt=1 << 48)]
Natural = Annotated[int, Field(ge=0, lt=1 << 48)]
Share = Annotated[float, Field(ge=0, le=1)]
Format = Literal["auto", "jsonl", "json", "parquet", "arrow", "text", "webdataset"]


class Section(BaseModel):
    # A validator is built when it is first needed: a command that reads no config waits for none.
    """Base of all config sections: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class MixedSection(Section):
    """One source of a mixture. What is not given here is as `[data]` has it."""

    weight: float = Field(1.0, ge=0, description="its part of the samples, beside the others' weights")
    schedule: list[tuple[Natural, Annotated[float, Field(ge=0)]]] = Field(
        [], description="other weights later, [tokens, weight]: from so many tokens of the order on"
    )
    epochs: float | None = Field(None, gt=0, description="times that it is read at most (default: as often as it takes)")
    path: str | None = Field(
        None, description="its dataset, where that is prepared already (default: a folder of its name under data.path)"
    )
    source: str | None = None
    format: Format | None = None
    text_column: str | None = None
    template: str | None = None
    where: str | None = None
    chat: str | None = None
    chat_date: str | None = None
    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    on_invalid: Literal["error", "skip"] | None = None
    on_broken: Literal["error", "skip"] | None = None

    @field_validator("schedule")
    @classmethod
    def _goes_up(cls, schedule: list[tuple[int, float]]) -> list[tuple[int, float]]:
        starts = [start for start, _ in schedule]
        if starts != sorted(set(starts)) or starts[:1] == [0]:
            raise ValueError("numbers of tokens that go up, above 0: [[20_000_000_000, 0.5], [30_000_000_000, 0.1]]")
        return schedule


class FilterSection(Section):
    """Documents that `prepare` leaves out, each under its reason in the report. All off by default."""

    min_chars: Natural = Field(0, description="shortest document")
    max_chars: Natural = Field(0, description="longest document; 0: no limit")
    max_symbols: Share = Field(1.0, description="largest share of characters that are no letters, digits or spaces")
    max_repeated_lines: Share = Field(1.0, description="largest share of lines that stand there before already")
    drop_matching: str = Field("", description="regular expression: documents in which it is found")
    deduplicate: bool = Field(False, description="of equal documents of a source keep the first")


class CacheSection(Section):
    """Shards of a dataset that is far away (data.path = "s3://…"), on this machine's disk."""

    folder: Path | None = Field(
        None, description="for all runs and ranks of a node, on its own disk (default: this user's under $TMPDIR or /var/tmp)"
    )
    bytes: Count = Field(64 << 30, description="largest size; what was used longest ago goes first")


class DataSection(Section):
    """Sources, preparation, order and streaming of the training data."""

    path: str = Field(description="the prepared dataset: a folder, an s3:// gs:// az:// URL, or a Megatron .bin/.idx prefix")
    source: str = Field(
        "",
        description='what `prepare` reads: "python-stdlib", a file, folder, glob or URL of text, JSONL, Parquet, Arrow or '
        'WebDataset, or "hub:org/name@revision"',
    )
    format: Format = Field(
        "auto", description="of the source's files (auto: by suffix; json: an object a line, an array of them, or one object)"
    )
    text_column: str = Field("text", description="column or key that holds the text")
    template: str = Field("", description='columns put together to one text: "{title}\\n\\n{text}"')
    where: str = Field("", description="keeps the rows for which this is true: 'lang == \"en\" and stars >= 10'")
    chat: str = Field("", description='rows are conversations, answers alone are learned: "chatml" or a chat template\'s file')
    chat_date: str = Field("", description="the day that a chat template may write (strftime_now), as 2026-01-31; empty: none")
    messages: str = Field("messages", description="column of a conversation's messages")
    prompt: str = Field("prompt", description="column of the prompt, where there are no messages")
    response: str = Field("response", description="column of the answer")
    on_invalid: Literal["error", "skip"] = Field("error", description="a row that cannot be read: stop, or count and go on")
    on_broken: Literal["error", "skip"] = Field(
        "error", description="a file that breaks off: stop, or count what is known to be lost (one at least) and go on"
    )
    max_invalid: float | None = Field(
        None, ge=0, description="skipped documents at which `prepare` fails all the same: a number, or below 1 a share"
    )
    mixture: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w-]*$")], MixedSection] = Field(
        {}, description="several sources by name, each [data.mixture.NAME] with a weight"
    )
    filters: FilterSection = FilterSection()
    tokenizer: str | None = Field(
        None, description='a tokenizer.json or ranks file, or "gpt2", "bytes" (default: train one on the text)'
    )
    separator: str = Field(
        "", description="the token that ends a document (default: eos_token of tokenizer_config.json beside the tokenizer, or "
        "eos_token_id of generation_config.json)",
    )  # fmt: skip
    bos: str = Field(
        "auto", description='the token that begins a document of plain text: a token, "none", or "auto": the one that the '
        "tokenizer itself writes there (its add_bos_token, or its post-processor), if any",
    )  # fmt: skip
    tokenizer_vocab: Annotated[int, Field(ge=257, le=1 << 24)] = Field(8192, description="tokens of the tokenizer to train")
    held_out: float = Field(0.01, gt=0, lt=0.5, description="share of the documents kept for evaluation")
    stream: bool = Field(False, description="read the sources while training, with no `prepare`")
    lanes: Count | None = Field(
        None, description="stream: parts of a batch that are read side by side; divides train.global_batch (default: up to 64)"
    )
    packing: Literal["cut", "fit"] = Field(
        "cut", description="rows: the text cut every `context` tokens, or whole documents fitted together"
    )
    document_mask: bool = Field(True, description="attention and positions stay inside a document")
    warmup: list[tuple[Natural, Count]] = Field(
        [], description="sequence-length warm-up, [step, tokens]: from that step on rows are read in pieces of so many tokens"
    )
    shuffle_window: Natural = Field(
        0, description="shards whose samples are shuffled together; 0: all. A window of a distant dataset must fit in the cache"
    )
    skip: list[tuple[Natural, Natural]] = Field([], description="positions to leave out, [first, one past the last] each")
    on_change: Literal["refuse", "accept"] = Field(
        "refuse", description="a mixture that is not the one the run was begun with: stop, or change it from here on"
    )
    cache: CacheSection = CacheSection()
    prefetch: Count = Field(2, description="batches read ahead of the step")

    @field_validator("bos")
    @classmethod
    def _bos_is_a_token(cls, value: str) -> str:
        if value.lower() in ("", "yes", "true", "on", "no", "false", "off"):
            raise ValueError(
                '"auto" begins text as the tokenizer does, "none" with no token, else give the token, such as "<s>"'
            )
        return value

    @field_validator("separator")
    @classmethod
    def _separator_is_a_token(cls, value: str) -> str:
        if value.lower() in ("auto", "none", "yes", "true", "on", "no", "false", "off"):
            raise ValueError(
                'give the token, such as "</s>", or leave it out: then the tokenizer\'s files say what ends a document'
            )
        return value

    @model_validator(mode="after")
    def _agrees(self) -> DataSection:
        if self.packing == "fit" and not self.document_mask:
            raise ValueError('packing "fit" puts documents side by side: it needs document_mask = true')
        if self.warmup and not self.document_mask:
            raise ValueError("warmup reads rows in pieces: it needs document_mask = true")
        steps = [step for step, _ in self.warmup]
        if steps != sorted(set(steps)):
            raise ValueError(f"warmup: its steps {steps} do not go up")
        if self.stream and self.packing == "fit":
            raise ValueError('packing "fit" needs all lengths beforehand: prepare the data, or set packing = "cut"')
        if self.stream and self.shuffle_window:
            raise ValueError("shuffle_window is of prepared shards: leave it out, or set stream = false")
        if self.lanes and not self.stream:
            raise ValueError("lanes are of a stream: leave them out, or set stream = true")
        for name, mixed in self.mixture.items():
            if mixed.path and mixed.source:
                raise ValueError(
                    f"mixture.{name} has a source and a path: leave out the path, or the source if it is prepared there"
                )
            if self.stream and (mixed.path or mixed.epochs):
                key = "path" if mixed.path else "epochs"
                raise ValueError(f"mixture.{name}.{key} needs prepared data: leave it out, or set stream = false")
        if self.mixture and self.source:
            raise ValueError(
                f"source = {self.source!r} and a mixture: name the source in [data.mixture.NAME], or leave one out"
            )
        return self


class CheckpointSection(Section):
    """When, where and how the run is saved, and what is kept."""

    every: Natural | None = Field(
        None, description="steps between checkpoints; 0: only at the end (default: by time, some minutes apart or more, as "
        "often as loses least to saves and faults together, see recovery.mtbf)",
    )  # fmt: skip
    keep: Count = Field(2, description="newest checkpoints that are kept")
    keep_every: Natural = Field(
        0, description="checkpoints of steps that this divides are kept for good, and saved where `every` is not given; 0: none"
    )
    folder: str = Field(
        "", description="where they go: a folder, or a URL such as s3://bucket/runs/x (default: in the run folder)"
    )
    background: bool = Field(True, description="written while training goes on, from a copy in the host's memory")
    verify: Literal["digests", "sizes"] = Field(
        "digests", description="what is compared before one is loaded: every byte, or sizes"
    )

    @property
    def regular(self) -> int:
        """Every so many steps there is a checkpoint whenever the run is started and however fast it is; 0: there is none."""
        return self.every or 0


class GuardSection(Section):
    """What is done about a step whose figures cannot be trusted."""

    retry: bool = Field(
        True, description="compute such a step once more: a device's passing fault gives another result, the data's does not"
    )
    spike: Literal["record", "skip", "rewind"] = Field(
        "record", description="a loss or gradient norm far above the last ones: only recorded; not applied; or gone back before"
    )
    threshold: float = Field(
        12.0, gt=0, description="how far is far: deviations (1.4826 x median absolute deviation) above the median"
    )
    window: Count = Field(128, description="applied steps that the median is of")
    rewind: Count = Field(
        100, description="steps to go back at least, to a checkpoint, of which as many as it takes are kept; the batches in "
        "between are skipped",
    )  # fmt: skip
    skip: Natural = Field(0, description="further batches skipped after the one that spiked, when going back")
    rewinds: Count = Field(5, description="times to go back in all; then the run ends")
    give_up: Count = Field(20, description="steps in a row that change nothing before ranks start again from a checkpoint")
    compare: Natural = Field(
        100, description="steps between comparisons of replicas, which also precede every checkpoint; 0: never"
    )


class RecoverySection(Section):
    """How ranks are watched and started again; a restart goes on from the newest checkpoint."""

    restarts: Natural = Field(8, description="restarts for one cause without progress in between; 0: none")
    min_nodes: Natural = Field(0, description="nodes with which a submitted run goes on when others are lost; 0: it needs all")
    backoff: float = Field(
        1.0, ge=0, description="seconds before the second restart in a row, doubled from one to the next up to 60"
    )
    mtbf: float | None = Field(
        None, gt=0, le=1e6, description="hours between two faults of the whole run, assumed where saves go by time (default: "
        "50,000 hours over the number of ranks, 24 at most)",
    )  # fmt: skip
    silence: float = Field(
        60.0, gt=0, description="seconds without a sign of life within a step before a rank counts as hung; 12 times the "
        "longest of its latest steps if that is longer. Steps are judged so once 8 undisturbed ones are known",
    )  # fmt: skip
    patience: float = Field(
        900.0, gt=0, description="the same until then and outside of steps: start, compilation, evaluation, saving, and the "
        "first steps after these",
    )  # fmt: skip
    grace: float = Field(120.0, gt=0, description="seconds to save after a signal to stop, before the ranks are killed")
