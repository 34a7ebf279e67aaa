"""Terminals that break, signals at any moment: real processes."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from small_runs import DIGITS, new_run, refused, state
from test_data import write_pngs

import main
from logger import terminal

HERE = Path(main.__file__).parent
TINY = [*DIGITS, *"--batch_size 16 --buffer_size 64 --max_steps 5 --no_log".split()]


def command(logdir, *options):
    return [sys.executable, str(HERE / "main.py"), *TINY, "--logdir", str(logdir), *options]


def finished(logdir):
    (run,) = logdir.iterdir()
    return state(run)["step"] == 5


@pytest.mark.skipif(sys.platform != "linux", reason="redirects to /dev/full")
@pytest.mark.parametrize(
    "redirection", [">/dev/full 2>&1", ">&- 2>&-", "2>&1 | head -c 1 >/dev/null; exit ${PIPESTATUS[0]}"]
)
def test_broken_streams_end_nothing(redirection, tmp_path):
    words = " ".join(f"'{word}'" for word in command(tmp_path / "runs"))
    done = subprocess.run(["bash", "-c", f"{words} {redirection}"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and finished(tmp_path / "runs")


def test_a_full_pipe_that_does_not_wait_ends_nothing():
    read, write = os.pipe()
    os.set_blocking(write, False)
    with open(read), io.TextIOWrapper(io.BufferedWriter(terminal.Forgiving(write, "w")), line_buffering=True) as stream:
        for _ in range(2000):
            print("x" * 100, file=stream)


@pytest.mark.parametrize("encoding, note", [("ascii", "Übung"), ("utf-8", "caf\udce9")])
def test_any_encoding(encoding, note, tmp_path):
    """And any Matplotlib backend: a notebook's, which its shell commands inherit, may not be installed here."""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "MPLBACKEND": "one of a notebook"}
    arguments = [os.fsencode(word) for word in command(tmp_path / "runs", "--note", note)]
    done = subprocess.run(arguments, capture_output=True, env=environment)
    if note.isprintable():
        assert done.returncode == 0 and finished(tmp_path / "runs"), done.stderr
        assert len(list(tmp_path.glob("runs/*/loss.png"))) == 1 and b"Warning" not in done.stderr
        assert ascii(note)[1:-1].encode() in done.stdout
    else:
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"--note" in done.stderr


SLOW = """
import os, sys, time
import torch
import main
from logger import terminal
original = torch.save

def slow(content, file):
    if content["state"]["step"]:
        file.write(b"half of it")
        file.flush()
        print("writing", flush=True)
        time.sleep(60)
    original(content, file)

torch.save = slow
terminal.protect()
terminal.leave(main.main(sys.argv[1:]))
"""


