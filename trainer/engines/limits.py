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


def _ring_in_fp32(engine: Kind) -> Limit:
    return Limit(
        engine, 'parallel.context_kind = "ring" with engine.precision = "fp32" on CUDA',
        "its flash kernel takes half precision alone there",
        'engine.precision="bf16", parallel.context_kind="all-gather", or parallel.context_kind="ulysses"',
        lambda case: on_gpus(case) and case.layout.cp > 1 and case.layout.context_kind == "ring"
        and case.config.engine.precision == "fp32",
    )  # fmt: skip


LIMITS: tuple[Limit, ...] = (_ring_in_fp32("native"), *DEEPSPEED, *MEGATRON, _ring_in_fp32("megatron"))


def refuse(config: RunConfig, layout: Layout, cuda: bool | None, on_this_machine: bool = True) -> None:
    """Raises ConfigError for what the config's engine cannot do, one line each.

    The user's own DeepSpeed settings are checked against the run as well.

    cuda, on_this_machine: see `Case`.
    """
    refusals = _applying(Case(config, layout, cuda, on_this_machine))
    if refusals:
        raise ConfigError("\n".join(f'engine.kind = "{row.engine}": {row.what}: {row.why}: {row.instead}' for row in refusals))
    if config.engine.kind == "deepspeed":
        user_settings(config, layout)


def supports(config: RunConfig, layout: Layout) -> bool:
    """Whether the config's engine supports a layout, as far as that can be known on any machine."""
    return not _applying(Case(config, layout, cuda=None, on_this_machine=False))


def bf16_refused(config: RunConfig, layout: Layout) -> str:
    """Returns why the config's engine cannot compute in bf16 what it can in fp32; empty if it can."""

    def refusals(precision: str) -> dict[str, str]:
        engine = config.engine.model_copy(update={"precision": precision})
        case = Case(config.model_copy(update={"engine": engine}), layout, cuda=None, on_this_machine=False)
        return {row.what: row.why for row in _applying(case)}

    refused_in_fp32 = refusals("fp32")
    return next((why for what, why in refusals("bf16").items() if what not in refused_in_fp32), "")


def _applying(case: Case) -> list[Limit]:
    return [limit for limit in LIMITS if limit.engine == case.config.engine.kind and limit.applies(case)]


def markdown() -> str:
    """Returns the table of limits as the documentation prints it."""
    rows = ["| engine | not | why | instead |", "|---|---|---|---|"]
    rows += [f"| {row.engine} | {row.what} | {row.why} | {row.instead} |" for row in LIMITS]
    return "\n".join(rows)
