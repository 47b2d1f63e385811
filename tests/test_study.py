"""The terms do what they are for, on Gaussians; the study and the benchmark run."""
import json

import pytest
import torch.distributed as dist
from conftest import script

import study


@pytest.mark.parametrize("sizes", ["5", "100"])
def test_the_terms_cure_coagulation_and_keep_the_fine_classes(sizes):
    """More diversity and rank than PCL with one head, in half the steps of STUDY.md's table."""
    pcl, pauc = (study.hierarchy(["--num-clusters", sizes, *flags], seed=0, steps=300)
                 for flags in (study.PCL, ["--heads", "1"]))
    dist.destroy_process_group()
    assert pauc["diversity"] > pcl["diversity"] + 0.01
    assert pauc["effective_rank"] > pcl["effective_rank"] + 0.15
    assert pauc["knn"] > pcl["knn"]


def test_the_study_runs(tmp_path):
    """On the hierarchy; on images test_on_gpu.py runs it."""
    done = script("tests/study.py", "--quick", "--grid", "hierarchy", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "two heads, P = 5 − PCL, P = 5" in (tmp_path / "hierarchy.md").read_text()


def test_the_benchmark_runs(tmp_path):
    """But for the steps, which test_on_gpu.py runs."""
    parts, table = ["reading", "kmeans", "counted"], tmp_path / "table"
    done = script("tests/benchmark.py", "--quick", "--device", "cpu", "--only", *parts, "--output",
                  table)
    assert done.returncode == 0, done.stderr
    assert {row["part"] for row in json.loads(table.read_text())["rows"]} == {*parts}
