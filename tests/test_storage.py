"""File systems that lack something, names that are taken, jobs of the writer, and the commit that is recorded."""

import errno
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest
import torch

import utils
from checkpoints import files
from config import Config
from logger.files import first_free
from logger.metrics_log import Log, read_log
from logger.run_dir import RunDir
from logger.run_logger import RunLogger
from utils import UserError

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


def test_directories_that_cannot_be_synced(tmp_path, monkeypatch):
    sync, rename, done = os.fsync, os.replace, []

    def refusing(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        done.append("sync")
        sync(handle)

    monkeypatch.setattr(os, "fsync", refusing)
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
    Log(place, tensorboard=False).close()


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
        logger.recovery(5, 0, "new randomness")
        assert all(job.done() for job in logger.jobs)
