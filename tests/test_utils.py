"""What is recorded of the machine and the program."""

import subprocess

import utils

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


def test_the_commit_is_that_of_the_programs_own_repository(tmp_path, tmp_path_factory, monkeypatch):
    """Not of one around a copy."""
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
