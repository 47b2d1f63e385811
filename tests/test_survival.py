"""A run that is killed, signalled, or robbed of a process or its disk loses nothing, and ends where
it would have ended."""
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from conftest import (REAL, SMALL, gone, here, one_line, read_checkpoint, read_log,
                      same_ending, untimed)

import lincls
import pretrain


@pytest.fixture(scope="module")
def flags(few):
    """22 steps, 11 of them with prototypes."""
    return [*few, "--epochs", 2, "--knn-every", 0, "--save-every", 5, "--resume", "auto"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The output of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    here(pretrain.main, *flags, "--output", output)
    return output


def ended_the_same(output, reference):
    same_ending(output, reference)
    assert untimed(read_log(output)) == untimed(read_log(reference))
    assert not list(output.glob("*.new"))


# ---------------------------------------------------------------------------------- stops and kills

SLOW = """
def enqueue(*args, real=builder.MoCo.enqueue):
    time.sleep(0.1)
    real(*args)
builder.MoCo.enqueue = enqueue"""  # steps that a signal can be sent in


def test_processes_resumed_within_an_epoch_end_bit_for_bit_as_without(flags, tmp_path, start):
    """With three, gloo's sums depend on their order."""
    flags = [*flags, "--arch", REAL, "--nproc", 3, "--batch-size", 30, "--save-every", 3,
             "--print-every", 1, "--epochs", 1, "--warmup-epochs", 0]
    command = ["env", "-u", "OMP_NUM_THREADS", sys.executable]  # as users do
    run = start(tmp_path / "whole", flags, command=command)
    run.steps(4)
    resumed = shutil.copytree(run.output, tmp_path / "resumed")
    again = start(resumed, flags, command=command)
    assert run.end()[0] == again.end()[0] == 0, run.text() + again.text()
    assert "step 3/11" not in again.text() and "step 4/11" in again.text()
    ended_the_same(resumed, run.output)


@pytest.mark.parametrize("module, name, call", [
    ("builder.MoCo", "enqueue", 4), ("pretrain", "kmeans", 2), ("os", "replace", 6)])
def test_a_run_killed_at_any_moment_ends_bit_for_bit_as_without(module, name, call, whole, flags,
                                                                tmp_path, start):
    """Before its first save, in the E-step, and between writing a checkpoint and naming it."""
    run = start(tmp_path / "run", flags, patch=f"""
def killed(*args, real={module}.{name}, calls=[]):
    calls.append(args)
    if len(calls) == {call}: os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
{module}.{name} = killed""")
    assert run.end()[0] == -signal.SIGKILL, run.text()
    here(pretrain.main, *flags, "--output", run.output)
    ended_the_same(run.output, whole)


def test_processes_do_not_outlive_a_killed_parent_where_sigint_is_ignored(flags, tmp_path, start):
    patch = SLOW + "\nsignal.signal(signal.SIGINT, signal.SIG_IGN)"  # as by a script's `&`
    run = start(tmp_path / "run", [*flags, "--nproc", 2], patch=patch)
    run.steps(3)
    everyone = run.family()
    os.kill(run.pid, signal.SIGKILL)
    gone(everyone, 5)
    assert read_checkpoint(tmp_path / "run")["epoch"] == 0


@pytest.mark.parametrize("more", [[], ["--finetune"]])
def test_a_probe_that_is_stopped_ends_bit_for_bit_as_without(more, whole, tmp_path, start):
    flags = ["--pretrained", whole / "checkpoint.pth", "--device", "cpu", "--epochs", 3,
             "--batch-size", 32, "--print-every", 1, *more]
    outputs = [tmp_path / name for name in ("run", "once")]
    slow = "def slow(*args, real=pretrain.exchange): time.sleep(0.1); return real(*args)"
    run = start(outputs[0], flags, script="lincls.py", patch=slow + "\npretrain.exchange = slow")
    run.steps(3)
    os.kill(run.pid, signal.SIGTERM)
    assert run.end()[0] == 143, run.text()
    for output in outputs:
        here(lincls.main, *flags, "--output", output, "--resume", "auto")
    ended_the_same(*outputs)


# ------------------------------------------------------ signals, and errors of a process of several


@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
@pytest.mark.parametrize("nproc, to", [
    (1, slice(1)), (2, slice(1)), (2, slice(2, 3)), (2, slice(3))],
    ids=["one process", "the parent", "a child", "all"])
def test_a_signal_ends_a_run_after_a_step_that_is_saved(number, status, nproc, to, flags, tmp_path,
                                                        start):
    run = start(tmp_path / "run", [*flags, "--nproc", nproc], patch=SLOW)
    run.steps(3)
    everyone = run.family()
    for pid in everyone[to]:
        os.kill(pid, number)
    code, said = run.end(20)
    step = read_checkpoint(tmp_path / "run")["step"]
    assert code == status and f"stopped by {number.name} after step {step}, and saved" in said, said
    assert "Traceback" not in said, said
    gone(everyone)


def waiting(name, seconds=2):
    """Python that makes a function of pretrain wait for a signal."""
    return f"""
def wait(*args, real=pretrain.{name}):
    open(sys.argv[-1] + "/waiting", "w").close()
    for _ in range({10 * seconds}): time.sleep(0.1)
    return real(*args)
pretrain.{name} = wait"""


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_at_once(number, nproc, flags, tmp_path, start):
    run = start(tmp_path / "run", [*flags, "--nproc", nproc], patch=waiting("pauc", 60))
    run.until((tmp_path / "run" / "waiting").exists)
    everyone = run.family()
    os.kill(run.pid, number)
    time.sleep(0.8)
    assert run.process.exitcode is None  # it waits for the end of the step
    os.kill(run.pid, number)
    assert run.end(5)[0] == -number
    gone(everyone, 5)


def test_ctrl_c_before_training_ends_all_processes_with_its_status(flags, tmp_path, start):
    run = start(tmp_path / "run", [*flags, "--nproc", 2], patch=waiting("settle", 60))
    run.until((tmp_path / "run" / "waiting").exists)
    os.kill(run.pid, signal.SIGINT)
    status, said = run.end(20)
    assert status == 130 and "Traceback" not in said, said


def test_sighup_that_nohup_has_ignored_stays_ignored(flags, tmp_path, start):
    patch = SLOW + "\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)"
    run = start(tmp_path / "run", flags, patch=patch)
    run.steps(3)
    os.kill(run.pid, signal.SIGHUP)
    assert run.end()[0] == 0 and read_checkpoint(tmp_path / "run")["epoch"] == 2


@pytest.mark.parametrize("name, more, status, place", [
    ("kmeans", [], 143, (1, 1)), ("monitor", ["--knn-every", 2], 0, (2, 0))])
def test_a_signal_between_steps_waits_for_the_next_if_there_is_one(name, more, status, place, flags,
                                                                  tmp_path, start):
    output = tmp_path / "run"
    run = start(output, [*flags, *more], patch=waiting(name))
    run.until((output / "waiting").exists)
    os.kill(run.pid, signal.SIGTERM)
    assert run.end(20)[0] == status, run.text()
    checkpoint = read_checkpoint(output)
    assert (checkpoint["epoch"], checkpoint["step"]) == place


@pytest.mark.parametrize("act, status, end", [
    ("1 / 0", 1, "\nZeroDivisionError: division by zero"),
    ("raise pretrain.UsageError('a mistake')", 2, "\npretrain.py: error: a mistake"),
    ("os.kill(os.getpid(), signal.SIGKILL)", 1, ": process 1 terminated with signal SIGKILL")],
    ids=["a bug", "a mistake", "killed"])
def test_what_one_process_ends_of_ends_the_job_and_is_said_once(act, status, end, flags, tmp_path,
                                                                start):
    run = start(tmp_path / "run", [*flags, "--nproc", 2], patch=f"""
def settle(*_):
    open(sys.argv[-1] + "/" + os.environ["LOCAL_RANK"], "w").close()
    time.sleep(1)
    if os.environ["LOCAL_RANK"] == "1": {act}
    time.sleep(60)
pretrain.settle = settle""")
    run.until(lambda: {"0", "1"} <= {path.name for path in run.output.glob("*")})
    everyone = run.family()
    code, said = run.end(30)
    assert code == status and said.rstrip().endswith(end) and said.count(end) == 1, said
    assert ("Traceback" in said) == (status == 1), said
    gone(everyone)


@pytest.mark.parametrize("to, number, status, words", [
    (slice(-1, None), signal.SIGKILL, 1, "DataLoader worker"),
    (slice(None), signal.SIGTERM, 143, "stopped by SIGTERM")], ids=["killed", "signalled"])
def test_data_workers_end_the_run_where_they_are_killed_alone(to, number, status, words,
                                                              image_folder, tmp_path, start):
    run = start(tmp_path / "run", [
        image_folder, *SMALL, "--crop-size", 32, "--batch-size", 3, "--epochs", 9, "--workers", 1,
        "--num-clusters", 0, "--knn-every", 0, "--print-every", 1], patch=SLOW)
    run.steps(3)
    everyone, shared_memory = run.family(), {*Path("/dev/shm").glob("torch*")}
    for pid in everyone[to][::-1]:
        os.kill(pid, number)
    code, said = run.end(30)
    assert code == status and words in said and ("rror" in said) == (status == 1), said
    gone(everyone)
    assert {*Path("/dev/shm").glob("torch*")} <= shared_memory


# ------------------------------------------------------------ folders and disks, torchrun and SLURM


def test_a_second_run_in_one_folder_is_refused_and_a_kill_frees_the_folder(flags, tmp_path, start,
                                                                           refused):
    output = tmp_path / "run"
    first = start(output, flags, patch=waiting("kmeans", 60))
    first.until((output / "waiting").exists)
    refused(pretrain.main, flags, "another run is writing there", output=output)
    assert first.process.exitcode is None
    os.kill(first.pid, signal.SIGKILL)
    first.end()
    here(pretrain.main, *flags, "--output", output)


def test_a_used_output_folder_is_refused_and_left_as_it_is(whole, flags, refused):
    words = f"--output {whole}", "--resume auto", "another --output"
    refused(pretrain.main, flags[:-2], *words, output=whole)


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(whole, flags, tmp_path, start):
    run = start(tmp_path / "run", flags, patch="""
import resource
def save(*args, real=pretrain.save, calls=[]):
    calls.append(args)
    if len(calls) == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)
    real(*args)
pretrain.save = save""")
    status, said = run.end()
    assert status == 2, said
    one_line(said.splitlines()[-1], "checkpoint.pth: cannot be written", "bytes", "as it was")
    assert read_checkpoint(run.output)["step"] == 5 and not list(run.output.glob("*.new"))
    here(pretrain.main, *flags, "--output", run.output)
    ended_the_same(run.output, whole)


def test_torchrun_starts_a_killed_process_anew_and_the_run_goes_on(flags, tmp_path, start,
                                                                   monkeypatch):
    # Else torchrun's store outlives the processes, with the addresses of those that have died.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    command = ["torchrun", "--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 1,
               "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}",
               "--local-addr", "localhost"]
    agents = [start(tmp_path / "run", [*flags, "--arch", REAL], command=command) for _ in "ab"]
    agents[0].steps(8)
    os.kill(agents[1].family()[-1], signal.SIGKILL)
    for agent in agents:
        assert agent.end(200)[0] == 0, agent.text()
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert log.count('"flags"') == 2 and read_checkpoint(tmp_path / "run")["epoch"] == 2


