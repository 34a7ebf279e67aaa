"""The benchmarks run on small networks and measure what they say; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
SMALL = "--depth 10 --width 1 --batch_size 8 --sgld_step 2 --device cpu --precision fp32 --compile off".split()


def run(script, *options):
    command = [sys.executable, HERE / "benchmarks" / script, *SMALL, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_throughput(tmp_path):
    parts = "--parts sampler,step,data,loop --repeats 1 --image_size 8 --images 100 --loop_steps 12".split()
    run("throughput.py", *parts, "--json", tmp_path / "numbers.json")
    rows = {row["what"]: row for row in json.loads((tmp_path / "numbers.json").read_text())["rows"]}
    names = ["sampler", "training step", "batch and augmentation", "12 bare steps", "the same with log and dumps"]
    assert rows.keys() == {*names, "sampler, plain", "training step, plain"}
    for name in ("sampler", "training step"):
        speedup = rows[f"{name}, plain"]["seconds"] / rows[name]["seconds"]
        assert rows[name]["speedup"] == pytest.approx(speedup)
    # A training step has the chains' passes, and forward and backward passes of real and sampled images.
    assert 1 < rows["training step"]["flops"] / rows["sampler"]["flops"] < 4


def test_profile():
    out = run("profile_step.py")
    assert "convolution" in out
