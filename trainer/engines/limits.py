"""What each engine cannot do, in one table: refused before any rank starts, with the reason and the nearest thing that works.

The documentation prints the same table (docs/engines.md).
"""

from __future__ import annotations

from mikoshi.parallel.layout import Layout
from mikoshi.trainer.config.engine import Kind
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.deepspeed.limits import DEEPSPEED
from mikoshi.trainer.engines.deepspeed.settings import user_settings
from mikoshi.trainer.engines.limit import Case, Limit, on_gpus
from mikoshi.trainer.engines.megatron.limits import MEGATRON
from mikoshi.trainer.errors import ConfigError


def _ring(engine: Kind) -> Limit:
    return Limit(
        engine, 'parallel.context_kind = "ring" with engine.precision = "fp32" on CUDA',
        "its flash kernel takes half precision alone there",
        'engine.precision="bf16", parallel.context_kind="all-gather", or parallel.context_kind="ulysses"',
        lambda case: on_gpus(case) and case.layout.cp > 1 and case.layout.context_kind == "ring"
        and case.config.engine.precision == "fp32",
    )  # fmt: skip


LIMITS: tuple[Limit, ...] = (_ring("native"), *DEEPSPEED, *MEGATRON, _ring("megatron"))


def refuse(config: RunConfig, layout: Layout, cuda: bool | None, here: bool = True) -> None:
    """Raises ConfigError with a line for everything that the config's engine cannot do of it, or for what of the user's own
    DeepSpeed settings contradicts it. `cuda`, `here`: as Case has them."""
    met = _met(Case(config, layout, cuda, here))
    if met:
        raise ConfigError("\n".join(f'engine.kind = "{row.engine}": {row.what}: {row.why}: {row.instead}' for row in met))
    if config.engine.kind == "deepspeed":
        user_settings(config, layout)


def serves(config: RunConfig, layout: Layout) -> bool:
    """Whether the config's engine can have a layout, as far as is known anywhere."""
    return not _met(Case(config, layout, cuda=None, here=False))


def bf16_refused(config: RunConfig, layout: Layout) -> str:
    """Why the config's engine cannot compute in bf16 what it can in fp32; empty where it can."""

    def met(precision: str) -> dict[str, str]:
        engine = config.engine.model_copy(update={"precision": precision})
        case = Case(config.model_copy(update={"engine": engine}), layout, cuda=None, here=False)
        return {row.what: row.why for row in _met(case)}

    without = met("fp32")
    return next((why for what, why in met("bf16").items() if what not in without), "")


def _met(case: Case) -> list[Limit]:
    return [limit for limit in LIMITS if limit.engine == case.config.engine.kind and limit.met(case)]


def markdown() -> str:
    """The table, as the documentation prints it."""
    rows = ["| engine | not | why | instead |", "|---|---|---|---|"]
    rows += [f"| {row.engine} | {row.what} | {row.why} | {row.instead} |" for row in LIMITS]
    return "\n".join(rows)