@pytest.fixture
def begin():
    """Start a command in a process group of its own, which is killed at the end of the test, whatever happens.

    SIGHUP is obeyed at first, also under nohup; SIGINT is ignored, as it is by a script's background jobs.
    """
    started = []

    def first_signals():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def begin(command, until=None):
        """The process, if ``until`` is given once it has printed that."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **pipes, cwd=HERE, start_new_session=True, preexec_fn=first_signals)
        started.append(process)
        wait_for(process, until)
        return process

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(process, text):
    while text and text not in (line := process.stdout.readline()):
        assert line, process.stderr.read()


TENTH_STEP = "steps will take about"


class TestSignals:
    def test_a_second_ctrl_c_in_the_middle_of_a_checkpoint(self, begin, tmp_path):
        _, _, *options = command(tmp_path / "runs", "--max_steps", "100000")
        process = begin([sys.executable, "-c", SLOW, *options], TENTH_STEP)
        process.send_signal(signal.SIGINT)
        wait_for(process, "writing")
        time.sleep(0.2)
        before = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130 and time.monotonic() - before < 20
        assert "Traceback" not in err and "terminate" not in err
        assert err.count("Stopping soon. Ctrl-C again stops at once.") == 1
        (run,) = (tmp_path / "runs").iterdir()
        assert not list(run.rglob("*.tmp")) and state(run)["step"] == 0
        assert main.main(["--resume", str(run), "--max_steps", "2"]) == 0

    @pytest.mark.parametrize("name, status", [("SIGHUP", 129), ("SIGTERM", 143)])
    def test_a_stopped_process_has_saved(self, name, status, begin, tmp_path):
        process = begin(command(tmp_path / "runs", "--max_steps", "100000"), TENTH_STEP)
        process.send_signal(getattr(signal, name))
        process.communicate(timeout=60)
        (run,) = (tmp_path / "runs").iterdir()
        assert process.returncode == status and state(run)["step"] >= 10

    def test_sighup_stays_ignored_under_nohup(self, begin, tmp_path):
        process = begin(["nohup", *command(tmp_path / "runs", "--max_steps", "100000")], TENTH_STEP)
        process.send_signal(signal.SIGHUP)
        (log,) = (tmp_path / "runs").glob("*/metrics.jsonl")
        lines = log.read_text().count("\n") + 3  # of 10 steps each
        deadline = time.monotonic() + 60
        while process.poll() is None and log.read_text().count("\n") < lines and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None and log.read_text().count("\n") >= lines
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 143

    @pytest.mark.slow
    def test_sigusr1_is_harmless_while_the_program_starts(self, begin, tmp_path):
        process = begin(command(tmp_path / "runs"))
        time.sleep(0.5)  # Python itself has started, torch is being imported
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and maps.exists() and "torch" not in maps.read_text():
            time.sleep(0.05)
        while process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        assert process.returncode == 0, process.stderr.read()

    def test_ctrl_c_while_the_program_starts_is_silent(self, tmp_path):
        ready = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "cwd": HERE}
        process = subprocess.Popen(command(tmp_path), stderr=subprocess.PIPE, **ready)
        while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == b"" and process.returncode == -signal.SIGINT

    def test_in_a_thread_that_is_not_the_main_one(self, tmp_path):
        status = []
        arguments = [*TINY, "--logdir", str(tmp_path / "runs")]
        thread = threading.Thread(target=lambda: status.append(main.main(arguments)))
        thread.start()
        thread.join()
        assert status == [0] and finished(tmp_path / "runs")

    def test_what_a_killed_process_left_is_removed(self, tmp_path):
        run = new_run(TINY, tmp_path)
        (run / "ckpt" / ".last.pt.1.tmp").write_bytes(b"half")
        (run / "eval").mkdir()
        (run / "eval" / ".report.html.1.tmp").write_bytes(b"of a measurement that goes on")
        assert main.main(["--resume", str(run), "--max_steps", "6"]) == 0
        assert [path.name for path in run.rglob("*.tmp")] == [".report.html.1.tmp"]


class TestPaths:
    def test_home_is_expanded_and_paths_are_remembered_from_the_root(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert main.main([*TINY, "--logdir", "~/runs", "--data_dir", "pictures"]) == 0
        (run,) = (tmp_path / "runs").iterdir()
        options = json.loads((run / "config.json").read_text())["options"]
        assert options["data_dir"] == str(tmp_path / "pictures") and options["logdir"] == str(tmp_path / "runs")
        tail = f"~/runs/{run.name}"
        assert main.main([*TINY, "--logdir", "other", "--load_ckpt", tail]) == 0
        assert main.main(["--resume", tail, "--max_steps", "6"]) == 0
        sampling = "--mode sample --gpu cpu --n_sample_steps 1 --logdir ~/samples --load_ckpt"
        assert main.main([*sampling.split(), tail]) == 0
        assert not (tmp_path / "~").exists() and len(list((tmp_path / "samples").iterdir())) == 1
        err = refused(capsys, *TINY, "--logdir", "~nobody_of_this_name/runs")
        assert err.startswith("error: --logdir ~nobody_of_this_name/runs")
        err = refused(capsys, *TINY, "--logdir", "gs://bucket/runs")
        assert "error: --logdir gs://bucket/runs is not on this machine" in err and not (tmp_path / "gs:").exists()

    def test_an_error_says_that_a_path_comes_from_the_checkpoint(self, tmp_path, monkeypatch, capsys):
        write_pngs(tmp_path / "pictures", "a", "b", n=20)
        monkeypatch.chdir(tmp_path)
        run = new_run(TINY, tmp_path / "runs", *"--dataset folder --data_dir pictures --n_valid 4".split())
        (tmp_path / "pictures").rename(tmp_path / "moved")
        more = ["--resume", str(run), "--max_steps", "9"]
        for arguments in (more, ["--mode", "test", "--load_ckpt", run, "--gpu", "cpu"]):
            own = "No such file or directory (by default that of --resume or, outside training, --load_ckpt)"
            assert own in refused(capsys, *arguments)
        assert main.main([*more, "--data_dir", str(tmp_path / "moved")]) == 0
