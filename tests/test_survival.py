"""A run that is killed, signalled, or robbed of a process or its disk loses nothing, and ends where
it would have ended."""
import functools
import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
from conftest import (REAL, SMALL, Running, gone, here, read_checkpoint, read_log, same_ending,
                      untimed)

import lincls
import pretrain


@pytest.fixture(scope="module")
def flags(few):
    """22 steps, 11 of them with prototypes."""
    return [*few, "--epochs", 2, "--knn-every", 0, "--save-every", 5, "--resume", "auto"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """whole(nproc): the output of an uninterrupted run of so many processes, and its flags."""
    @functools.cache
    def make(nproc, arch="tiny"):
        output, own = tmp_path_factory.mktemp("whole") / "run", [*flags, "--arch", arch]
        finish(output, *own, "--nproc", nproc)
        return output, [*own, "--nproc", nproc]
    return make


def finish(output, *flags):
    """Run pre-training to its end, here where it is one process: what it says."""
    if flags[flags.index("--nproc") + 1] == 1:
        return here(pretrain.main, *flags, "--output", output)
    run = Running(output, flags)
    try:
        status, said = run.end()
    finally:
        run.kill()
    assert status == 0, said
    return said


def goes_on_to_the_same_end(output, reference, flags):
    said = finish(output, *flags)
    ended_the_same(output, reference)
    return said


def ended_the_same(output, reference):
    same_ending(output, reference)
    assert untimed(read_log(output)) == untimed(read_log(reference))
    assert (output / "log.jsonl").read_text().startswith('{"flags": ')
    assert not list(output.glob("*.new"))


# -------------------------------------------------------------------------------------------- kills

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
COUNT = """
count, enqueue = [], builder.MoCo.enqueue
def counted(model, k, index):
    enqueue(model, k, index)
    count.append(k)
builder.MoCo.enqueue = counted
"""
PHASES = {
    "a step before the first checkpoint": COUNT + f"""
def forward(self, *args, real=builder.MoCo.forward):
    if len(count) == 4: {KILL}
    return real(self, *args)
builder.MoCo.forward = forward""",
    "a step": COUNT + f"""
def forward(self, *args, real=builder.MoCo.forward):
    if len(count) == 18: {KILL}
    return real(self, *args)
builder.MoCo.forward = forward""",
    "the E-step": COUNT + f"""
def kmeans(v, size, *args, real=pretrain.kmeans):
    if size == 40: {KILL}
    return real(v, size, *args)
pretrain.kmeans = kmeans""",
    "writing a checkpoint": COUNT + f"""
def fsync(file, real=os.fsync):
    if len(count) == 15: {KILL}
    return real(file)
os.fsync = fsync""",
    "renaming a checkpoint": COUNT + f"""
def replace(a, b, real=os.replace):
    real(a, b)
    if len(count) == 15 and str(b).endswith(".prev.pth"): {KILL}
os.replace = replace""",
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_in_a_phase_ends_the_same(phase, whole, tmp_path, start):
    run = start(tmp_path / "run", whole(1)[1], patch=PHASES[phase])
    assert run.end()[0] == -signal.SIGKILL, run.text()
    goes_on_to_the_same_end(tmp_path / "run", *whole(1))


def test_a_killed_process_ends_the_job_and_is_named(whole, tmp_path, start):
    run = start(tmp_path / "run", whole(2)[1], patch=SLOW)
    run.steps(3)
    everyone = run.descendants()
    os.kill(everyone[1], signal.SIGKILL)
    code, said = run.end()
    assert code == 1 and "error: process 1 was ended by SIGKILL" in said, said
    assert "Traceback" not in said, said
    gone(everyone)
    goes_on_to_the_same_end(tmp_path / "run", *whole(2))


def test_processes_do_not_outlive_a_killed_parent(whole, tmp_path, start):
    run = start(tmp_path / "run", whole(2)[1], patch=SLOW)
    run.steps(3)
    everyone = run.descendants()
    run.signal(signal.SIGKILL)
    gone(everyone)
    run.end()
    goes_on_to_the_same_end(tmp_path / "run", *whole(2))


# ------------------------------------------------------------------------------------------ signals

SLOW = """
def enqueue(*args, real=builder.MoCo.enqueue):
    time.sleep(0.1)
    real(*args)
builder.MoCo.enqueue = enqueue"""  # steps that a signal can be sent in


@pytest.mark.parametrize("number, status, nproc, command", [
    (signal.SIGTERM, 143, 1, None), (signal.SIGINT, 130, 1, None), (signal.SIGUSR1, 0, 1, None),
    (signal.SIGHUP, 129, 1, None), (signal.SIGINT, 130, 2, [sys.executable])])
def test_a_signal_saves_after_the_step_and_ends_with_its_status(number, status, nproc, command,
                                                                whole, tmp_path, start):
    reference, flags = whole(nproc, REAL) if command else whole(nproc)  # not forked: as users do
    run = start(tmp_path / "run", flags, command=command, patch=SLOW)
    run.steps(3)
    everyone = [run.pid, *run.descendants()]
    run.signal(number)
    begun = time.time()
    code, said = run.end()
    assert code == status and time.time() - begun < 20, said
    assert f"stopped by {signal.Signals(number).name} after step" in said, said
    assert "Traceback" not in said
    gone(everyone)
    goes_on_to_the_same_end(tmp_path / "run", reference, flags)


def test_nohup_keeps_a_run_from_ending_by_sighup(whole, tmp_path, start):
    patch = SLOW + "\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)"  # as nohup leaves it
    run = start(tmp_path / "run", whole(1)[1], patch=patch)
    run.steps(3)
    run.signal(signal.SIGHUP)
    assert run.end()[0] == 0
    ended_the_same(tmp_path / "run", whole(1)[0])


def test_a_signal_to_one_process_ends_all_of_them_after_the_same_step(whole, tmp_path, start):
    run = start(tmp_path / "run", whole(2)[1], patch=SLOW)
    run.steps(3)
    os.kill(run.descendants()[1], signal.SIGTERM)
    code, said = run.end()
    assert code == 143 and said.count("stopped by SIGTERM") == 1 and "Traceback" not in said, said
    goes_on_to_the_same_end(tmp_path / "run", *whole(2))


def listens(port):
    sockets = [line.split() for kind in ("tcp", "tcp6")
               for line in Path(f"/proc/net/{kind}").read_text().splitlines()]
    return any(fields[1].endswith(f":{port:04X}") and fields[3] == "0A" for fields in sockets)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_signal_ends_a_node_that_waits_for_the_others(nproc, number, status, tmp_path, start,
                                                        free_port):
    url = f"tcp://localhost:{free_port}"
    run = start(tmp_path / "run", [*SMALL, "--nproc", nproc, "--world-size", 2, "--dist-url", url])
    run.until(lambda: listens(free_port))
    run.signal(number)
    code, said = run.end(20)
    assert code == status and "Traceback" not in said, said


@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0), (signal.SIGHUP, 129)])
def test_a_signal_in_the_e_step_ends_at_once_without_a_new_checkpoint(number, status, whole,
                                                                      tmp_path, start):
    slow = """
def kmeans(*args):
    open(args[-1].output / "clustering", "w").close()
    time.sleep(60)
pretrain.kmeans = kmeans"""
    output = shutil.copytree(whole(1)[0], tmp_path / "run")
    run = start(output, [*whole(1)[1], "--epochs", 3], patch=slow)  # it begins with its third
    run.until((output / "clustering").exists)
    before = (output / "checkpoint.pth").stat().st_mtime_ns
    run.signal(number)
    code, said = run.end(20)
    assert code == status and "from the last checkpoint" in said and "Traceback" not in said, said
    assert (output / "checkpoint.pth").stat().st_mtime_ns == before


