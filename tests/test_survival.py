"""Runs that are stopped or killed, or whose disk fills up, end where the undisturbed run ends.

``SURVIVAL_KILLS=20 python -m pytest tests/test_survival.py`` is the long form.
"""

import errno
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import TINY, assert_same_run, at_step, equal, metrics, refused, signal_at_step, start, state

import divergence
import main
import trainer
from checkpoints.files import save_checkpoint
from config import Config
from logger import images
from logger.run_dir import RunDir
from logger.run_logger import RunLogger

KILLS = int(os.environ.get("SURVIVAL_KILLS", 1))
pytestmark = pytest.mark.usefixtures("undisturbed")


def recorded_checkpoints(monkeypatch):
    """The names and steps of the checkpoints that are written from now on."""
    saved = []

    def save(directory, name, content):
        saved.append((name, content["state"]["step"]))
        save_checkpoint(directory, name, content)

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    return saved


class TestSignals:
    @pytest.mark.parametrize("number, status, step", [(2, 130, 1), (15, 143, 17), (2, 130, 26)])  # SIGINT, SIGTERM
    def test_stop_and_resume_is_bit_for_bit(self, number, status, step, tmp_path, monkeypatch, undisturbed):
        signal_at_step(monkeypatch, step, number)
        before = signal.getsignal(number)
        stopped, run = start(tmp_path)
        assert stopped == status and state(run)["step"] == step
        assert main.main(["--resume", str(run)]) == 0
        assert_same_run(run, undisturbed)
        assert signal.getsignal(number) == before

    def test_sigusr1_saves_and_goes_on(self, tmp_path, monkeypatch, undisturbed):
        saved = recorded_checkpoints(monkeypatch)
        signal_at_step(monkeypatch, 8, signal.SIGUSR1)
        status, run = start(tmp_path)
        assert status == 0 and ("last.pt", 8) in saved and ("last.pt", 7) not in saved
        assert_same_run(run, undisturbed)

    @pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
    def test_between_the_update_and_the_checkpoint(self, number, status, tmp_path, monkeypatch, undisturbed):
        saved = recorded_checkpoints(monkeypatch)
        measure = trainer.Trainer.measurements

        def interrupted(self):
            if self.step == 20:
                os.kill(os.getpid(), number)
            return measure(self)

        monkeypatch.setattr(trainer.Trainer, "measurements", interrupted)
        stopped, run = start(tmp_path)
        assert stopped == status and ("last.pt", 21) in saved
        assert status == 0 or (state(run)["step"] == 21 and main.main(["--resume", str(run)]) == 0)
        assert_same_run(run, undisturbed)


class TestFullDisk:
    def test_while_saving(self, tmp_path, monkeypatch, capsys, undisturbed):
        real = torch.save

        def full(content, file):
            if content["state"]["step"] == 26:
                file.write(b"half of it")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(content, file)

        monkeypatch.setattr(torch, "save", full)
        status, run = start(tmp_path)
        err = capsys.readouterr().err.splitlines()[-1]
        assert status == 2 and "No space left on device" in err and "--resume" in err
        assert state(run)["step"] == 13 and not list(run.glob("ckpt/*.tmp"))
        monkeypatch.setattr(torch, "save", real)
        assert main.main(["--resume", str(run)]) == 0
        assert_same_run(run, undisturbed)

    def test_while_writing_pictures(self, tmp_path, monkeypatch, capsys, undisturbed):

        def full(path, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(images, "replace_file", full)
        status, run = start(tmp_path)
        assert status == 0 and "Warning: sampled_image_00000001.png could not be written: " in capsys.readouterr().err
        assert equal(state(run), state(undisturbed)) and not list(run.glob("samples/*.png"))

    @pytest.mark.parametrize("room, tensorboard", [(1000, False), (20_000, True)])
    def test_while_logging(self, room, tensorboard, tmp_path):
        """Files may grow to ``room`` bytes; neither metrics.jsonl nor TensorBoard ends in a traceback."""
        program = f"""
import contextlib, pathlib, resource
from logger.metrics_log import Log
from utils import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
log = Log(pathlib.Path({str(tmp_path)!r}), {tensorboard})
try:
    for step in range(10**5):
        log.values(step, {{"loss": 1.0}})
        if step % 100 == 0: log.flush()
except UserError as error: print(error)
with contextlib.suppress(UserError): log.close()
"""
        here = Path(main.__file__).parent
        done = subprocess.run([sys.executable, "-B", "-c", program], cwd=here, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""
        assert "metrics.jsonl: File too large" in done.stdout

    def test_before_a_run(self, tmp_path, monkeypatch, capsys, undisturbed):
        """A run does not start where three of its checkpoints have no room, nor without memory for four states."""
        needed = 3 * (undisturbed / "ckpt" / "last.pt").stat().st_size
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0.8 * needed))
        command = [*TINY, "--logdir", tmp_path / "runs"]
        assert f"checkpoints need {needed / 1e6:.0f} MB and" in refused(capsys, *command)
        for n in (1, 2):  # processes of this machine
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n))
            err = refused(capsys, *command, "--buffer_size", 2 * 10**9)
            (found,) = re.findall(r"the run needs ([\d,]+) MB of memory", err)
            assert float(found.replace(",", "")) == pytest.approx(n * 4 * 4 * 64 * 2000, rel=1e-3)
        assert not (tmp_path / "runs").exists()


