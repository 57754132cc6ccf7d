"""One schema: files beneath files, overrides above, and messages that show the way."""

import pytest

from mikoshi.trainer.config.run import differences, load_config, parse_config, to_toml
from mikoshi.trainer.errors import ConfigError

MODEL = """[model]
vocab = 300
context = 64
layers = 2
width = 32
heads = 4
"""
RUN = """base = "model.toml"

[data]
path = "d"

[train]
steps = 9
global_batch = 8
context = 64

[optim]
schedule = { warmup = 2 }
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "model.toml").write_text(MODEL)
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def refused(run, *overrides):
    with pytest.raises(ConfigError) as error:
        load_config(run, overrides)
    return str(error.value)


def test_base_override_and_default(run):
    config = load_config(run, ["model.width=64", "optim.lr=1e-4", "run.folder=a b/c", "model.windows=[0, 8]"])
    assert (config.model.width, config.model.layers, config.optim.lr) == (64, 2, 1e-4)
    assert (str(config.run.folder), config.run.name, config.model.windows) == ("a b/c", "run", (0, 8))
    assert config.optim.schedule.warmup == 2
    assert parse_config(to_toml(config), "again") == config


def test_mistakes_name_file_line_and_nearest(run):
    (run.parent / "model.toml").write_text(MODEL.replace("heads", "head"))
    first, second = sorted(refused(run).splitlines())
    assert first.startswith(f"{run.parent / 'model.toml'}:1: model.heads: missing")
    assert second == f"{run.parent / 'model.toml'}:6: model.head: unknown key; did you mean model.heads?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.schedule.kind=cosin", "optim.schedule.kind = \"cosin\": input should be 'cosine'"),
        ("optim.schedule.kind=cosin", "did you mean 'cosine'?"),
        ("engine.precision=fp16", "use bf16, which needs neither"),
        ("optim.schedule.warmup=50", "warmup 50 + decay 0 exceeds train.steps 9"),
        ("train.steps=true", "train.steps = true: input should be a valid integer"),
        ("train.steps=2.5", "train.steps = 2.5"),
        ("model.position=learned train.context=128", "longer than the model's 64 learned positions"),
        ("parallel.zero=4", "parallel.zero = 4: input should be 0, 1, 2 or 3"),
        ("run.name=../x", 'command line: run.name = "../x": letters, digits'),
        ("model.heads=5", "command line: model: width 32 is not divisible by heads 5"),
        ("nonsense.key=1", "nonsense: unknown key; the config has run, model, data"),
        ("model.rope.thetta=1", "did you mean model.rope.theta?"),
        ("optim.lr=inf", "optim.lr"),
        ("optim.schedule.kind=wsd", 'kind = "wsd" needs optim.schedule.decay'),
        ("data.path.x=1", "path is a value, not a section"),
    ],
)
def test_each_impossible_value_is_one_clear_line(run, override, message):
    assert message in refused(run, *override.split(" "))


def test_a_circle_of_bases_is_refused(run):
    (run.parent / "model.toml").write_text('base = "run.toml"\n' + MODEL)
    assert "go round in a circle" in refused(run)


def test_differences_are_dotted_keys(run):
    old, new = load_config(run), load_config(run, ["optim.lr=1", "model.rope.theta=5", "data.tokenizer=x"])
    assert differences(old, new) == {
        "model.rope.theta": (10_000.0, 5.0), "data.tokenizer": (None, "x"), "optim.lr": (3e-4, 1.0),
    }  # fmt: skip


def test_text_of_the_command_line_stays_as_it_was_typed(run):
    given = {"run.name": "2024", "run.folder": "00123", "log.wandb": "true", "data.source": "1e5", "checkpoint.folder": "0x10"}
    config = load_config(run, [*(f"{key}={text}" for key, text in given.items()), "optim.lr=1e-3", "run.seed=7"])
    assert (config.run.name, str(config.run.folder), config.log.wandb) == ("2024", "00123", "true")
    assert (str(config.data.source), config.checkpoint.folder) == ("1e5", "0x10")
    assert (config.optim.lr, config.run.seed) == (1e-3, 7)
    assert parse_config(to_toml(config), "again") == config
    with pytest.raises(ConfigError, match="valid integer"):
        load_config(run, ["run.seed=x7"])


def test_a_name_is_measured_in_bytes(run):
    assert load_config(run, [f"run.name=a{'字' * 66}"]).run.name == f"a{'字' * 66}"
    with pytest.raises(ConfigError, match=r"run\.name.*298 bytes: 200 at most"):
        load_config(run, [f"run.name=a{'字' * 99}"])


def test_bytes_that_are_no_text_are_refused_in_one_line(run):
    with pytest.raises(ConfigError, match=r"caf\\udce9.*UTF-8"):
        load_config(run, ["run.name=caf\udce9"])
    (run.parent / "caf\udce9.toml").write_bytes((run).read_bytes())
    with pytest.raises(ConfigError, match=r"caf\\udce9.*UTF-8"):
        load_config(run.parent / "caf\udce9.toml")
    assert load_config(run.parent / "caf\udce9.toml", ["run.name=cafe"]).run.name == "cafe"