def test_a_signal_in_the_monitor_loses_nothing_of_the_epoch(whole, tmp_path, start):
    slow = """
def knn(*args, calls=[]):
    calls.append(args)
    if len(calls) == 2:  # the first is before training
        open(args[-1].output / "monitoring", "w").close()
        time.sleep(60)
    return 50.0
pretrain.knn = knn"""
    output, (reference, flags) = tmp_path / "run", whole(1)
    run = start(output, [*flags, "--save-every", 0, "--knn-every", 1], patch=slow)
    run.until((output / "monitoring").exists)
    run.signal(signal.SIGTERM)
    assert run.end(20)[0] == 143
    checkpoint = read_checkpoint(output)
    assert (checkpoint["epoch"], checkpoint["step"]) == (0, 11)
    finish(output, *flags)
    same_ending(output, reference)


def test_a_second_sigint_stops_at_once(whole, tmp_path, start):
    slow = """
def enqueue(model, k, index):
    open(sys.argv[-1] + "/stepping", "w").close()
    for _ in range(600): time.sleep(0.1)
builder.MoCo.enqueue = enqueue"""
    run = start(tmp_path / "run", whole(1)[1], patch=slow)
    run.until((tmp_path / "run" / "stepping").exists)
    run.signal(signal.SIGINT)
    time.sleep(1)
    assert run.status() is None  # it waits for the end of the step
    run.signal(signal.SIGINT)
    assert run.end(10)[0] == -signal.SIGINT


