"""File systems that lack something, and files and folders whose names are taken."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from checkpoints import files
from logger.files import first_free
from logger.metrics_log import Log, read_log
from logger.run_dir import RunDir
from utils import UserError


def test_directories_that_cannot_be_synced(tmp_path, monkeypatch):
    sync = os.fsync

    def refusing(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(handle)

    monkeypatch.setattr(os, "fsync", refusing)
    (tmp_path / "last.pt.tmp").write_text("somebody's own")
    files.save_checkpoint(tmp_path, "last.pt", {"weights": 0})
    assert torch.load(tmp_path / "last.pt") == {"format": files.CHECKPOINT_FORMAT, "weights": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "last.pt.tmp"]


def test_lines_that_are_no_measurements_do_not_count(tmp_path):
    (tmp_path / "log").write_text('[1]\n{"event": "x"}\n{"step": 1}\n{"back_to": 0, "step": {}}\n{"step": 3')
    assert read_log(tmp_path / "log") == [{"step": 1}]


def test_a_checkpoint_without_room_names_the_cause(tmp_path):
    """torch.save reports it as a position in the file that is not the expected one."""
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
    RunDir.of(str(run.path)).close()


def test_nobody_gets_a_name_that_is_taken(tmp_path):
    (tmp_path / "v1.5").mkdir()
    assert [first_free(tmp_path / "v1.5", Path.mkdir).name for _ in range(2)] == ["v1.5-2", "v1.5-3"]
    for i, name in enumerate(("last_set_aside.pt", "last_set_aside-2.pt")):
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
