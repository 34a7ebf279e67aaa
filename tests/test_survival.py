"""Runs that are stopped, killed, corrupted or diverging end where the undisturbed run ends.

``SURVIVAL_KILLS=20 SURVIVAL_FAULTS=100 python -m pytest tests/test_survival.py`` is the long form.
"""

import dataclasses
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import divergence
import main
import trainer
from checkpoints.files import load_checkpoint
from logger import images, run_logger
from logger.files import Writer
from logger.metrics_log import read_log
from logger.run_dir import RunDir
from utils import TrainingFailed

KILLS = int(os.environ.get("SURVIVAL_KILLS", 1))
FAULTS = int(os.environ.get("SURVIVAL_FAULTS", 8))

TINY = (  # 13 steps an epoch
    "--dataset digits --gpu cpu --depth 10 --width 1 --batch_size 100 --sgld_step 2 --buffer_size 200 --n_valid 100 "
    "--warmup_steps 2 --precision fp32 --dropout_rate 0.1 --ema 0.9 --lr 1e-3 --sample_every 5 --gif_every 1000 "
    "--max_steps 34"
).split()
HARSH = "--lr 0.1 --optimizer sgd --sgld_step 1 --ema 0 --dropout_rate 0".split()  # under which training diverges


def start(logdir, *options):
    """A new run; returns the exit status and the run directory."""
    before = set(logdir.glob("*"))
    status = main.main([*TINY, "--logdir", str(logdir), *options])
    (run,) = set(logdir.glob("*")) - before
    return status, run


def state(run, name="last.pt"):
    return load_checkpoint(run / "ckpt" / name)["state"]