# --------------------------------------------------------------------------- two runs in one folder

PAUSE = """
enqueue, count = builder.MoCo.enqueue, []
def paused(model, k, index):
    enqueue(model, k, index)
    count.append(k)
    while len(count) == 8: time.sleep(0.1)
builder.MoCo.enqueue = paused"""


def test_a_second_run_in_one_folder_ends_at_once_and_a_kill_frees_the_folder(whole, tmp_path,
                                                                             start, call):
    output, (reference, flags) = tmp_path / "run", whole(1)
    first = start(output, flags, patch=PAUSE)
    first.until((output / "checkpoint.pth").exists)  # after step 5
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    for resume in ([], ["--resume", "auto"]):
        status, _, errors = call(pretrain.main, *flags[:-4], *resume, "--output", output)
        assert status == 2 and "another run is writing there" in errors, errors
        assert len(errors.splitlines()) == 1, errors
    assert first.status() is None
    after = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert after.keys() == before.keys()
    first.signal(signal.SIGKILL)
    first.end()
    goes_on_to_the_same_end(output, reference, flags)


def test_a_file_system_without_locks_is_said_and_the_run_goes_on(tmp_path, group, capsys,
                                                                 monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(pretrain.fcntl, "lockf", no_locks)
    pretrain.lock(tmp_path / "run")
    assert "has no locks" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- data workers


@pytest.fixture
def files_run(image_folder, tmp_path, start):
    """A run on image files with a data worker."""
    run = start(tmp_path / "run", [
        image_folder, *SMALL, "--crop-size", 32, "--batch-size", 20, "--epochs", 500, "--workers",
        1, "--num-clusters", 0, "--knn-every", 0, "--print-every", 1])
    run.steps(3)
    return run, run.descendants()


def test_a_killed_data_worker_ends_the_run_with_one_line(files_run):
    run, workers = files_run
    os.kill(workers[-1], signal.SIGKILL)
    code, said = run.end()
    assert code == 1 and "error: DataLoader worker" in said.splitlines()[-1], said
    assert "Traceback" not in said, said
    gone(workers)


def test_a_signal_to_all_does_not_kill_the_data_workers_before_the_step_is_saved(files_run):
    run, workers = files_run
    shared_memory = set(os.listdir("/dev/shm"))
    for pid in (*workers, run.pid):
        os.kill(pid, signal.SIGTERM)
    code, said = run.end(30)
    assert code == 143 and "stopped by SIGTERM" in said and "error" not in said, said
    gone(workers)
    assert set(os.listdir("/dev/shm")) <= shared_memory


# ------------------------------------------------------------------------------ torchrun and SLURM


def test_torchrun_restarts_a_killed_process_and_the_run_goes_on_by_itself(whole, tmp_path, start):
    reference, (*flags, _, _) = whole(2, REAL)
    run = start(tmp_path / "run", flags, torchrun=[
        "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"])
    run.steps(14)
    os.kill(run.descendants()[0], signal.SIGKILL)
    code, said = run.end(200)
    assert code == 0, said
    ended_the_same(tmp_path / "run", reference)


def test_torchrun_that_handles_sigusr1_hands_it_on_and_the_run_is_saved(whole, tmp_path, start):
    reference, flags = whole(1, REAL)
    run = start(tmp_path / "run", flags[:-2], torchrun=[
        "--standalone", "--nproc-per-node", "1", "--signals-to-handle",
        "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"])
    run.steps(3)
    everyone = run.descendants()
    run.signal(signal.SIGUSR1)
    _, said = run.end()
    assert "stopped by SIGUSR1 after step" in said, said
    gone(everyone)
    goes_on_to_the_same_end(tmp_path / "run", reference, flags)


# As the README gives it.
SBATCH = """#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append

# Five minutes before the time limit: save, and go back into the queue, to go on from there.
trap 'kill -USR1 $run; wait $run && scontrol requeue $SLURM_JOB_ID' USR1
srun python pretrain.py IMAGENET --save-every 500 --resume auto &
run=$!
wait $run
"""
STUBS = dict(srun='exec "$@"', scontrol='echo "$@" >> "$(dirname "$0")/scontrol.said"',
             python=f'exec {sys.executable} "$@"')


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder of commands that stand for SLURM's."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name, line in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name, value in (("JOB_ID", 17), ("PROCID", 0), ("NTASKS", 1), ("NNODES", 1)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return folder


def test_the_batch_script_requeues_an_unfinished_run_and_not_a_finished_one(slurm, whole, tmp_path,
                                                                            start):
    output, (reference, flags) = tmp_path / "run", whole(1, REAL)
    job = tmp_path / "job.sh"
    job.write_text(SBATCH.replace("IMAGENET --save-every 500 --resume auto",
                                  " ".join(map(str, [*flags, "--output", output]))))
    run = start(output, [], command=["bash", job])
    run.steps(14)
    run.signal(signal.SIGUSR1)
    _, said = run.end()
    assert "stopped by SIGUSR1 after step" in said, said
    assert (slurm / "scontrol.said").read_text() == "requeue 17\n"
    again = start(output, [], command=["bash", job])
    status, said = again.end()
    assert status == 0, said
    assert (slurm / "scontrol.said").read_text() == "requeue 17\n"
    ended_the_same(output, reference)


@pytest.mark.parametrize("variables", [
    dict(NTASKS=4, NNODES=1), dict(NTASKS=8, NNODES=2, NTASKS_PER_NODE=4),
    dict(NTASKS=2, JOB_NUM_NODES=1), dict(STEP_NUM_TASKS=2, STEP_NUM_NODES=1, NTASKS=1),
    dict(NTASKS_PER_NODE=2, STEP_TASKS_PER_NODE="2(x3)")])
def test_several_slurm_tasks_a_node_are_refused_with_the_line_that_works(variables, call,
                                                                         monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "DIR"])
    for name, value in dict(variables, PROCID=1).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    status, _, errors = call(pretrain.main, "DIR")
    assert status == 2 and len(errors.splitlines()) == 1, errors
    assert "srun --ntasks=" in errors and "--ntasks-per-node=1 python pretrain.py DIR" in errors