SBATCH = """
trap 'kill -USR1 $run' USR1
srun python pretrain.py IMAGENET --save-every 500 --resume auto &
run=$!
wait $run; wait $run
status=$?
[ $status -eq 138 ] && scontrol requeue $SLURM_JOB_ID
exit $status
"""  # as the README gives it
SIGNALLED = 'trap "sleep 1; exit {}" USR1; echo ready; while :; do sleep 0.1; done'


@pytest.mark.parametrize("python, status, requeued", [
    (SIGNALLED.format(138), 138, True), (SIGNALLED.format(0), 0, False), ("exit 0", 0, False),
    ("exit 1", 1, False)], ids=["unfinished", "signalled as it ends", "finished", "failed"])
def test_the_batch_script_requeues_an_unfinished_run_alone(python, status, requeued, tmp_path,
                                                           start, monkeypatch):
    stubs = dict(srun='exec "$@"', scontrol=f'echo "$@" >> {tmp_path}/requeued', python=python)
    for name, line in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o700)
    (tmp_path / "job.sh").write_text(SBATCH)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    job = start(tmp_path / "run", [], command=["bash", tmp_path / "job.sh"])
    if "USR1" in python:
        job.until(lambda: "ready" in job.text())
        os.kill(job.pid, signal.SIGUSR1)
    assert job.end(20)[0] == status, job.text()
    asked = tmp_path / "requeued"
    assert (asked.read_text() if asked.exists() else "") == "requeue 17\n" * requeued