def metrics(run):
    """The lines of the log without the speed, which is no two times the same."""
    lines = read_log(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


def equal(one, two):
    match one:
        case torch.Tensor():
            return torch.equal(one, two)
        case dict():
            return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
        case list() | tuple():
            return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def assert_same_run(one, two):
    assert equal(state(one), state(two))
    assert equal(state(one, "best.pt"), state(two, "best.pt"))
    assert metrics(one) == metrics(two)
    for part in ("samples", "sgld"):
        ours, theirs = ({p.name: p.read_bytes() for p in run.glob(f"{part}/*")} for run in (one, two))
        assert ours == theirs
    assert scalars(one) == scalars(two)


def scalars(run):
    """(tag, step) -> value of TensorBoard's scalars; a step that came twice would be there twice."""
    board = EventAccumulator(str(run), size_guidance={"scalars": 0})
    board.Reload()
    return {
        tag: [(e.step, e.value) for e in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
        if not tag.startswith("speed/")
    }


@pytest.fixture(scope="module", autouse=True)
def short_epochs():
    """Each of the 13 steps long epochs ends with an evaluation and a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "MIN_EPOCH", 1)
        patch.setattr(run_logger, "plot_curves", lambda run: None)  # two pictures at each evaluation
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, short_epochs):
    status, run = start(tmp_path_factory.mktemp("undisturbed"))
    assert status == 0
    return run


def other_images(images):
    """The same numbers of images, of which one has another pixel."""
    changed = images.train.images.clone()
    changed[0, 0, 0, 0] += 1
    return dataclasses.replace(images, train=dataclasses.replace(images.train, images=changed))


def at_step(monkeypatch, step, action):
    """Call ``action(trainer)`` once, after the update of ``step``."""
    original, done = trainer.Trainer.training_step, []

    def patched(self):
        samples = original(self)
        if self.step == step and not done:
            done.append(True)
            action(self)
        return samples

    monkeypatch.setattr(trainer.Trainer, "training_step", patched)
    return done


def recorded_checkpoints(monkeypatch):
    """The names and steps of the checkpoints that are written from now on."""
    saved, write = [], run_logger.RunLogger.write_checkpoint
    monkeypatch.setattr(
        run_logger.RunLogger,
        "write_checkpoint",
        lambda self, name, content: (saved.append((name, content["state"]["step"])), write(self, name, content)),
    )
    return saved


class TestSignals:
    @pytest.mark.parametrize(
        "number, status, step",
        [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 17), (signal.SIGINT, 130, 26)],
    )
    def test_stop_and_resume_is_bit_for_bit(self, number, status, step, tmp_path, monkeypatch, undisturbed):
        at_step(monkeypatch, step, lambda _: os.kill(os.getpid(), number))
        before = signal.getsignal(number)
        stopped, run = start(tmp_path)
        assert stopped == status and state(run)["step"] == step
        assert main.main(["--resume", str(run)]) == 0
        assert_same_run(run, undisturbed)
        assert signal.getsignal(number) == before

    def test_sigusr1_saves_and_goes_on(self, tmp_path, monkeypatch, undisturbed):
        saved = recorded_checkpoints(monkeypatch)
        at_step(monkeypatch, 8, lambda _: os.kill(os.getpid(), signal.SIGUSR1))
        status, run = start(tmp_path)
        assert status == 0 and ("last.pt", 8) in saved and ("last.pt", 7) not in saved
        assert_same_run(run, undisturbed)

    @pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
    def test_between_the_update_and_the_checkpoint(self, number, status, tmp_path, monkeypatch, undisturbed):
        """A signal while step 20 is logged, when it is too late for a checkpoint of that step."""
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

    def test_second_ctrl_c_stops_at_once(self, tmp_path, monkeypatch):
        def twice(_):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        at_step(monkeypatch, 3, twice)
        status, run = start(tmp_path)
        assert status == 130 and state(run)["step"] == 0  # no checkpoint since the first


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory, short_epochs):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 17, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        return start(tmp_path_factory.mktemp("stopped"))[1]


class TestResume:
    @pytest.fixture
    def stopped(self, stopped_run, tmp_path):
        return shutil.copytree(stopped_run, tmp_path / stopped_run.name)

    def test_auto_takes_the_newest_run_with_the_same_configuration(self, stopped, tmp_path, undisturbed, capsys):
        start(tmp_path, "--seed", "5", "--max_steps", "3")  # newer, but another run
        assert main.main([*TINY, "--logdir", str(tmp_path), "--resume", "auto"]) == 0
        assert_same_run(stopped, undisturbed)

    def test_auto_leaves_a_run_that_started_from_other_weights(self, tmp_path, undisturbed, capsys):
        status, tuned = start(tmp_path, "--load_ckpt", str(undisturbed), "--max_steps", "2")
        assert main.main(["--resume", str(tuned), "--max_steps", "3"]) == 0
        before = (tuned / "ckpt" / "last.pt").read_bytes()
        status, run = start(tmp_path, "--max_steps", "3", "--resume", "auto")
        assert status == 0 and "starting a new one" in capsys.readouterr().out
        assert (tuned / "ckpt" / "last.pt").read_bytes() == before

    @pytest.mark.parametrize("foreign", ["null", "[]", '{"options": [1]}', "torn"])
    def test_auto_passes_over_what_is_no_run(self, foreign, tmp_path, capsys):
        (tmp_path / "other" / "ckpt").mkdir(parents=True)
        (tmp_path / "other" / "ckpt" / "last.pt").write_bytes(b"")
        (tmp_path / "other" / "config.json").write_text(foreign)
        assert start(tmp_path, "--resume", "auto", "--max_steps", "1")[0] == 0

    def test_auto_knows_a_run_that_is_older_than_an_option(self, stopped, tmp_path, undisturbed):
        content = json.loads((stopped / "config.json").read_text())
        del content["options"]["no_flip"]
        (stopped / "config.json").write_text(json.dumps(content))
        assert main.main([*TINY, "--logdir", str(tmp_path), "--resume", "auto"]) == 0
        assert_same_run(stopped, undisturbed)

    def test_auto_starts_a_new_run_if_there_is_none(self, tmp_path, undisturbed, capsys):
        status, run = start(tmp_path, "--resume", "auto")
        assert status == 0 and "starting a new one" in capsys.readouterr().out
        assert equal(state(run), state(undisturbed))

    def test_auto_leaves_other_images_and_other_notes_alone(self, tmp_path, capsys, monkeypatch):
        """As in cross-validation: the same options, another fold."""
        original = main.data.load
        status, first = start(tmp_path, "--max_steps", "2")
        monkeypatch.setattr(main.data, "load", lambda *a: other_images(original(*a)))
        status, second = start(tmp_path, "--max_steps", "2", "--resume", "auto")
        assert status == 0 and f"Skipping {first}" in capsys.readouterr().out
        status, third = start(tmp_path, "--max_steps", "2", "--resume", "auto", "--note", "mine")
        assert status == 0 and third.name.endswith("_mine")
        assert main.main([*TINY, "--logdir", str(tmp_path), "--max_steps", "2", "--resume", "auto"]) == 0
        assert f"{second} is finished" in capsys.readouterr().out

    def test_auto_leaves_runs_of_another_length_alone(self, stopped, tmp_path, undisturbed, capsys):
        """A sweep over --max_steps: the short run is neither made longer nor lost, the long one goes on."""
        status, short = start(tmp_path, "--max_steps", "3", "--resume", "auto")
        assert status == 0 and "starting a new one" in capsys.readouterr().out
        assert main.main([*TINY, "--logdir", str(tmp_path), "--resume", "auto"]) == 0
        assert_same_run(stopped, undisturbed)
        assert main.main([*TINY, "--logdir", str(tmp_path), "--max_steps", "3", "--resume", "auto"]) == 0
        assert f"{short} is finished after 3 steps" in capsys.readouterr().out and state(short)["step"] == 3

    def test_auto_goes_by_when_a_run_was_saved_not_by_its_name(self, stopped, tmp_path, undisturbed, capsys):
        copy = shutil.copytree(stopped, tmp_path / "zz_copy_of_an_hour_ago")
        content = load_checkpoint(copy / "ckpt" / "last.pt")
        torch.save(content | {"time": content["time"] - 3600}, copy / "ckpt" / "last.pt")
        (tmp_path / "zz_latest").symlink_to(copy, target_is_directory=True)
        assert main.main([*TINY, "--logdir", str(tmp_path), "--resume", "auto"]) == 0
        assert f"--resume auto takes {stopped}, which was saved last after step 17" in capsys.readouterr().out
        assert_same_run(stopped, undisturbed)

    def test_equal_jobs_that_were_stopped_each_find_a_run(self, stopped, tmp_path, undisturbed, capsys):
        """One in use is passed over, a finished one comes after those that are not."""
        other = shutil.copytree(stopped, tmp_path / "other")
        command = [*TINY, "--logdir", str(tmp_path), "--resume", "auto"]
        holder = RunDir.of(str(stopped))
        assert main.main(command) == 0 and main.main(command) == 0
        out = capsys.readouterr().out
        assert f"Skipping {stopped}: {stopped} is in use" in out and f"{other} is finished" in out
        holder.lock.release()
        assert main.main(command) == 0
        for run in (stopped, other):
            assert_same_run(run, undisturbed)

    def test_auto_starts_from_weights_or_goes_on(self, tmp_path, undisturbed, monkeypatch, capsys):
        """One command line for fine-tuning on a machine that may be taken away."""
        options = ["--load_ckpt", str(undisturbed), "--max_steps", "6", "--resume", "auto"]
        at_step(monkeypatch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        status, run = start(tmp_path, *options)
        assert status == 143 and "Starting from the averaged weights" in capsys.readouterr().out
        assert main.main([*TINY, "--logdir", str(tmp_path), *options]) == 0
        assert "continuing after step 3" in " ".join(capsys.readouterr().out.split())
        assert state(run)["step"] == 6

    def test_load_ckpt_starts_from_the_averaged_weights(self, tmp_path, undisturbed):
        """Those that were measured, as everywhere else."""
        status, run = start(tmp_path, "--load_ckpt", str(undisturbed), "--max_steps", "1")
        first = load_checkpoint(run / "ckpt" / "previous.pt")["state"]
        assert equal(first["model"], state(undisturbed)["ema"]) and equal(first["ema"], state(undisturbed)["ema"])

    def test_a_checkpoint_file(self, stopped, undisturbed):
        assert main.main(["--resume", str(stopped / "ckpt" / "last.pt")]) == 0
        assert_same_run(stopped, undisturbed)

    def test_what_came_after_the_checkpoint_is_superseded(self, tmp_path, undisturbed):
        """As after a crash: the log is ahead of the checkpoint, its last line torn."""
        run = tmp_path / "run"
        shutil.copytree(undisturbed, run)
        os.replace(run / "ckpt" / "previous.pt", run / "ckpt" / "last.pt")  # the one of step 26
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 35, "loss/to')
        assert main.main(["--resume", str(run)]) == 0
        assert_same_run(run, undisturbed)

    def test_a_finished_run_says_so(self, undisturbed, capsys):
        before = (undisturbed / "metrics.jsonl").read_bytes()
        assert main.main(["--resume", str(undisturbed)]) == 0
        assert "is finished after 34 steps; a larger --max_steps continues it" in capsys.readouterr().out
        assert (undisturbed / "metrics.jsonl").read_bytes() == before

    def test_more_steps_continue_a_finished_run_with_another_cycle(self, tmp_path, undisturbed, capsys):
        run = tmp_path / "run"
        shutil.copytree(undisturbed, run)
        assert main.main(["--resume", str(run), "--max_steps", "45"]) == 0
        assert "from step 34 the learning rate rises to its peak again" in capsys.readouterr().out
        assert state(run)["step"] == 45 and state(run)["cycle_ends"] == [34, 45]
        lr = {line["step"]: line["lr"] for line in metrics(run) if "lr" in line}
        assert lr[34] == pytest.approx(1e-6) and lr[45] == pytest.approx(1e-6) and 1e-4 < lr[40] < 1e-3
        assert json.loads((run / "config.json").read_text())["options"]["max_steps"] == 45
        steps = [line["step"] for line in metrics(run)]
        assert steps == sorted(set(steps)) and steps[-1] == 45

    @pytest.mark.parametrize(
        "option",
        [
            "--width 2",
            "--seed 3",
            "--dataset mnist",
            "--lr 0.5",
            "--sgld_step 3",
            "--norm batch",
            "--n_valid 90",
            "--no_flip",
            "--mode baseline_train",
        ],
    )
    def test_another_run_is_refused(self, option, stopped, capsys):
        before = (stopped / "ckpt" / "last.pt").read_bytes()
        assert main.main(["--resume", str(stopped), *option.split()]) == 2
        err = capsys.readouterr().err
        assert option.split()[0] in err.splitlines()[-1] and "needs a new run" in err
        assert (stopped / "ckpt" / "last.pt").read_bytes() == before

    def test_other_data_is_refused(self, stopped, monkeypatch, capsys):
        original = main.data.load
        monkeypatch.setattr(main.data, "load", lambda *a: other_images(original(*a)))
        assert main.main(["--resume", str(stopped)]) == 2
        assert "--data_dir" in capsys.readouterr().err

    def test_dumps_may_change(self, stopped, undisturbed):
        assert main.main(["--resume", str(stopped), "--sample_every", "7", "--gif_every", "9", "--no_log"]) == 0
        assert equal(state(stopped), state(undisturbed))

    @pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
    def test_a_file_system_without_locks(self, number, stopped, undisturbed, monkeypatch, capsys):
        def unsupported(*_):
            raise OSError(number, "Operation not supported")

        monkeypatch.setattr("fcntl.flock", unsupported)
        assert main.main(["--resume", str(stopped)]) == 0
        assert "cannot be locked (" in capsys.readouterr().err
        assert_same_run(stopped, undisturbed)
        assert not [path.name for path in stopped.glob("lock?*")]

    def test_a_run_in_use_is_refused(self, stopped, capsys):
        holder = RunDir.of(str(stopped))
        assert main.main(["--resume", str(stopped)]) == 2
        assert "in use by another running process" in capsys.readouterr().err
        holder.lock.release()
        assert main.main(["--resume", str(stopped), "--max_steps", "18"]) == 0

    @pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
    def test_a_broken_last_checkpoint_costs_the_steps_since_the_one_before(self, damage, stopped, undisturbed, capsys):
        last = stopped / "ckpt" / "last.pt"
        content = bytearray(last.read_bytes())
        match damage:
            case "truncate":
                last.write_bytes(content[:-1000])
            case "flip":
                content[len(content) // 2] ^= 4
                last.write_bytes(content)
            case "empty":
                last.write_bytes(b"")
            case "remove":
                last.unlink()
        assert main.main(["--resume", str(stopped)]) == 0
        warning = capsys.readouterr().err
        assert damage == "remove" or ("last.pt" in warning and "previous.pt instead" in warning)
        assert_same_run(stopped, undisturbed)

    @pytest.mark.parametrize(
        "error, words",
        [
            (OSError(errno.EIO, "Input/output error"), "cannot read"),
            (RuntimeError("can't allocate memory"), "not enough memory"),
            (None, "format 99, which this version does not know"),
        ],
        ids=["disk", "memory", "version"],
    )
    def test_a_checkpoint_that_is_whole_is_not_set_aside(self, error, words, stopped, monkeypatch, capsys):
        last, original = stopped / "ckpt" / "last.pt", torch.load
        if error is None:
            torch.save(original(last, weights_only=True) | {"format": 99}, last)
        whole = last.read_bytes()

        def failing(path, **options):
            if Path(path).name == "last.pt" and error:
                raise error
            return original(path, **options)

        monkeypatch.setattr(torch, "load", failing)
        assert main.main(["--resume", str(stopped)]) == 2
        assert words in capsys.readouterr().err and last.read_bytes() == whole

    def test_a_broken_last_checkpoint_is_set_aside(self, stopped):
        (stopped / "ckpt" / "last_set_aside.pt").write_bytes(b"earlier")
        (stopped / "ckpt" / "last.pt").write_bytes(b"broken")
        assert main.main(["--resume", str(stopped), "--max_steps", "15"]) == 0
        assert [state(stopped, name)["step"] for name in ("last.pt", "previous.pt")] == [15, 13]
        assert (stopped / "ckpt" / "last_set_aside.pt").read_bytes() == b"earlier"
        assert (stopped / "ckpt" / "last_set_aside-2.pt").read_bytes() == b"broken"

    def test_an_earlier_checkpoint_by_name_leaves_the_later_one(self, stopped, undisturbed):
        later = (stopped / "ckpt" / "last.pt").read_bytes()
        assert main.main(["--resume", str(stopped / "ckpt" / "previous.pt")]) == 0
        assert_same_run(stopped, undisturbed)
        assert (stopped / "ckpt" / "last_set_aside.pt").read_bytes() == later

    def test_a_relative_file(self, stopped, undisturbed, monkeypatch):
        monkeypatch.chdir(stopped / "ckpt")
        assert main.main(["--resume", "last.pt"]) == 0
        assert_same_run(stopped, undisturbed)

    def test_other_files_are_refused(self, stopped, capsys):
        for place, words in (
            (stopped / "ckpt" / "best.pt", "--load_ckpt"),
            ("x" * 300, "cannot read"),
            (stopped / "config.json", "--load_ckpt"),
            (stopped.parent, "is not a run directory"),
        ):
            assert main.main(["--resume", str(place)]) == 2
            assert words in capsys.readouterr().err

    def test_on_another_kind_of_device(self, stopped, undisturbed, capsys):
        """A checkpoint of a GPU holds 16 bytes of each generator: the run goes on, with new randomness."""
        path = stopped / "ckpt" / "last.pt"
        content = load_checkpoint(path)
        rng = content["state"]["rng"]
        rng |= {name: rng[name][:16].clone() for name in ("data", "sgld")}
        torch.save(content, path)
        assert main.main(["--resume", str(stopped)]) == 0
        assert "another kind of device" in capsys.readouterr().out
        assert state(stopped)["step"] == 34 and not equal(state(stopped)["model"], state(undisturbed)["model"])

    def test_both_checkpoints_broken(self, stopped, capsys):
        for name in ("last.pt", "previous.pt"):
            (stopped / "ckpt" / name).write_bytes(b"broken")
        assert main.main(["--resume", str(stopped)]) == 2
        assert "last.pt" in capsys.readouterr().err


class TestFullDisk:
    def test_while_saving(self, tmp_path, monkeypatch, capsys, undisturbed):
        """The disk fills up during the save at step 26: the checkpoint of step 13 stays whole and can be resumed."""
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
        """Pictures are by-products: each that fails is a warning, and the run is the same."""

        def full(path, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(images, "replace_file", full)
        status, run = start(tmp_path)
        assert status == 0 and "Warning: " in capsys.readouterr().err
        assert equal(state(run), state(undisturbed)) and not list(run.glob("samples/*.png"))

    @pytest.mark.parametrize("option", ["", "--no_log"])
    @pytest.mark.parametrize("room", [1000, 20_000])
    def test_while_logging(self, option, room, tmp_path):
        """Files may grow to ``room`` bytes; neither metrics.jsonl nor TensorBoard ends in a traceback."""
        program = (
            "import resource, pathlib\nfrom logger.metrics_log import Log\n"
            "from utils import UserError\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
            f"log = Log(pathlib.Path({str(tmp_path)!r}), {not option})\n"
            "try:\n"
            "    for step in range(10**5):\n"
            "        log.values(step, {'loss': 1.0})\n"
            "        if step % 100 == 0: log.flush()\n"
            "except UserError as error:\n"
            "    print(error)\n"
            "try:\n"
            "    log.close()\n"
            "except UserError:\n"
            "    pass\n"
        )
        here = Path(main.__file__).parent
        done = subprocess.run([sys.executable, "-B", "-c", program], cwd=here, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""
        assert "metrics.jsonl: File too large; free some space" in done.stdout

    def test_what_was_to_follow_a_failed_write_is_left_undone(self):
        done = []

        def fail():
            raise OSError("full")

        with pytest.raises(OSError, match="full"), Writer() as writer:
            writer.jobs.put((fail, ()))
            writer.jobs.put((done.append, (1,)))
        assert done == []


# ------------------------------------------------------------------------------------------------ divergence


def nan_gradients(run):
    for p in run.model.parameters():  # what an update with NaN gradients leaves
        p.data.fill_(math.nan)


def nan_in_buffer(run):
    run.sampler.buffer.images[::3, 0, 0, 0] = math.nan


def huge_step(run):
    for p in run.model.parameters():  # what one update at a learning rate of 1e10 leaves
        p.data.add_(torch.randn_like(p), alpha=1e10)


def runaway_energy(run):
    run.model.class_output.weight.data.mul_(1e6)


FAULT_KINDS = {
    "NaN gradients": nan_gradients,
    "NaN in the buffer": nan_in_buffer,
    "lr 1e10": huge_step,
    "runaway energy": runaway_energy,
}


class TestDivergence:
    @pytest.mark.parametrize("i", range(FAULTS))
    def test_injected_faults_are_survived(self, i, tmp_path, monkeypatch, capsys):
        rng = random.Random(i)
        name = list(FAULT_KINDS)[i % len(FAULT_KINDS)]
        monkeypatch.setattr(divergence, "STATE_EVERY", 10)
        injected = at_step(monkeypatch, rng.randint(1, 33), FAULT_KINDS[name])
        status, run = start(tmp_path, "--seed", str(i))
        end = state(run)
        assert injected and status == 0 and end["step"] == 34
        assert all(t.isfinite().all() for t in end["model"].values())
        assert end["buffer"]["images"].isfinite().all() or name == "NaN in the buffer"
        events = [line for line in metrics(run) if "event" in line]
        assert end["recovery"]["recoveries"] == len(events) == (0 if name == "NaN in the buffer" else 1)
        steps = [line["step"] for line in metrics(run) if "event" not in line]
        assert steps == sorted(set(steps)) and steps[-1] == 34
        last = metrics(run)[-1]
        assert math.isfinite(last["loss/total"]) and abs(last["loss/generative"]) < 1e3
        if events:
            assert "diverged at step" in capsys.readouterr().out
            board = EventAccumulator(str(run))
            board.Reload()
            assert "event/recovery/text_summary" in board.Tags()["tensors"]

    def test_a_snapshot_is_good_only_when_training_went_on_well(self, tmp_path, monkeypatch):
        """Ill weights that pass the check of step 20 are in the snapshot of that step; it must not be used."""
        monkeypatch.setattr(divergence, "STATE_EVERY", 10)
        at_step(monkeypatch, 20, huge_step)
        status, run = start(tmp_path)
        (event,) = [line for line in metrics(run) if "event" in line]
        assert status == 0 and "back to step 10" in event["message"]

    def test_remedies_come_in_order_and_then_the_run_fails(self, tmp_path, monkeypatch, capsys):
        original = trainer.Trainer.training_step

        def always_diverging(self):
            samples = original(self)
            self.diverged.fill_(True)
            return samples

        monkeypatch.setattr(trainer.Trainer, "training_step", always_diverging)
        status, run = start(tmp_path, "--max_recoveries", "5")
        assert status == 1
        messages = [line["message"] for line in metrics(run) if "event" in line]
        for message, words in zip(
            messages,
            [
                "new randomness",
                "2 times the SGLD steps",
                "learning rate x 0.5",
                "energy_l2 0.1",
                "learning rate x 0.25",
            ],
            strict=True,
        ):
            assert "diverged at step 10; back to step 0" in message and words in message
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("failed: ") and "--sgld_step" in err and "--lr" in err

    def test_a_divergence_soon_after_another_calls_for_a_remedy_and_a_late_one_does_not(self, tmp_path, monkeypatch):
        monkeypatch.setattr(divergence, "STATE_EVERY", 2)  # soon: within 10 steps
        for step in (10, 20, 34):
            at_step(monkeypatch, step, lambda run: run.diverged.fill_(True))
        _, run = start(tmp_path)
        messages = [line["message"] for line in metrics(run) if "event" in line]
        for message, words in zip(
            messages, ["new randomness", "2 times the SGLD steps", "new randomness"], strict=True
        ):
            assert words in message

    def test_remedies_act(self, monkeypatch):
        seen, original = [], trainer.SGLD.__call__
        monkeypatch.setattr(
            trainer.SGLD, "__call__", lambda self, x, steps, *a: (seen.append(steps), original(self, x, steps, *a))[1]
        )
        cfg = main.Config(dataset="digits", depth=10, width=1, batch_size=16, sgld_step=2, buffer_size=64)
        run = trainer.Trainer(cfg, main.data.load("digits"), torch.device("cpu"))
        run.step = 1
        before = run.lr
        run.recovery.remedies |= {"sgld_step_factor": 3, "lr_factor": 0.5, "energy_l2": 0.1}
        run.training_step()
        assert seen == [6] and run.lr == before / 2
        sums = run.meter.sums
        penalty = sums["loss/total"] - sums["loss/classification"] - sums["loss/generative"]
        assert penalty.item() == pytest.approx(0.1 * 2.3**2, rel=0.3)  # log-densities begin near log 10

    @pytest.mark.slow
    def test_a_run_that_really_diverges_is_saved(self, tmp_path):
        """A high learning rate and chains of one step: lost without recovery, a usable model with it."""
        harsh = [*HARSH, "--max_steps", "120", "--sample_every", "1000"]
        status, _ = start(tmp_path / "without", *harsh, "--max_recoveries", "0")
        assert status == 1
        status, run = start(tmp_path / "with", *harsh)
        assert status == 0 and state(run)["recovery"]["recoveries"] >= 1
        assert metrics(run)[-1]["accuracy/test"] > 0.85

    def test_a_resumed_run_goes_back_to_its_checkpoint(self, tmp_path, monkeypatch):
        """States to go back to are in memory only: after a resume the checkpoint is the first of them."""
        at_step(monkeypatch, 17, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        _, run = start(tmp_path)
        at_step(monkeypatch, 20, nan_gradients)
        assert main.main(["--resume", str(run)]) == 0
        (event,) = [line for line in metrics(run) if "event" in line]
        assert "back to step 17 with new randomness" in event["message"]

    @pytest.mark.parametrize("step, back_to", [(3, 0), (16, 13)])
    def test_killed_in_the_middle_of_a_recovery(self, step, back_to, tmp_path, monkeypatch):
        """After the recovery is logged, before its checkpoint is written."""

        class Killed(BaseException):
            pass

        original = trainer.Trainer.checkpoint

        def killed(self, name):
            if self.recovery.recoveries:
                raise Killed
            original(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "checkpoint", killed)
            at_step(patch, step, nan_gradients)
            with pytest.raises(Killed):
                start(tmp_path)
        (run,) = tmp_path.iterdir()
        assert any("event" in line for line in metrics(run)) and state(run)["recovery"]["recoveries"] == 0
        at_step(monkeypatch, step, nan_gradients)
        assert main.main(["--resume", str(run)]) == 0
        (event,) = [line for line in metrics(run) if "event" in line]
        assert f"back to step {back_to} " in event["message"] and state(run)["step"] == 34

    def test_averaged_weights_are_saved_with_statistics_of_their_own(self, tmp_path, monkeypatch):
        """The state that a recovery goes back to was kept between evaluations, when nobody had asked for them."""
        at_step(monkeypatch, 15, nan_gradients)
        seen, original = [], trainer.Trainer.checkpoint

        def checkpoint(self, name):
            seen.append(self.ema.f.bn1.running_mean.abs().max().item())
            original(self, name)

        monkeypatch.setattr(trainer.Trainer, "checkpoint", checkpoint)
        status, run = start(tmp_path, "--norm", "batch", "--ema", "0.9", "--max_steps", "17")
        events = [line for line in metrics(run) if "event" in line]
        assert status == 0 and len(events) == 1
        assert seen[0] == 0 and min(seen[1:]) > 0  # of the first step's weights there is nothing to estimate yet

    def test_the_best_score_outlives_a_recovery(self, tmp_path, monkeypatch):
        """best.pt stays on disk, so a worse model of after the recovery must not replace it."""
        scores = iter([0.9, 0.5, 0.5])
        monkeypatch.setattr(trainer.Trainer, "evaluate", lambda self: {"accuracy/valid": next(scores)})
        at_step(monkeypatch, 15, nan_gradients)
        _, run = start(tmp_path, "--max_steps", "25")
        assert (
            state(run)["recovery"]["recoveries"] == 1
            and state(run, "best.pt")["step"] == 13
            and state(run)["best"] == {"best.pt": 0.9}
        )

    def test_what_a_run_leaves_on_disk(self, undisturbed):
        """No states but the checkpoints; best.pt holds what measuring and sampling need."""
        assert {path.name for path in (undisturbed / "ckpt").iterdir()} == {"last.pt", "previous.pt", "best.pt"}
        assert {path.name for path in undisturbed.iterdir() if path.is_dir()} == {"ckpt", "samples"}
        assert state(undisturbed, "best.pt").keys() == {"step", "model", "ema"}

    def test_a_state_is_copied_once_a_step(self, tmp_path, monkeypatch):
        copied, original = [], trainer.tree_to
        monkeypatch.setattr(
            trainer,
            "tree_to",
            lambda tree, device: (copied.append(tree["step"]) if "step" in tree else None, original(tree, device))[1],
        )
        start(tmp_path)
        assert copied == sorted(set(copied)) and copied[-1] == 34

    def test_new_randomness(self, tmp_path, monkeypatch, undisturbed):
        at_step(monkeypatch, 30, nan_gradients)
        monkeypatch.setattr(divergence, "STATE_EVERY", 10)
        _, run = start(tmp_path)
        assert not equal(state(run)["model"], state(undisturbed)["model"])

    def test_training_failed_is_no_user_error(self):
        assert not issubclass(TrainingFailed, main.UserError)


# ------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], HARSH] if "SURVIVAL_KILLS" in os.environ else [[]], ids=lambda s: " ".join(s))
def test_killed_at_random_moments(settings, tmp_path, monkeypatch):
    """kill -9 and resume, again and again: the end is bit for bit the undisturbed run's.

    States to go back to after a divergence are in memory, so where training diverges, other recoveries follow.
    """
    ckpt_every = 13 if settings is HARSH else 3  # a checkpoint on the way to a divergence would be no way back
    dumps = f"--ckpt_every {ckpt_every} --sample_every 3 --gif_every 30".split()
    n_steps = 30 * (KILLS + 1)
    options = [*TINY, *settings, *dumps, "--max_steps", str(n_steps)]
    monkeypatch.setattr(divergence, "STATE_EVERY", 10)
    frequent = (
        "import sys, main, divergence, trainer; divergence.STATE_EVERY, trainer.MIN_EPOCH = 10, 1; "
        "sys.exit(main.main(sys.argv[1:]))"
    )
    program = [sys.executable, "-c", frequent]
    status, whole = start(tmp_path / "whole", *options)
    assert status == 0 and (state(whole)["recovery"]["recoveries"] > 0) == (settings is HARSH)

    killed, rng, kills = tmp_path / "killed", random.Random(0), 0
    killed.mkdir()

    def newest_save():
        with suppress(FileNotFoundError):  # renamed between the look and the stat
            return max((path.stat().st_mtime_ns for path in killed.glob("*/ckpt/last.pt")), default=0)

    while True:
        before = newest_save()
        process = subprocess.Popen(
            [*program, *options, "--logdir", str(killed), "--resume", "auto"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=Path(main.__file__).parent,
        )
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
    if settings is HARSH:
        steps = [line["step"] for line in metrics(run) if "event" not in line]
        assert steps == sorted(set(steps)) and steps[-1] == state(run)["step"] == n_steps
    else:
        assert_same_run(run, whole)
