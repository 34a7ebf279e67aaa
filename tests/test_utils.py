"""What is recorded of the machine and the program."""

import subprocess
from importlib.metadata import version

import pytest
import torch

import utils

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit and a folder ``copy`` in it."""
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "main.py").write_text("")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*GIT, *command], cwd=tmp_path, check=True)
    return tmp_path


def test_the_commit_is_that_of_the_programs_own_repository(repository):
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True).stdout.strip()
    assert utils.git_commit(repository) == commit
    (repository / "new").write_text("")
    assert utils.git_commit(repository) == f"{commit} with local changes"


def test_a_copy_inside_another_repository_has_no_commit(repository, tmp_path_factory, monkeypatch):
    assert utils.git_commit(repository / "copy") == "unknown"
    assert utils.git_commit(tmp_path_factory.mktemp("no repository")) == "unknown"
    monkeypatch.setenv("PATH", "")  # no git
    assert utils.git_commit(repository) == "unknown"


def test_versions_are_those_of_the_installed_packages():
    found = utils.environment(torch.device("cpu"))
    for name in ("torch", "torchvision", "numpy", "pillow", "torchmetrics", "torch-fidelity", "pyautoattack"):
        assert found[name] == version(name)
    assert utils.installed("no-such-package") == "not installed"
