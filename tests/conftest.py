"""One thread for each test process: the networks are tiny, and the processes of ``pytest -n`` share the cores."""

import functools
import os
from pathlib import Path
from urllib.error import URLError

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in the programs that tests start

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def remembered():
    """What hundreds of runs would find out again: the digits in their file, and this repository's commit."""
    import sklearn.datasets  # here, not above: the process that only hands out the tests needs neither it nor torch

    import utils

    commit, git_commit = utils.git_commit(HERE), utils.git_commit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", functools.cache(sklearn.datasets.load_digits))
        patch.setattr(utils, "git_commit", lambda folder: commit if folder == HERE else git_commit(folder))
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The directory of a run that nothing happens to; all runs of a file that uses this have short epochs."""
    import small_runs  # imports the whole program

    with small_runs.short_epochs():
        status, run = small_runs.start(tmp_path_factory.mktemp("undisturbed"))
        assert status == 0
        yield run


@pytest.fixture(autouse=True)
def network(monkeypatch, tmp_path_factory):
    """No test reaches the network or what was downloaded before; the list holds the addresses that were asked for."""
    asked = []

    def offline(request, *args, **kwargs):
        asked.append(request.full_url)
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "torch_home"))
    return asked


def pytest_collection_modifyitems(items):  # long ones first: no worker ends with one
    items.sort(key=lambda t: not ("slow" in t.keywords or t.path.stem in ("test_processes", "test_benchmarks")))
