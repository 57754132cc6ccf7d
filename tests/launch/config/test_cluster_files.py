"""Cluster files: those that are shipped, and the mistakes in others."""

import re
from pathlib import Path

import pytest

from mikoshi.launch.config.cluster import KINDS, NetworkSection, PatienceSection, load_cluster
from mikoshi.trainer.errors import ConfigError, LaunchError

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "configs" / "clusters").glob("*.toml"))
MEANINGLESS = {"local": {"image"}, "ssh": {"image"}, "kubernetes": {"setup", "secrets"}}
"""Keys of all kinds that a kind has no use for."""


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_shipped_file_loads_and_is_named_after_its_kind(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_cluster(path.stem).kind == path.stem == load_cluster(str(path)).kind


def test_every_kind_is_shipped():
    assert {path.stem for path in FILES} == set(KINDS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_key_of_a_kind_stands_in_its_file_with_a_word_on_it(path):
    text = path.read_text()
    keys = set(KINDS[path.stem].model_fields) - {"kind", "network", "patience", "env"} - MEANINGLESS.get(path.stem, set())
    keys |= (
        set(PatienceSection.model_fields)
        | {"interface"}
        | (set() if path.stem == "local" else set(NetworkSection.model_fields))
    )
    there = set(re.findall(r"^(?:# )?([a-z_]+) = ", text, re.MULTILINE))
    assert keys <= there, f"missing: {sorted(keys - there)}"
    assert there - keys <= {"kind"}
    assert "# [env]" in text


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_what_is_commented_out_is_valid_too(path, tmp_path):
    lines = [re.sub(r"^# (?=[a-z_]+ = (?!\"{3})|\[)", "", line) for line in path.read_text().splitlines()]
    text = "\n".join(line for line in lines if not line.startswith(("hostfile", "HF_", "# HF_")))
    assert text.count("\n[env]") == 1
    assert load_cluster(write(tmp_path, text)).kind == path.stem


def test_the_local_cluster_works_as_it_is_shipped(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_cluster("local").ranks == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('kind = "slurm"\n\npartitions = "x"\n', r"mine\.toml:3: partitions: unknown key.*partition"),
        ('kind = "slurm"\nnodes = 0\n', r"mine\.toml:2: nodes"),
        ('kind = "slurm"\nnodes = "2"\n', r"mine\.toml:2: nodes"),
        ('kind = "ssh"\nhosts = ["-oProxyCommand=x"]\n', r"mine\.toml:2: hosts.*no host name"),
        ('kind = "ssh"\nhosts = ["a", "b", "a"]\n', r"mine\.toml:2: hosts.*a stands there twice"),
        ('kind = "ssh"\nhosts = ["Node1", "b", "node1"]\n', r"hosts.*node1 stands there twice, as Node1"),
        ('kind = "ssh"\nhosts = ["::1", "0:0::1"]\n', r"hosts.*0:0::1 stands there twice, as ::1"),
        ('kind = "slurm"\noptions = ["-N 2"]\n', r"mine\.toml:2: options.*long option"),
        ('kind = "slurm"\noptions = ["--qos"]\n', r"mine\.toml:2: options.*'--qos': a long option with its value after ="),
        ('kind = "slurm"\noptions = ["--hold", "--expor=ALL"]\n', r"mine\.toml:2: options.*--export is set by Mikoshi: leave"),
        ('kind = "local"\n[network]\ninterface = "eth0; reboot"\n', r"mine\.toml:3: network\.interface.*no name"),
        ('kind = "local"\n[env]\n"A B" = "1"\n', r"env.*no name of an environment variable"),
        ('kind = "sge"\n', r"mine\.toml: kind = 'sge': one of local, ssh, slurm, kubernetes"),
        ("nodes = 1\n", r"mine\.toml: kind = None: one of"),
        ('kind = "local\n', r"mine\.toml: not TOML"),
        ('kind = "ssh"\n', r"mine\.toml: give hosts or a hostfile"),
    ],
)
def test_a_mistake_names_the_file_the_line_the_key(text, said, tmp_path):
    with pytest.raises(ConfigError) as error:
        load_cluster(write(tmp_path, text))
    assert re.search(said, str(error.value)), error.value
    assert len(str(error.value).splitlines()) == 1


def test_an_unknown_cluster_is_told_with_those_that_there_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"--on mars: .*there are kubernetes, local, slurm, ssh"):
        load_cluster("mars")


def test_an_override_of_the_command_line_counts(tmp_path):
    assert load_cluster(write(tmp_path, 'kind = "local"\n'), ("network.interface=lo",)).network.interface == "lo"


def test_hosts_of_a_hostfile_beside_the_cluster_file_are_taken_in_its_order(tmp_path):
    (tmp_path / "hosts").write_text("b slots=4 # rack 2\n\na slots=4\n")
    cluster = load_cluster(write(tmp_path, 'kind = "ssh"\nhostfile = "hosts"\n'))
    assert (cluster.hosts, cluster.ranks) == (["b", "a"], 4)
    (tmp_path / "hosts").write_text("b slots=4\na slots=8\n")
    with pytest.raises(LaunchError, match="every node must carry as many ranks"):
        load_cluster(write(tmp_path, 'kind = "ssh"\nhostfile = "hosts"\n'))


def test_two_spellings_of_a_host_in_a_hostfile_are_one_host(tmp_path):
    (tmp_path / "hosts").write_text("Node1 slots=4\nnode2 slots=4\nnode1 slots=4\n")
    with pytest.raises(LaunchError, match=r"hosts:3: node1 stands there twice, as Node1"):
        load_cluster(write(tmp_path, 'kind = "ssh"\nhostfile = "hosts"\n'))


def test_text_of_the_command_line_stays_as_it_was_typed(tmp_path):
    """Also what TOML would read as a number, a truth, a time or a date."""
    given = {"account": "123456", "partition": "1e5", "qos": "true", "reservation": "00123", "time": "00:00:00",
             "memory": "0", "gpu_type": "2024-01-02", "constraint": "inf", "env.FLAG": "1"}  # fmt: skip
    cluster = load_cluster(write(tmp_path, 'kind = "slurm"\n'), tuple(f"{key}={text}" for key, text in given.items()))
    assert {key: getattr(cluster, key) for key in given if "." not in key} == {k: v for k, v in given.items() if "." not in k}
    assert cluster.env == {"FLAG": "1"}
    quoted = load_cluster(write(tmp_path, 'kind = "slurm"\n'), ("time='1-00:00:00'", "nodes=3", "exclusive=true"))
    assert (quoted.time, quoted.nodes, quoted.exclusive) == ("1-00:00:00", 3, True)
