"""What Slurm prints is read right, what is given to it is exact, and what cannot be is refused in one line."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mikoshi.launch.backends.base import JobState
from mikoshi.launch.backends.slurm.commands import clean_environment
from mikoshi.launch.backends.slurm.parse import job_states, parse_time, safe_name
from mikoshi.launch.backends.slurm.site import SlurmSite, allocation, attempts_without_checkpoint
from mikoshi.launch.backends.slurm.slurm import SCRIPT, SlurmBackend, array_folder, submit_array
from mikoshi.launch.config.cluster import LocalCluster, SlurmCluster
from mikoshi.launch.config.private_env import PRIVATE, collect_env, read_private, write_private
from mikoshi.launch.runs.record import Request, Result, Started, SubmittedRun, create_run, new_spec
from mikoshi.parallel.process.nodelist import expand_nodelist
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.record.run_folder import RunFolder
from runs import run_config

SBATCH = """#!{python}
import json, os, sys
from pathlib import Path
here = Path(__file__).parent
name = Path(sys.argv[0]).name
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
answer = json.loads((here / "answers.json").read_text()).get(name, [0, "", ""])
sys.stdout.write(answer[1]); sys.stderr.write(answer[2]); sys.exit(answer[0])
"""
PARTITIONS = (
    "PartitionName=small AllowGroups=ALL Default=NO DefaultTime=NONE MaxNodes=UNLIMITED MaxTime=01:00:00 Nodes=n[1-2] "
    "State=UP TotalCPUs=8 TotalNodes=2\n"
    "PartitionName=main AllowGroups=ALL Default=YES DefaultTime=00:30:00 MaxNodes=3 MaxTime=2-00:00:00 Nodes=n[1-3],x "
    "State=UP TotalCPUs=16 TotalNodes=4\n"
)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands, which note how they were called and answer as they are told."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel", "salloc"):
        (folder / name).write_text(SBATCH.format(python=sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    class Tools:
        def answer(self, **answers):
            (folder / "answers.json").write_text(json.dumps(answers))

        @property
        def calls(self):
            file = folder / "calls.jsonl"
            return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    made = Tools()
    made.answer(scontrol=[0, PARTITIONS, ""], sbatch=[0, "17\n", ""])
    return made


def cluster(**fields):
    return SlurmCluster(kind="slurm", **fields)


def asked(nodes=2, min_nodes=None, **fields):
    return Request(nodes=nodes, min_nodes=min_nodes or nodes, time=1.0, **fields)


def run_of(folder, made, name="run", runs="runs"):
    config = run_config(folder / "data", folder / runs, run={"name": name})
    return create_run(new_spec(config, made, folder))


def check(folder, request, **fields):
    """Whether a run could be queued that is not there yet."""
    made = cluster(**fields)
    config = run_config(folder / "data", folder / "runs")
    SlurmBackend(made).check(SubmittedRun(RunFolder(config.run.path), new_spec(config, made, folder)), request)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[01-03,7],login", ["n01", "n02", "n03", "n7", "login"]),
        ("gpu[098-101]", ["gpu098", "gpu099", "gpu100", "gpu101"]),
        ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
        ("(null)", []),
        ("", []),
    ],
)
def test_a_list_of_nodes_is_read(text, names):
    assert expand_nodelist(text) == names


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("2-00:00:00", 172800), ("1-6", 108000), ("1-6:30", 109800),
        ("UNLIMITED", float("inf")), ("infinite", float("inf")), ("00:00:00", float("inf")), ("0", float("inf")),
        ("0-0", float("inf")), ("1-00:00:00", 86400), ("0:01", 1),
    ],
)  # fmt: skip
def test_a_time_limit_is_read(text, seconds):
    assert parse_time(text) == seconds


def test_no_time_limit_is_told():
    with pytest.raises(LaunchError, match="time = '2 days'"):
        parse_time("2 days")


def test_a_job_name_is_one_plain_word():
    assert safe_name("a\nb; $(id) é") == "a-b-id"
    assert safe_name("§") == "mikoshi"


def test_states_of_jobs_are_read_also_of_arrays_and_requeued_ones():
    listing = (
        "7|RUNNING|n[1-2]|None\n8_3|PENDING||Resources\n9|TIMEOUT|n3|TimeLimit\n10|COMPLETED|n3|None\n11|COMPLETING|n1|None\n"
        "12_1|PENDING||JobHeldUser\n13|PENDING||job requeued in held state\n14|PENDING||JobHeldAdmin\n"
    )
    assert job_states(listing) == {
        "7": JobState("running", "", ("n1", "n2")),
        "8_3": JobState("queued", "Resources"),
        "9": JobState("ended", "TIMEOUT", ("n3",)),
        "10": JobState("ended", "", ("n3",)),
        "11": JobState("running", "COMPLETING", ("n1",)),
        "12_1": JobState("queued", "JobHeldUser: held; let it go by `scontrol release 12_1`"),
        "13": JobState("queued", "job requeued in held state: held; let it go by `scontrol release 13`"),
        "14": JobState("queued", "JobHeldAdmin"),
    }


def test_a_job_is_asked_for_exactly(tools, tmp_path):
    made = cluster(
        partition="small", account="a1", qos="high", constraint="h100&ib", gpus_per_node=8, gpu_type="h100", time="1:00:00",
        memory="0", cpus_per_node=64, exclusive=True, exclude=["n9"], warning=90, options=["--mail-type=END"],
    )  # fmt: skip
    run = run_of(tmp_path, made, "a-run.1", "100% of all")
    attempt = run.add(asked(4, 2, exclude=["n7"]))
    assert SlurmBackend(made).submit(run, attempt) == {"id": "17"}
    (call,) = tools.calls
    folder = run.folder.path
    assert call == [
        "sbatch", "--parsable", "--export=NIL", "--requeue", "--open-mode=append", "--signal=B:USR2@90", "--job-name=a-run.1",
        f"--comment={run.spec.id}-1", f"--output={str(folder).replace('%', '%%')}/slurm-%j.out", f"--chdir={tmp_path}",
        "--nodes=2-4", "--partition=small", "--account=a1", "--qos=high", "--constraint=h100&ib", "--time=1:00:00", "--mem=0",
        "--cpus-per-task=64", "--exclude=n7,n9", "--gres=gpu:h100:8", "--no-kill", "--exclusive", "--mail-type=END",
        f"{folder}/slurm-batch.sh", sys.executable, "", str(tmp_path / "tools"), str(folder),
    ]  # fmt: skip
    assert (folder / "slurm-batch.sh").read_text() == SCRIPT


def test_a_preview_is_what_would_be_given_to_a_shell_and_holds_no_secret(tools, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "hunter2")
    made = cluster(secrets=["TOKEN"], env={"PLAIN": "hunter3"}, setup="module load cuda")
    run = run_of(tmp_path, made)
    text = SlurmBackend(made).preview(run, asked(2))
    words = shlex.split(text.split("\n\n")[0])
    assert words[0] == "sbatch" and "--nodes=2" in words and words[-1] == str(run.folder.path)
    assert SCRIPT in text and "module load cuda" in text and "hunter" not in text
    assert not tools.calls


def test_variables_and_secrets_go_by_a_file_that_the_owner_alone_reads(tools, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "a\nb'\"$(id);`id`")
    made = cluster(secrets=["TOKEN"], env={"ODD": "é %s ;"})
    run = run_of(tmp_path, made)
    SlurmBackend(made).submit(run, run.add(asked(1)))
    file = run.folder.path / PRIVATE
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_private(file) == {"TOKEN": "a\nb'\"$(id);`id`", "ODD": "é %s ;"}
    assert "$(id)" not in json.dumps(tools.calls)


def test_a_secret_that_is_not_set_is_named_and_nothing_is_submitted(tools, tmp_path, monkeypatch):
    monkeypatch.delenv("TOKEN", raising=False)
    made = cluster(secrets=["TOKEN"])
    run = run_of(tmp_path, made)
    with pytest.raises(LaunchError, match="secrets: TOKEN: not set"):
        SlurmBackend(made).submit(run, run.add(asked(1)))
    assert not tools.calls


@given(st.dictionaries(st.text("AB_", min_size=1), st.text(st.characters(exclude_characters="\0")), max_size=4))
@settings(max_examples=50, deadline=None)
def test_private_values_come_back_exactly(tmp_path_factory, values):
    file = tmp_path_factory.mktemp("private") / "private.json"
    write_private(file, values)
    assert read_private(file) == values
    assert [path.name for path in file.parent.iterdir()] == ["private.json"]


def test_bytes_that_are_no_text_come_back_too(tmp_path):
    value = os.fsdecode(b"\xff\xfe raw")
    write_private(tmp_path / "p", {"RAW": value})
    assert os.fsencode(read_private(tmp_path / "p")["RAW"]) == b"\xff\xfe raw"


def test_a_private_file_that_is_damaged_or_a_link_is_refused(tmp_path):
    (tmp_path / "p").write_text('{"A": 1}')
    with pytest.raises(LaunchError, match="damaged"):
        read_private(tmp_path / "p")
    (tmp_path / "q").symlink_to(tmp_path / "p")
    with pytest.raises(LaunchError, match="cannot be read"):
        read_private(tmp_path / "q")
    assert read_private(tmp_path / "none") == {}


def test_the_cluster_files_variables_win_over_secrets_of_the_same_name():
    made = LocalCluster(kind="local", env={"A": "file"}, secrets=["A", "B"])
    assert collect_env(made, {"A": "mine", "B": "b"}) == {"A": "file", "B": "b"}


@pytest.mark.parametrize(
    ("fields", "request_", "told"),
    [
        ({"partition": "large"}, asked(1), "partition = large: Slurm has no such partition, but small, main"),
        ({"partition": "small"}, asked(3), "partition small has 2 nodes"),
        ({"partition": "small", "exclude": ["n1"]}, asked(2), "partition small has 1 nodes"),
        ({}, asked(4), "partition main has 3 nodes"),
        ({"partition": "small"}, asked(2, bad=["n1"]), "ask for fewer; avoided are n1, which --include-node takes back"),
        ({"partition": "small", "time": "2:00:00"}, asked(1), "time = 2:00:00: partition small allows 01:00:00"),
        ({"time": "1", "warning": 60}, asked(1), "warning = 60: no less than the time limit, 60 s"),
        ({"time": "soon"}, asked(1), "time = 'soon'"),
        ({"image": "docker://x"}, asked(1), "image"),
    ],
)
@pytest.mark.usefixtures("tools")
def test_what_a_partition_could_never_run_is_refused_before_it_is_queued(tmp_path, fields, request_, told):
    with pytest.raises(LaunchError) as refused:
        check(tmp_path, request_, **fields)
    assert told in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.usefixtures("tools")
def test_what_it_can_run_is_let_pass(tmp_path):
    check(tmp_path, asked(3))
    check(tmp_path, asked(4, 2))
    check(tmp_path, asked(1), partition="small,main", time="1:00:00")


def test_a_refusal_is_told_in_slurms_words_and_nothing_is_left_queued(tools, tmp_path):
    complaint = (
        "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates accounting policy\n"
    )
    run = run_of(tmp_path, cluster())
    attempt = run.add(asked(1))
    mark = f"{run.spec.id}-1"
    tools.answer(sbatch=[1, "", complaint], squeue=[0, f"5|other\n6|{mark}\n", ""])
    with pytest.raises(LaunchError) as refused:
        SlurmBackend(cluster()).submit(run, attempt)
    assert str(refused.value).startswith("sbatch: AssocMaxSubmitJobLimit; Batch job submission failed: Job violates")
    assert "\n" not in str(refused.value)
    assert [call for call in tools.calls if call[0] == "scancel"] == [["scancel", "6"]]


def test_a_controller_that_does_not_answer_is_told_in_one_line(tools):
    tools.answer(squeue=[1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"])
    with pytest.raises(LaunchError, match=r"^slurm: the controller does not answer .*: try again later$"):
        SlurmBackend(cluster()).query([{"id": "1"}])


def test_where_nobody_can_tell_whether_a_job_is_queued_that_is_said(tools, tmp_path):
    tools.answer(sbatch=[1, "", "sbatch: error: Socket timed out on send/recv operation\n"],
                 squeue=[1, "", "slurm_load_jobs error: Unable to contact slurm controller\n"])  # fmt: skip
    run = run_of(tmp_path, cluster())
    told = rf"whether it was queued cannot be told: .* scancel what .* shows for {run.spec.id}-1$"
    with pytest.raises(LaunchError, match=told):
        SlurmBackend(cluster()).submit(run, run.add(asked(1)))


def test_a_machine_that_knows_no_cluster_is_told(tools):
    told = "squeue: error: fetch_config: DNS SRV lookup failed\nsqueue: fatal: Could not establish a configuration source\n"
    tools.answer(squeue=[1, "", told])
    with pytest.raises(LaunchError, match=r"^slurm: no cluster is known here .*: submit from a login node, or set SLURM_CONF$"):
        SlurmBackend(cluster()).query([{"id": "1"}])


def test_commands_that_are_not_there_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="scontrol: not found: submit from where Slurm's commands are"):
        check(tmp_path, asked(1))


def test_all_jobs_are_looked_at_with_one_question(tools):
    tools.answer(squeue=[0, "1|RUNNING|n1|None\n3_1|PENDING||Priority\n", ""])
    states = SlurmBackend(cluster()).query([{"id": "1"}, {}, {"id": "2"}, {"id": "3_1"}, {"id": "1; rm"}])
    assert [state.state for state in states] == ["running", "unknown", "ended", "queued", "unknown"]
    (call,) = tools.calls
    assert call[-1] == "--jobs=1,2,3_1"


@pytest.mark.parametrize(
    ("state", "now", "call"),
    [
        ("RUNNING", False, ["scancel", "--batch", "--signal=TERM", "5"]),
        ("RUNNING", True, ["scancel", "5"]),
        ("PENDING", False, ["scancel", "5"]),
        ("COMPLETING", False, ["scancel", "5"]),
        ("COMPLETED", False, None),
    ],
)
def test_a_job_that_runs_is_asked_and_one_that_waits_is_taken_back(tools, tmp_path, state, now, call):
    tools.answer(squeue=[0, f"5|{state}|n1|None\n", ""])
    attempt = run_of(tmp_path, cluster()).add(asked(1))
    attempt.write_job({"id": "5"})
    SlurmBackend(cluster()).cancel(attempt, now)
    assert [made for made in tools.calls if made[0] == "scancel"] == ([call] if call else [])


def test_a_sweep_is_one_array_and_a_list_of_its_runs(tools, tmp_path):
    runs = [run_of(tmp_path, cluster(), name) for name in ("a", "b", "c")]
    jobs = submit_array([(run, run.add(asked(2))) for run in runs], at_once=2)
    assert jobs == [{"id": "17_0"}, {"id": "17_1"}, {"id": "17_2"}]
    (call,) = tools.calls
    listed = array_folder(runs[0]) / "slurm-array.json"
    assert not any(listed.is_relative_to(run.folder.path) for run in runs), "each of them may be removed"
    assert "--array=0-2%2" in call and call[-2:] == ["--list", str(listed)]
    assert json.loads(listed.read_text()) == [str(run.folder.path) for run in runs]


def test_what_the_caller_has_set_for_slurm_changes_nothing(monkeypatch):
    monkeypatch.setenv("SLURM_LABELIO", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    monkeypatch.setenv("SLURM_CONF", "/x")
    found = {name: value for name, value in clean_environment().items() if name.startswith("SLURM_")}
    assert found == {"SLURM_CONF": "/x"}


def test_a_step_has_all_that_the_job_has_of_a_node(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    made = cluster(gpus_per_node=4, gpu_request="gpus-per-node")
    run = run_of(tmp_path, made)
    site = SlurmSite(made, run, run.add(asked(2)))
    assert site.nodes() == ["n1", "n2"]
    command = site.command("n2")
    assert command[:2] == ["srun", "--jobid=12"] and "--nodelist=n2" in command and "--gpus-per-node=4" in command
    assert command[-4:] == [sys.executable, "-P", "-m", "mikoshi.launch.agent.node"]


def test_the_head_is_not_led_outside_of_a_job(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run = run_of(tmp_path, cluster())
    with pytest.raises(LaunchError, match="not inside a Slurm job"):
        SlurmSite(cluster(), run, run.add(asked(2)))


def ended(run, started, **fields):
    attempt = run.add(asked(2))
    attempt.write(Started(host="n1", pid=1, began=1.0, nodes=["n1", "n2"], ranks_per_node=1, time=started))
    result = Result(**{"state": "stopped", "code": 75, "why": "a signal", "time": started + 10, **fields})
    attempt.write(result)
    return attempt, result


JOB = (
    "JobId=12 JobState={state} Reason=None Restarts={restarts} EndTime=2999-01-01T00:00:00 PreemptTime={preempted} "
    "ExcNodeList=n9\n"
)


@pytest.mark.parametrize(
    ("state", "preempted", "fields", "called"),
    [
        ("RUNNING", "2026-11-22T16:50:32", {}, [["requeue", "12"]]),
        ("RUNNING", "None", {}, []),  # someone's signal, long before the limit
        ("CANCELLED", "2026-11-22T16:50:32", {}, []),
        ("COMPLETING", "None", {}, []),
        ("RUNNING", "None", {"state": "failed", "code": 1}, []),
        ("RUNNING", "None", {"state": "done", "code": 0}, []),
        ("RUNNING", "None", {"state": "cancelled"}, []),
        (
            "RUNNING", "None", {"state": "failed", "code": 1, "bad_nodes": ["n2"]},
            [["requeue", "12"], ["update", "JobId=12", "ExcNodeList=n2,n9"]],
        ),
    ],
)  # fmt: skip
def test_a_job_is_queued_again_for_slurms_reasons_alone(tools, tmp_path, monkeypatch, state, preempted, fields, called):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    run = run_of(tmp_path, cluster())
    attempt, result = ended(run, 100.0, **fields)
    both = JOB.format(state=state, restarts=0, preempted=preempted) if state else ""
    tools.answer(scontrol=[0, both + PARTITIONS, ""])
    # The stand-in answers every question with the job first: fields() takes the first of a name.
    after = SlurmSite(cluster(), run, attempt).after(run, attempt, result)
    assert [call[1:] for call in tools.calls if "show" not in call] == called
    assert after.next == ("requeued" if called else "")
    if called:
        assert attempt.result == after


@pytest.mark.parametrize(
    ("nodes", "fields", "excluded", "told"),
    [
        (3, {}, "ExcNodeList=n1", "queued again with n2, n9: too few nodes without"),  # without n1 still, as asked
        (2, {}, "ExcNodeList=n1,n2,n9", ""),
        (3, {"exclude": ["n3"]}, "", "not queued again: --nodes 3: partition main has 2 nodes"),
    ],
)
def test_a_bad_node_is_taken_all_the_same_where_there_are_too_few_without(
    tools, tmp_path, monkeypatch, nodes, fields, excluded, told
):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    made = cluster(**fields)
    run = run_of(tmp_path, made)
    run.add(asked(nodes, exclude=["n1"]))
    attempt = run.add(asked(nodes, exclude=["n1"], bad=["n9"], cause="requeue"))
    result = Result(state="failed", code=1, why="n2 was lost", time=1.0, bad_nodes=["n2"])
    partition = PARTITIONS.replace("MaxNodes=3", "MaxNodes=UNLIMITED").replace("n[1-3],x", "n[1-3],n9,x")
    partition = partition.replace("TotalNodes=4", "TotalNodes=5" if nodes == 2 else "TotalNodes=4")
    tools.answer(scontrol=[0, JOB.format(state="RUNNING", restarts=0, preempted="None") + partition, ""])
    after = SlurmSite(made, run, attempt).after(run, attempt, result)
    called = [call[1:] for call in tools.calls if "show" not in call]
    assert called == ([["requeue", "12"], ["update", "JobId=12", excluded]] if excluded else [])
    assert after.next == ("requeued" if excluded else "") and told in after.why and after.why.startswith("n2 was lost")


def test_a_task_of_an_array_is_called_by_its_own_name(tools, tmp_path, monkeypatch):
    for name, value in {"JOB_ID": "12", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "1", "JOB_NODELIST": "n1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    run = run_of(tmp_path, cluster())
    attempt, result = ended(run, 100.0, state="failed", code=1, bad_nodes=["n2"])
    tools.answer(scontrol=[0, JOB.format(state="RUNNING", restarts=0, preempted="None") + PARTITIONS, ""])
    site = SlurmSite(cluster(), run, attempt)
    site.after(run, attempt, result)
    is_requested = [call[1:] for call in tools.calls if "partition" not in call]
    assert is_requested == [
        ["--oneliner", "show", "job", "12_1"], ["requeue", "12_1"], ["update", "JobId=12_1", "ExcNodeList=n2,n9"],
    ]  # fmt: skip
    assert "--jobid=12" in site.command("n1")


def test_a_job_that_may_lose_nodes_is_watched_from_them(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    run = run_of(tmp_path, cluster())
    attempt = run.add(asked(3, 2))
    assert SlurmSite(cluster(), run, attempt).command("n2")[-3:] == ["-P", "-m", "mikoshi.launch.backends.slurm.step"]
    assert SlurmSite(cluster(), run, attempt, "13", "n2").command("n2")[-3:] == ["-P", "-m", "mikoshi.launch.agent.node"]


@pytest.mark.parametrize("end", ["refused", "interrupted", "done"])
def test_nodes_to_look_at_are_given_back_whatever_happens(tools, tmp_path, end):
    made = cluster(time="2-00:00:00", options=["--mail-type=END"])
    run = run_of(tmp_path, made, "doctor")
    mark = f"mikoshi doctor {run.spec.id}"
    queue = [1, "", "squeue: error: Invalid job id specified\n"] if end == "refused" else [0, f"5|other\n6|{mark}\n", ""]
    tools.answer(scontrol=[0, PARTITIONS, ""], salloc=[0, "", "salloc: Granted job allocation 6\n"], squeue=queue)
    with contextlib.ExitStack() as stack:
        if end != "done":
            stack.enter_context(pytest.raises(LaunchError if end == "refused" else SystemExit))
        with allocation(made, run, asked(2)) as (job, _):
            assert job == "6" and end != "refused"
            if end == "interrupted":
                signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    salloc = next(call for call in tools.calls if call[0] == "salloc")
    assert salloc[-1] == "--time=15" and f"--comment={mark}" in salloc
    assert not any(word.startswith(("--signal", "--export", "--requeue", "--output")) for word in salloc)
    if end != "refused":
        assert tools.calls[-1] == ["scancel", "6"]


def test_a_job_that_slurm_has_queued_again_itself_is_left_alone(tools, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run = run_of(tmp_path, cluster())
    attempt, result = ended(run, 100.0)
    tools.answer(scontrol=[0, JOB.format(state="COMPLETING", restarts=2, preempted="None"), ""])
    assert SlurmSite(cluster(), run, attempt).after(run, attempt, result).next == "requeued"


def test_a_run_that_gets_nowhere_is_not_queued_for_ever(tools, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    made = cluster(requeues=2)
    run = run_of(tmp_path, made)
    for number in range(2):
        ended(run, 100.0 + number)
    attempt, result = ended(run, 103.0)
    assert attempts_without_checkpoint(run) == 3
    tools.answer(scontrol=[0, JOB.format(state="RUNNING", restarts=0, preempted="2026-11-22T16:50:32") + PARTITIONS, ""])
    after = SlurmSite(made, run, attempt).after(run, attempt, result)
    assert after.next == "" and "3 attempts in a row without a checkpoint (requeues)" in after.why
    run.folder.event("save", step=4)  # now, so in the newest attempt
    assert attempts_without_checkpoint(run) == 0
    assert SlurmSite(made, run, attempt).after(run, attempt, result).next == "requeued"


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_the_batch_script_passes_on_its_arguments_exactly_and_runs_none_of_them(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("script")
    echo = folder / "echo it"
    echo.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    echo.chmod(0o755)
    setup = folder / "set up"
    setup.write_text("[ $# = 0 ] || exit 9\nmikoshi_setup=; shift 0\n")
    for file in ("", str(setup)):
        done = subprocess.run(["bash", "-c", SCRIPT, "script", str(echo), file, "", *words], capture_output=True, cwd=folder)
        assert json.loads(done.stdout) == ["-P", "-m", "mikoshi.launch.controller.head", *words], done.stderr
    assert {path.name for path in folder.iterdir()} == {"echo it", "set up"}


def test_a_setup_that_fails_ends_the_job_with_its_own_words(tmp_path):
    setup = tmp_path / "setup"
    setup.write_text("echo no such module >&2; false")
    done = subprocess.run(["bash", "-c", SCRIPT, "script", "/bin/echo", str(setup), "", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == ["no such module", "error: setup: ended with exit code 1"]


def test_slurms_commands_are_found_also_where_no_environment_comes_along(tmp_path):
    show = tmp_path / "show"
    show.write_text("#!/bin/sh\n/usr/bin/env\n")
    show.chmod(0o755)
    setup = tmp_path / "setup"
    setup.write_text("PATH=/opt/mine:$PATH\n")
    for before, lines, path in [
        ([], "", "PATH=.*[^.]:/opt/slurm 23/bin"),
        (["PATH=/usr/bin:/bin"], "", "PATH=/usr/bin:/bin:/opt/slurm 23/bin"),
        (["PATH=/usr/bin:/bin"], str(setup), "PATH=/opt/mine:.*:/opt/slurm 23/bin"),
    ]:
        argv = ["/usr/bin/env", "-i", *before, "/bin/bash", "-c", SCRIPT, "script", str(show), lines, "/opt/slurm 23/bin", "x"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert [line for line in done.stdout.splitlines() if re.fullmatch(path, line)], done.stdout
    argv = ["/usr/bin/env", "-i", "PATH=/bin", "/bin/bash", "-c", SCRIPT, "script", str(show), "", "", "x"]
    assert "PATH=/bin" in subprocess.run(argv, capture_output=True, text=True).stdout.splitlines()