def test_metrics_that_are_removed_begin_again(tmp_path, monkeypatch):
    at_step(monkeypatch, 15, lambda _: next(tmp_path.glob("*/metrics.jsonl")).unlink())
    status, run = start(tmp_path, "--max_steps", "20")
    assert status == 0 and [line["step"] for line in metrics(run)] == [20]
    assert main.main(["--resume", str(run), "--max_steps", "30"]) == 0
    assert [line["step"] for line in metrics(run)] == [20, 26, 30]


@pytest.mark.parametrize("more", [False, True])
def test_what_the_second_thread_could_not_write_is_raised_here(more, tmp_path):
    def fail(*_):
        raise OSError("full")

    logger = RunLogger(RunDir.create(str(tmp_path), "energy_train", ""), Config(no_log=True), 0, 10, 0)
    with pytest.raises(OSError, match="full"), logger as record:
        record.checkpoint(fail, "last.pt", {})
        if more:
            wait(record.jobs)
            record.checkpoint(lambda *_: pytest.fail("written after one that failed"), "last.pt", {})


def test_a_process_that_does_not_write_has_the_same_methods(capsys):
    with RunLogger(None, Config(no_log=True), 0, 10, 0) as record:
        record.samples(1, torch.zeros(2, 3, 8, 8))
        record.gif(1, torch.zeros(2, 3, 3, 8, 8), 10)
        record.checkpoint(pytest.fail, "last.pt", {})
        record.recovery(10, 5, "new randomness")
        record.values(10, {})
        record.end(10, 0)
    assert math.isnan(record.speed(10)) and capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, monkeypatch):
    dumps = "--ckpt_every 3 --sample_every 3 --gif_every 30 --max_steps".split()
    options = [*TINY, *dumps, str(24 * (KILLS + 1))]
    monkeypatch.setattr(divergence, "STATE_EVERY", 10)
    frequent = "import sys, main, divergence, trainer; divergence.STATE_EVERY, trainer.MIN_EPOCH = 10, 1; "
    program = [sys.executable, "-c", frequent + "sys.exit(main.main(sys.argv[1:]))"]
    status, whole = start(tmp_path / "whole", *options)
    assert status == 0
    killed, rng, kills = tmp_path / "killed", random.Random(0), 0
    killed.mkdir()

    def newest_save():
        with suppress(FileNotFoundError):  # renamed between the look and the stat
            return max((path.stat().st_mtime_ns for path in killed.glob("*/ckpt/last.pt")), default=0)

    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": Path(main.__file__).parent}
    while True:
        before = newest_save()
        process = subprocess.Popen([*program, *options, "--logdir", str(killed), "--resume", "auto"], **pipes)
        if kills < KILLS:
            while process.poll() is None and newest_save() in (before, None):  # until it has imported torch and trains
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err.decode()
        if process.returncode == 0:
            break
        kills += 1
    assert kills == KILLS  # or the run was too short for them
    (run,) = killed.iterdir()
    assert_same_run(run, whole)
