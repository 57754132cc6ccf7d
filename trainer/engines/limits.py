"""What each engine cannot do, in one table: refused before any rank starts, with the reason and the nearest thing that works.

The documentation prints the same table (docs/engines.md).
"""

from __future__ import annotations

from parallel.layout import Layout
from trainer.config import RunConfig
from trainer.engines.deepspeed_json import user_settings
from trainer.engines.deepspeed_limits import DEEPSPEED
from trainer.engines.limit import Case, Limit
from trainer.engines.megatron_limits import MEGATRON
from trainer.errors import ConfigError

LIMITS: tuple[Limit, ...] = (*DEEPSPEED, *MEGATRON)


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


def _met(case: Case) -> list[Limit]:
    return [limit for limit in LIMITS if limit.engine == case.config.engine.kind and limit.met(case)]


def markdown() -> str:
    """The table, as the documentation prints it."""
    rows = ["| engine | not | why | instead |", "|---|---|---|---|"]
    rows += [f"| {row.engine} | {row.what} | {row.why} | {row.instead} |" for row in LIMITS]
    return "\n".join(rows)
