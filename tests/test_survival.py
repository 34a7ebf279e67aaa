"""Runs that are stopped or killed, or whose disk fills up, end like an undisturbed run; also files, locks, the writer.

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
from unittest.mock import Mock

import pytest
import torch
from small_runs import TINY, assert_same_run, at_step, equal, metrics, refused, signal_at_step, start, state

import divergence
import main
import trainer
import utils
from checkpoints import files
from checkpoints.files import save_checkpoint
from config import Config
from logger import images
from logger.files import first_free
from logger.metrics_log import Log, read_log
from logger.run_dir import RunDir
from logger.run_logger import RunLogger
from utils import UserError

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
        monkeypatch.setattr(images, "replace_file", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
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
    logger = RunLogger(RunDir.create(str(tmp_path), "energy_train", ""), Config(no_log=True), 0, 10, 0)
    with pytest.raises(OSError, match="full"), logger as record:
        record.checkpoint(Mock(side_effect=OSError("full")), "last.pt", {})
        if more:
            wait(record.jobs)
            record.checkpoint(lambda *_: pytest.fail("written after one that failed"), "last.pt", {})


def test_a_process_that_does_not_write_has_the_same_methods(capsys):
    with RunLogger(None, Config(no_log=True), 0, 10, 0) as record:
        record.advance(1)
        record.save_samples(1, torch.zeros(2, 3, 8, 8))
        record.save_gif(1, torch.zeros(2, 3, 3, 8, 8), 10)
        record.checkpoint(pytest.fail, "last.pt", {})
        record.log_recovery(10, 5, "new randomness")
        record.log_values(10, {}, {}, 0.0)
        record.end(10, 0)
    assert math.isnan(record.take_speed(10)) and capsys.readouterr() == ("", "")


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


GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    sync, rename, done = os.fsync, os.replace, []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("sync") or sync(handle))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("rename") or rename(*paths))
    (tmp_path / "last.pt.tmp").write_text("somebody's own")
    files.save_checkpoint(tmp_path, "last.pt", {"weights": 0})
    assert torch.load(tmp_path / "last.pt") == {"format": files.CHECKPOINT_FORMAT, "weights": 0}
    assert done == ["sync", "rename"]  # a power cut leaves the old file or the new one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "last.pt.tmp"]


def test_lines_that_are_no_measurements_do_not_count(tmp_path):
    (tmp_path / "log").write_text('[1]\n{"event": "x"}\n{"step": 1}\n{"back_to": 0, "step": {}}\n{"step": 3')
    assert read_log(tmp_path / "log") == [{"step": 1}]


def test_a_checkpoint_without_room_names_the_cause(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            files.save_checkpoint(tmp_path, "last.pt", {"state": {str(i): torch.zeros(20_000) for i in range(5)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_lock_is_free_when_its_holder_lets_go(tmp_path):
    run = RunDir.create(str(tmp_path), "energy_train", "")
    (run.path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="in use by another"):
        RunDir.of(str(run.path))
    run.close()
    (tmp_path / "latest").symlink_to(run.path)
    again = RunDir.of(str(tmp_path / "latest"))
    assert again.path == run.path.resolve()  # wherever the link leads later
    again.close()


def test_nobody_gets_a_name_that_is_taken(tmp_path):
    (tmp_path / "v1.5").mkdir()
    assert [first_free(tmp_path / "v1.5", Path.mkdir).name for _ in range(2)] == ["v1.5-2", "v1.5-3"]
    for i, name in enumerate(("last.pt_set_aside", "last.pt_set_aside-2")):
        (tmp_path / "last.pt").write_text(str(i))
        files.set_aside(tmp_path / "last.pt")
        assert (tmp_path / name).read_text() == str(i) and not (tmp_path / "last.pt").exists()
    files.set_aside(tmp_path / "last.pt")  # is not there any more
    assert len(list(tmp_path.iterdir())) == 5


def test_a_place_that_is_no_utf8_is_one_line(tmp_path):
    place = tmp_path / os.fsdecode(b"runs\xff")
    place.mkdir()
    with pytest.raises(UserError, match="not valid UTF-8; rename it, or give --no_log"):
        Log(place, tensorboard=True)
    log = Log(place, tensorboard=False)
    log.values(1, {"loss": math.nan})
    assert log.path.read_text() == '{"step": 1, "loss": null}\n'  # JSON has no NaN


def test_the_commit_is_that_of_the_programs_own_repository(tmp_path, tmp_path_factory, monkeypatch):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "main.py").write_text("")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*GIT, *command], cwd=tmp_path, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert utils.git_commit(tmp_path) == commit
    (tmp_path / "copy" / "main.py").write_text("changed")
    assert utils.git_commit(tmp_path) == f"{commit} with local changes"
    for other in (tmp_path / "copy", tmp_path_factory.mktemp("no repository")):
        assert utils.git_commit(other) == "unknown"
    monkeypatch.setenv("PATH", "")  # no git
    assert utils.git_commit(tmp_path) == "unknown"


def test_a_recovery_waits_for_pictures_that_go_to_the_same_writer(tmp_path):
    with RunLogger(RunDir.create(str(tmp_path), "energy_train", ""), Config(), 5, 10, 0) as logger:
        logger.write(lambda: (time.sleep(0.3), logger.log.image(5, "samples", b"")))
        logger.log_recovery(5, 0, "new randomness")
        assert all(job.done() for job in logger.jobs)
