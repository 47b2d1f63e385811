"""A run that is killed, signalled, or robbed of a process or its disk loses nothing, and ends where it would have ended."""
import contextlib
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, SMALL, descendants, read_log, same_ending, script, untimed

import lincls
import pretrain

FLAGS = [*SMALL, "--batch-size", "128", "--epochs", "2", "--warmup-epochs", "1", "--print-every", "3", "--num-clusters", "20",
         "40", "--knn-every", "0", "--save-every", "5", "--resume", "auto"]  # 22 steps, 11 of them with prototypes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(nproc): an uninterrupted run of so many processes, and the flags that made it."""
    @functools.cache
    def make(nproc):
        output, flags = tmp_path_factory.mktemp("whole"), [*FLAGS, "--nproc", nproc]
        finish(*flags, "--output", output)
        return output, flags
    return make


class Running:
    """pretrain.py in the background, with what it says in a file; `patch` is run in it before main."""

    def __init__(self, output, flags, patch="", launcher=(sys.executable,)):
        code = f"import os, signal, sys, time, pretrain, builder\n{patch}\npretrain.main()" if patch else None
        program = ["-c", code] if code else ["pretrain.py"]
        self.output, self.said = output, open(output.with_suffix(".said"), "w+")
        self.process = subprocess.Popen([*launcher, *program, *map(str, flags), "--output", str(output)], cwd=REPO,
                                        stdout=self.said, stderr=self.said, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def until(self, condition, seconds=90):
        """Wait for a condition that must come before the run ends."""
        end = time.time() + seconds
        while not condition():
            assert self.process.poll() is None and time.time() < end, self.text()
            time.sleep(0.02)

    def steps(self, count):
        self.until(lambda: (self.output / "log.jsonl").exists()
                   and any(json.loads(line)["step"] >= count for line in open(self.output / "log.jsonl") if line.endswith("\n")))

    def end(self, seconds=60):
        status = self.process.wait(seconds)
        return status, self.text()

    def text(self):
        self.said.seek(0)
        return self.said.read()

    def descendants(self):
        return descendants(self.process.pid)


def gone(pids, seconds=15):
    end = time.time() + seconds
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
              for pid in pids):
        assert time.time() < end, "a process was left behind"
        time.sleep(0.1)


def goes_on_to_the_same_end(output, reference, flags):
    said = finish(*flags, "--output", output)
    same_ending(output, reference)
    assert untimed(read_log(output)) == untimed(read_log(reference))
    assert not list(output.glob("*.new"))
    return said


def finish(*flags):
    """Run pre-training to its end, here where it is one process: what it says."""
    if flags[flags.index("--nproc") + 1] == 1:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            pretrain.main(list(map(str, flags)))
        return said.getvalue()
    done = script("pretrain.py", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
COUNT = """
count, enqueue = [], builder.MoCo.enqueue
def counted(model, k):
    enqueue(model, k)
    count.append(k)
builder.MoCo.enqueue = counted
"""
PHASES = {
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
def test_a_run_killed_in(phase, whole, tmp_path):
    run = Running(tmp_path / "run", whole(1)[1], patch=PHASES[phase])
    assert run.end()[0] == -signal.SIGKILL, run.text()
    goes_on_to_the_same_end(tmp_path / "run", *whole(1))


@pytest.mark.parametrize("number, status, nproc", [
    (signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 1), (signal.SIGUSR1, 0, 1), (signal.SIGINT, 130, 2)])
def test_a_signal_saves_after_the_step_and_ends_with_its_status(number, status, nproc, whole, tmp_path):
    run = Running(tmp_path / "run", whole(nproc)[1])
    run.steps(3)
    everyone = [run.process.pid, *run.descendants()]
    run.process.send_signal(number)
    start = time.time()
    code, said = run.end()
    assert code == status and time.time() - start < 20, said
    assert f"stopped by {signal.Signals(number).name} after step" in said and "Traceback" not in said
    gone(everyone)
    goes_on_to_the_same_end(tmp_path / "run", *whole(nproc))


def test_a_signal_to_one_process_ends_all_of_them_after_the_same_step(whole, tmp_path):
    run = Running(tmp_path / "run", whole(2)[1])
    run.steps(3)
    os.kill(ranks(run)[1], signal.SIGTERM)
    code, said = run.end()
    assert code == 143 and said.count("stopped by SIGTERM") == 1 and "Traceback" not in said, said
    goes_on_to_the_same_end(tmp_path / "run", *whole(2))


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)])
def test_a_signal_in_the_e_step_ends_without_a_new_checkpoint(number, status, whole, tmp_path):
    slow = """
def kmeans(*args):
    open(args[-1].output / "clustering", "w").close()
    time.sleep(60)
pretrain.kmeans = kmeans"""
    run = Running(tmp_path / "run", whole(1)[1], patch=slow)
    run.until((tmp_path / "run" / "clustering").exists)
    before = (tmp_path / "run" / "checkpoint.pth").stat().st_mtime_ns
    run.process.send_signal(number)
    code, said = run.end(10)
    assert code == status and "from the last checkpoint" in said and "Traceback" not in said, said
    assert (tmp_path / "run" / "checkpoint.pth").stat().st_mtime_ns == before


