"""on_gpu.py: all of its stages on the CPU, and what becomes of one that fails or hangs."""
from conftest import REPO, gone, read_log, script

import on_gpu

STAGES = """
import subprocess, sys
sys.path.insert(0, {folder!r})
import on_gpu

def works(work, args):
    yield "it", dict(value=1.5)

def fails(work, args):
    yield "before", dict(value=2.5)
    raise ValueError("of this kind")

def hangs(work, args):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    yield "before", dict(pid=child.pid)
    child.wait()

on_gpu.STAGES = dict(smoke=(9, works), tests=(9, fails), step=(0.5, hangs), cifar10=(9, works))
sys.exit(on_gpu.main())
"""


def test_all_stages_run_on_the_cpu(tmp_path):
    done = script("tests/on_gpu.py", "--quick", "--output", tmp_path / "out")
    logs = [path.read_text()[-2000:] for path in (tmp_path / "out").glob("*.log")]
    assert done.returncode == 0, (done.stdout, done.stderr, *logs)
    for name in on_gpu.STAGES:
        assert f"\n{name}: done, " in done.stdout
    for row in ("lincls.py ", "a PAUC step ", "shufflenet 64 px ", "PCL ", "PAUC, two heads, "):
        assert f"\n    {row}" in done.stdout
    assert "test_linear: " in done.stdout and "proto_effective_rank: " in done.stdout
    assert '"run": "smoke/lincls"' in (tmp_path / "out" / "runs.jsonl").read_text()


def test_a_stage_that_fails_and_one_that_hangs_are_shown_and_the_others_are_kept(tmp_path):
    odd = tmp_path / "odd.py"
    odd.write_text(STAGES.format(folder=f"{REPO}/tests"))
    for call in (1, 2):
        done = script(odd, "--quick", "--output", tmp_path / "out")
        assert done.returncode == 1, done.stderr
        for line in ("smoke: done, ", "tests: failed, ", "step: over its limit, ",
                     "cifar10: done, "):
            assert f"\n{line}" in done.stdout
        assert "s ValueError: of this kind\n" in done.stdout
        assert done.stdout.count(" value: 1.5\n") == 2 and " value: 2.5\n" in done.stdout
        lines = read_log(tmp_path / "out" / "results.jsonl")
        ends = [line["stage"] for line in lines if "status" in line]
        again = ["tests", "step"] * (call - 1)
        assert ends == ["smoke", "tests", "step", "cifar10", *again]  # what is done is skipped
        gone([line["figures"]["pid"] for line in lines if "pid" in line.get("figures", ())], 5)
