"""File systems that lack something."""

import errno
import os
import stat

import pytest
import torch

from checkpoints import files
from logger.files import disk_errors
from logger.run_dir import RunDir
from utils import UserError


def refuse_to_sync_directories(number, monkeypatch):
    sync = os.fsync

    def refusing(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", refusing)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_directories_that_cannot_be_synced(number, tmp_path, monkeypatch):
    refuse_to_sync_directories(number, monkeypatch)
    files.save_checkpoint(tmp_path / "ckpt", "last.pt", {"state": {}})
    assert files.load_checkpoint(tmp_path / "ckpt" / "last.pt")["state"] == {}


@pytest.mark.skipif(os.name == "nt", reason="opens no directories")
def test_a_failing_disk_is_no_directory_that_cannot_be_synced(tmp_path, monkeypatch):
    refuse_to_sync_directories(errno.EIO, monkeypatch)
    with pytest.raises(UserError, match=os.strerror(errno.EIO)):
        files.save_checkpoint(tmp_path / "ckpt", "last.pt", {"state": {}})


def test_a_checkpoint_without_room_names_the_cause(tmp_path):
    """torch.save reports it as a position in the file that is not the expected one."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large; free some space"):
            files.save_checkpoint(tmp_path, "last.pt", {"state": {str(i): torch.zeros(20_000) for i in range(5)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "number, advice", [(errno.ENOSPC, "free some space"), (errno.EACCES, "check its permissions"), (errno.EIO, None)]
)
def test_advice_fits_the_error(number, advice, tmp_path):
    with pytest.raises(UserError) as raised, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    text = str(raised.value)
    assert os.strerror(number) in text and str(tmp_path) in text
    for words in ("free some space", "check its permissions"):
        assert (words in text) == (words == advice)


def test_a_lock_is_free_when_its_holder_lets_go(tmp_path):
    run = RunDir.create(str(tmp_path), "energy_train", "")
    (run.path / "config.json").write_text("{}")
    with run:
        with pytest.raises(UserError, match="in use by another"):
            RunDir.of(str(run.path))
    RunDir.of(str(run.path)).lock.release()