def test_a_signal_in_the_monitor_loses_nothing_of_the_epoch(whole, tmp_path):
    slow = """
def knn(*args, calls=[]):
    calls.append(args)
    if len(calls) == 2:  # the first is before training
        open(args[-1].output / "monitoring", "w").close()
        time.sleep(60)
    return 50.0
pretrain.knn = knn"""
    output, (reference, flags) = tmp_path / "run", whole(1)
    run = Running(output, [*flags, "--save-every", 0, "--knn-every", 1], patch=slow)
    run.until((output / "monitoring").exists)
    run.process.send_signal(signal.SIGTERM)
    assert run.end(10)[0] == 143
    checkpoint = torch.load(output / "checkpoint.pth", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"]) == (0, 11)
    finish(*flags, "--output", output)
    same_ending(output, reference)


def test_a_second_sigint_stops_at_once(whole, tmp_path):
    slow = """
def enqueue(model, k):
    open(sys.argv[-1] + "/stepping", "w").close()
    for _ in range(600): time.sleep(0.1)
builder.MoCo.enqueue = enqueue"""
    run = Running(tmp_path / "run", whole(1)[1], patch=slow)
    run.until((tmp_path / "run" / "stepping").exists)
    run.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.process.poll() is None  # it waits for the end of the step
    run.process.send_signal(signal.SIGINT)
    assert run.end(5)[0] == -signal.SIGINT


def ranks(run):
    return [pid for pid in run.descendants() if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_killed_process_ends_the_job_and_is_named(whole, tmp_path):
    run = Running(tmp_path / "run", whole(2)[1])
    run.steps(3)
    everyone = run.descendants()
    os.kill(ranks(run)[1], signal.SIGKILL)
    code, said = run.end()
    assert code == 1 and "error: process 1 was ended by SIGKILL" in said and "Traceback" not in said, said
    gone(everyone)
    goes_on_to_the_same_end(tmp_path / "run", *whole(2))


def test_processes_do_not_outlive_a_killed_parent(whole, tmp_path):
    run = Running(tmp_path / "run", whole(2)[1])
    run.steps(3)
    everyone = run.descendants()
    run.process.kill()
    gone(everyone, 30)
    run.end()
    goes_on_to_the_same_end(tmp_path / "run", *whole(2))


@pytest.fixture
def files_run(image_folder, tmp_path):
    """A run on image files with a data worker."""
    run = Running(tmp_path / "run", [image_folder, *SMALL, "--crop-size", 32, "--batch-size", 20, "--epochs", 500, "--workers", 1,
                                     "--num-clusters", 0, "--knn-every", 0, "--print-every", 1])
    run.steps(3)
    yield run, run.descendants()
    run.process.kill()


def test_a_killed_data_worker_ends_the_run_with_one_line(files_run):
    run, workers = files_run
    os.kill(workers[-1], signal.SIGKILL)
    code, said = run.end()
    assert code == 1 and "error: DataLoader worker" in said.splitlines()[-1] and "Traceback" not in said, said
    gone(workers)


def test_a_signal_to_every_process_does_not_kill_the_data_workers_before_the_step_is_saved(files_run):
    run, workers = files_run
    shared_memory = set(os.listdir("/dev/shm"))
    for pid in (*workers, run.process.pid):
        os.kill(pid, signal.SIGTERM)
    code, said = run.end(20)
    assert code == 143 and "stopped by SIGTERM" in said and "error" not in said, said
    gone(workers)
    assert set(os.listdir("/dev/shm")) <= shared_memory


def test_torchrun_restarts_a_killed_process_which_goes_on_by_itself(whole, tmp_path):
    flags = whole(2)[1][:-2]
    run = Running(tmp_path / "run", flags, launcher=(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                                                     "--max-restarts", "1", "--master-port", "29572"))
    run.steps(14)
    os.kill(next(pid for pid in run.descendants() if "pretrain.py" in Path(f"/proc/{pid}/cmdline").read_text()), signal.SIGKILL)
    code, said = run.end(200)
    assert code == 0, said
    same_ending(tmp_path / "run", whole(2)[0])
    assert untimed(read_log(tmp_path / "run")) == untimed(read_log(whole(2)[0]))


@pytest.mark.parametrize("damage", ["cut short", "one bit flipped"])
def test_a_damaged_checkpoint_is_answered_by_the_one_before(damage, whole, tmp_path):
    output = shutil.copytree(whole(1)[0], tmp_path / "run")
    path = output / "checkpoint.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-1000] if damage == "cut short" else data)
    said = goes_on_to_the_same_end(output, *whole(1))
    assert "checkpoint.pth: not a whole checkpoint" in said and "taking" in said and "checkpoint.prev.pth" in said


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(whole, tmp_path):
    output = shutil.copytree(whole(1)[0], tmp_path / "run")
    shutil.copy(output / "checkpoint.prev.pth", output / "checkpoint.pth")  # of step 20 of 22
    before = (output / "checkpoint.pth").read_bytes()
    limit = len(before) // 1024 - 100  # as the shell counts, in blocks of 1 KiB
    done = script("-c", f'ulimit -f {limit}; exec "$@"', "bash", sys.executable, "pretrain.py", *whole(1)[1], "--output", output,
                  launcher=("bash",))
    assert done.returncode == 1 and "cannot be written" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and (output / "checkpoint.pth").read_bytes() == before
    goes_on_to_the_same_end(output, *whole(1))


def test_another_number_of_processes_goes_on_with_the_same_computation(whole, tmp_path):
    run = Running(tmp_path / "run", whole(2)[1])
    run.steps(12)
    run.process.send_signal(signal.SIGUSR1)
    assert run.end()[0] == 0
    step = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["step"] + 11
    said = finish(*whole(2)[1][:-1], 1, "--bn-splits", 2, "--output", tmp_path / "run")
    assert "no longer the same computation" not in said
    ours, theirs = (next(line for line in read_log(output) if line["step"] > step and "loss" in line)
                    for output in (tmp_path / "run", whole(2)[0]))
    for name in (name for name in theirs if name.startswith("loss")):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(whole(2)[0], tmp_path / "run")
    said = finish(*whole(2)[1][:-1], 1, "--output", tmp_path / "run")
    assert "resumed with BN over 1 groups" in said and "no longer the same computation" in said


def test_the_probe_is_stopped_and_goes_on_in_the_same_way(whole, tmp_path):
    flags = ["--pretrained", whole(1)[0] / "checkpoint.pth", "--device", "cpu", "--epochs", 12, "--print-every", 1]
    outputs = [tmp_path / name for name in ("run", "once")]
    run = Running(outputs[0], flags, patch="import lincls; pretrain.main = lincls.main")
    run.steps(3)
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 143, run.text()
    for output in outputs:
        lincls.main([*map(str, flags), "--output", str(output), "--resume", "auto"])
    same_ending(*outputs)
    assert untimed(read_log(outputs[0])) == untimed(read_log(outputs[1]))