def test_several_slurm_nodes_that_do_not_know_of_each_other_are_refused(call, monkeypatch):
    for name, value in dict(PROCID=0, NTASKS=2, NNODES=2, NTASKS_PER_NODE=1).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    status, _, errors = call(pretrain.main, "DIR")
    assert status == 2 and len(errors.splitlines()) == 1, errors
    assert "--world-size 2 --rank $SLURM_NODEID --dist-url tcp://" in errors
    pretrain.check_slurm(pretrain.parse_args(["DIR", "--world-size", "2"]))


@pytest.mark.parametrize("variables", [
    {}, dict(NTASKS=4), dict(PROCID=0), dict(PROCID=0, NTASKS=1, NNODES=1, NTASKS_PER_NODE=1),
    dict(PROCID=0, NTASKS=8, NTASKS_PER_NODE=8, NNODES=1, STEP_NUM_TASKS=1, STEP_NUM_NODES=1,
         STEP_TASKS_PER_NODE=1)])
def test_one_slurm_task_a_node_is_fine(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    pretrain.check_slurm(pretrain.parse_args(["DIR"]))


# --------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("damage", ["cut short", "one bit flipped"])
def test_a_damaged_checkpoint_is_answered_by_the_one_before(damage, whole, tmp_path):
    output = shutil.copytree(whole(1)[0], tmp_path / "run")
    path = output / "checkpoint.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-1000] if damage == "cut short" else data)
    said = goes_on_to_the_same_end(output, *whole(1))
    assert "checkpoint.pth: not a whole checkpoint" in said
    assert "taking" in said and "checkpoint.prev.pth" in said


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(whole, tmp_path, start):
    output = shutil.copytree(whole(1)[0], tmp_path / "run")
    shutil.copy(output / "checkpoint.prev.pth", output / "checkpoint.pth")  # of step 20 of 22
    before = (output / "checkpoint.pth").read_bytes()
    full = f"import resource; most = {len(before) // 2}, resource.RLIM_INFINITY\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, most)"
    run = start(output, whole(1)[1], patch=full)
    code, said = run.end()
    assert code == 1 and "cannot be written" in said.splitlines()[-1], said
    assert "Traceback" not in said and (output / "checkpoint.pth").read_bytes() == before
    goes_on_to_the_same_end(output, *whole(1))


# ---------------------------------------------------------------------- another number, the probe


def test_another_number_of_processes_goes_on_with_the_same_computation(whole, tmp_path, start):
    output, (reference, flags) = tmp_path / "run", whole(2)
    run = start(output, flags, patch=SLOW)
    run.steps(12)
    run.signal(signal.SIGUSR1)
    assert run.end()[0] == 0
    step = read_checkpoint(output)["step"] + 11
    said = finish(output, *flags[:-2], "--bn-splits", 2, "--nproc", 1)
    assert "no longer the same computation" not in said
    ours, theirs = (next(line for line in read_log(folder)
                         if line["step"] > step and "loss" in line)
                    for folder in (output, reference))
    for name in (name for name in theirs if name.startswith("loss")):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_another_number_of_bn_groups_is_said_to_be_another_computation(whole, tmp_path):
    output = shutil.copytree(whole(2)[0], tmp_path / "run")
    said = finish(output, *whole(1)[1])
    assert "resumed with BN over 1 groups" in said and "no longer the same computation" in said


def test_the_probe_is_stopped_and_goes_on_in_the_same_way(whole, few, tmp_path, start):
    flags = ["--pretrained", whole(1)[0] / "checkpoint.pth", "--device", "cpu", "--epochs", 6,
             "--batch-size", 32, "--lr", 1, "--print-every", 1]
    outputs = [tmp_path / name for name in ("run", "once")]
    slow = "def top(*args, real=pretrain.read_report): time.sleep(0.1); return real(*args)"
    run = start(outputs[0], flags, script="lincls.py", patch=slow + "\npretrain.read_report = top")
    run.steps(3)
    run.signal(signal.SIGTERM)
    assert run.end()[0] == 143, run.text()
    for output in outputs:
        here(lincls.main, *flags, "--output", output, "--resume", "auto")
    same_ending(*outputs)
    assert untimed(read_log(outputs[0])) == untimed(read_log(outputs[1]))
