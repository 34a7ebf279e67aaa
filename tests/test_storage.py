"""File systems that lack something."""

import errno
import os

import pytest

from storage import checkpoint
from storage.run_dir import RunDir
from storage.writer import disk_errors
from utils import UserError


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_directories_that_cannot_be_synced(number, tmp_path, monkeypatch):
    sync = os.fsync

    def refusing(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", refusing)
    checkpoint.save_checkpoint(tmp_path / "ckpt", "last.pt", {"state": {}})
    assert checkpoint.load_checkpoint(tmp_path / "ckpt" / "last.pt")["state"] == {}


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
