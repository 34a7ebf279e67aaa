"""Which run ``--resume`` and ``--load_ckpt`` take, and that it goes on bit for bit."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from small_runs import TINY, assert_same_run, equal, metrics, refused, signal_at_step, start, state

import main
import utils
from checkpoints.files import load_checkpoint
from config import Config
from logger.run_dir import RunDir, read_config
from optim import learning_rate

pytestmark = pytest.mark.usefixtures("undisturbed")


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory, undisturbed):
    with pytest.MonkeyPatch.context() as patch:
        signal_at_step(patch, 17)
        return start(tmp_path_factory.mktemp("stopped"))[1]


def auto(logdir, *options):
    assert main.main([*TINY, "--logdir", str(logdir), "--resume", "auto", *options]) == 0


class TestResume:
    @pytest.fixture
    def stopped(self, stopped_run, tmp_path):
        return shutil.copytree(stopped_run, tmp_path / stopped_run.name)

    def test_load_ckpt_starts_from_the_averaged_weights_and_makes_another_run(self, tmp_path, undisturbed, capsys):
        status, tuned = start(tmp_path, "--load_ckpt", str(undisturbed), "--max_steps", "1")
        first = load_checkpoint(tuned / "ckpt" / "previous.pt")["state"]
        assert equal(first["model"], state(undisturbed)["ema"]) and equal(first["ema"], state(undisturbed)["ema"])
        status, run = start(tmp_path, "--max_steps", "1", "--resume", "auto")
        assert status == 0 and "starting a new one" in capsys.readouterr().out

    def test_auto_passes_over_what_is_no_run(self, tmp_path):
        for i, foreign in enumerate(["null", "[]", '{"options": [1]}', "torn"]):
            (tmp_path / f"{i}" / "ckpt").mkdir(parents=True)
            (tmp_path / f"{i}" / "ckpt" / "last.pt").write_bytes(b"")
            (tmp_path / f"{i}" / "config.json").write_text(foreign)
        assert start(tmp_path, "--resume", "auto", "--max_steps", "1")[0] == 0
        start(tmp_path, "--resume", "auto", "--max_steps", "1", "--epochs", "9")  # a new run of a longer job

    def test_a_signal_after_the_last_step(self, tmp_path, monkeypatch):
        signal_at_step(monkeypatch, 1)
        assert start(tmp_path, "--max_steps", "1")[0] == 0

    def test_other_images_are_refused_and_auto_leaves_them_and_other_notes_alone(self, tmp_path, capsys, monkeypatch):
        digits = main.data.load("digits", n_valid=100)
        pixels = digits.train.images.clone()
        pixels[0, 0, 0, 0] += 1
        status, first = start(tmp_path, "--max_steps", "2")
        others = replace(digits, train=replace(digits.train, images=pixels))
        monkeypatch.setattr(main.data, "load", lambda *_: others)
        assert "--data_dir" in refused(capsys, "--resume", first)
        status, second = start(tmp_path, "--max_steps", "2", "--resume", "auto")
        assert status == 0 and f"Skipping {first}" in capsys.readouterr().out
        status, third = start(tmp_path, "--max_steps", "2", "--resume", "auto", "--note", "mine")
        assert status == 0 and third.name.endswith("_mine")
        auto(tmp_path, "--max_steps", "2")
        assert f"{second} is finished" in capsys.readouterr().out

    def test_auto_leaves_runs_of_another_length_alone(self, stopped, tmp_path, undisturbed, capsys):
        """A sweep over --max_steps: the short run stays as it is; the long one goes on, though an option is newer."""
        content = json.loads((stopped / "config.json").read_text())
        del content["options"]["no_flip"]
        (stopped / "config.json").write_text(json.dumps(content))
        status, short = start(tmp_path, "--max_steps", "3", "--resume", "auto")
        assert status == 0 and "starting a new one" in capsys.readouterr().out
        auto(tmp_path)
        assert_same_run(stopped, undisturbed)
        auto(tmp_path, "--max_steps", "3")
        assert f"3 steps; --resume {short} with a larger" in capsys.readouterr().out and state(short)["step"] == 3

    def test_auto_goes_by_when_a_run_was_saved_not_by_its_name(self, stopped, tmp_path, undisturbed, capsys):
        copy = shutil.copytree(stopped, tmp_path / "zz_copy_of_an_hour_ago")
        content = load_checkpoint(copy / "ckpt" / "last.pt")
        torch.save(content | {"config": content["config"] | {"data_device": "cpu"}}, stopped / "ckpt" / "last.pt")
        torch.save(content | {"time": content["time"] - 3600}, copy / "ckpt" / "last.pt")
        (tmp_path / "zz_latest").symlink_to(copy, target_is_directory=True)
        auto(tmp_path)
        assert read_config(stopped)["options"]["data_device"] == "auto"  # where its images are now
        assert f"--resume auto takes {stopped}, which was saved last after step 17" in capsys.readouterr().out
        assert_same_run(stopped, undisturbed)

    def test_equal_jobs_that_were_stopped_each_find_a_run(self, stopped, tmp_path, undisturbed, capsys):
        other, holder = shutil.copytree(stopped, tmp_path / "other"), RunDir.of(str(stopped))
        auto(tmp_path)
        auto(tmp_path)
        out = capsys.readouterr().out
        assert f"Skipping {stopped}: {stopped} is in use" in out and f"{other} is finished" in out
        holder.lock.release()
        auto(tmp_path)
        for run in (stopped, other):
            assert_same_run(run, undisturbed)

    def test_auto_starts_from_weights_or_goes_on(self, tmp_path, undisturbed, monkeypatch, capsys):
        options = ["--load_ckpt", str(undisturbed), *"--max_steps 6 --warmup_steps 6 --resume auto".split()]
        signal_at_step(monkeypatch, 3)
        status, run = start(tmp_path, *options)
        out = capsys.readouterr().out
        assert status == 143 and "Starting from the averaged weights" in out and "all steps are warm-up" in out
        auto(tmp_path, *options)
        assert "continuing after step 3" in " ".join(capsys.readouterr().out.split()) and state(run)["step"] == 6

    def test_what_came_after_the_checkpoint_is_superseded(self, tmp_path, undisturbed):
        run = shutil.copytree(undisturbed, tmp_path / "run")
        os.replace(run / "ckpt" / "previous.pt", run / "ckpt" / "last.pt")  # the one of step 26
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 35, "loss/to')
        assert main.main(["--resume", str(run)]) == 0
        assert_same_run(run, undisturbed)

    def test_more_steps_continue_a_finished_run_on_the_longer_schedule(self, tmp_path, undisturbed):
        run = shutil.copytree(undisturbed, tmp_path / "run")
        assert main.main(["--resume", str(run), "--max_steps", "45"]) == 0
        lr = {line["step"]: line["lr"] for line in metrics(run) if "lr" in line}
        assert lr[34] == pytest.approx(1e-6) and lr[40] == learning_rate(Config(lr=1e-3, warmup_steps=2), 40, 17, 45)
        assert state(run)["step"] == 45 and lr[45] == pytest.approx(1e-6)
        assert json.loads((run / "config.json").read_text())["options"]["max_steps"] == 45
        steps = [line["step"] for line in metrics(run)]
        assert steps == sorted(set(steps)) and steps[-1] == 45

    fixed = "width 2,dataset mnist,lr 0.5,norm batch,no_flip,mode baseline_train,seed 2,sigma 1,precision bf16"

    @pytest.mark.parametrize("option", fixed.split(","))
    def test_another_run_is_refused(self, option, stopped, capsys):
        before = (stopped / "ckpt" / "last.pt").read_bytes()
        err = refused(capsys, "--resume", stopped, *f"--{option}".split())
        assert f"--{option}".split()[0] in err and "needs a new run" in err
        assert (stopped / "ckpt" / "last.pt").read_bytes() == before

    def test_dumps_may_change(self, stopped, undisturbed):
        options = "--sample_every 7 --gif_every 9 --no_log --max_recoveries 3 --compile off".split()
        assert main.main(["--resume", str(stopped), *options]) == 0
        assert equal(state(stopped), state(undisturbed))

    @pytest.mark.parametrize("damage", ["flip", "remove"])
    def test_a_broken_last_checkpoint_costs_the_steps_since_the_one_before(self, damage, stopped, undisturbed, capsys):
        last, aside = stopped / "ckpt" / "last.pt", stopped / "ckpt" / "last.pt_set_aside"
        content = bytearray(last.read_bytes())
        last.unlink()
        aside.write_bytes(b"earlier")
        if damage == "flip":
            content[len(content) // 2] ^= 4
            last.write_bytes(content)
        assert main.main(["--resume", str(stopped)]) == 0
        warning = capsys.readouterr().err
        if damage == "flip":
            assert "last.pt" in warning and "previous.pt instead" in warning
            assert aside.with_name("last.pt_set_aside-2").read_bytes() == content
        assert aside.read_bytes() == b"earlier"
        assert_same_run(stopped, undisturbed)

    @pytest.mark.parametrize(
        "error, words",
        [
            (OSError(errno.EIO, "Input/output error"), "cannot read"),
            (RuntimeError("can't allocate memory"), "not enough memory"),
            ({"format": 99}, "format 99, which this version does not know"),
        ],
    )
    def test_a_checkpoint_that_is_whole_is_not_set_aside(self, error, words, stopped, monkeypatch, capsys):
        last, original = stopped / "ckpt" / "last.pt", torch.load

        def failing(path, **options):
            if Path(path).name == "last.pt" and isinstance(error, Exception):
                raise error
            content = original(path, **options)
            return content | error if Path(path).name == "last.pt" else content

        whole = last.read_bytes()
        monkeypatch.setattr(torch, "load", failing)
        assert words in refused(capsys, "--resume", stopped)
        assert last.read_bytes() == whole

    def test_an_earlier_checkpoint_by_name_leaves_the_later_one(self, stopped, undisturbed, monkeypatch, capsys):
        """In a file system without locks."""
        unsupported, later = OSError(errno.EOPNOTSUPP, "Not supported"), (stopped / "ckpt" / "last.pt").read_bytes()
        monkeypatch.setattr("fcntl.flock", Mock(side_effect=unsupported))
        monkeypatch.chdir(stopped / "ckpt")
        assert main.main(["--resume", "previous.pt"]) == 0 and "cannot be locked (" in capsys.readouterr().err
        assert_same_run(stopped, undisturbed)
        assert (stopped / "ckpt" / "last.pt_set_aside").read_bytes() == later
        assert not [path.name for path in stopped.glob("lock?*")]

    def test_other_files_are_refused(self, stopped, capsys):
        for place in (stopped / "ckpt" / "best.pt", "x" * 300, stopped / "config.json", stopped.parent):
            err = refused(capsys, "--resume", place)
            assert "--resume takes a run directory, or its last.pt or previous.pt, not" in err
        for name in ("last.pt", "previous.pt"):
            (stopped / "ckpt" / name).write_bytes(b"broken")
        assert main.main(["--resume", str(stopped)]) == 2 and "last.pt" in capsys.readouterr().err

    def test_on_another_kind_of_device(self, stopped, undisturbed, capsys):
        path = stopped / "ckpt" / "last.pt"
        content = load_checkpoint(path)
        rng = content["state"]["rng"]
        rng |= {name: rng[name][:16].clone() for name in ("data", "sgld")}
        del content["data"]["some_training_images"]  # as in older ones
        torch.save(content, path)
        assert main.main(["--resume", str(stopped)]) == 0
        assert "another kind of device" in capsys.readouterr().out
        assert state(stopped)["step"] == 34 and not equal(state(stopped)["model"], state(undisturbed)["model"])

    def test_other_arithmetic_is_said_and_recorded(self, stopped, capsys, monkeypatch):
        monkeypatch.setattr(utils, "pick_dtype", lambda *_: torch.bfloat16)  # as "auto" may on another machine
        assert main.main(["--resume", str(stopped)]) == 0
        assert "the run computed in float32 before" in capsys.readouterr().out
        assert json.loads((stopped / "config.json").read_text())["environment"]["precision"] == "bfloat16"
        assert main.main(["--resume", str(stopped), "--max_steps", "35"]) == 0
        before = json.loads((stopped / "config.json").read_text())["environments_before"]
        assert [environment["precision"] for environment in before] == ["float32", "bfloat16"]

    def test_only_the_best_weights_were_kept(self, undisturbed, tmp_path, capsys):
        run = shutil.copytree(undisturbed, tmp_path / "runs" / "kept")
        for name in ("last.pt", "previous.pt"):
            (run / "ckpt" / name).unlink()
        sample = ["--mode", "sample", "--load_ckpt", str(run), "--n_samples", "2", "--n_sample_steps", "1"]
        assert main.main([*sample, "--gpu", "cpu", "--logdir", str(tmp_path)]) == 0
        other = "is of another program or version, or only weights"
        assert f"best.pt {other}" in refused(capsys, "--resume", run)
        older = load_checkpoint(undisturbed / "ckpt" / "last.pt") | {"format": 3}
        for content in ({"f.conv1.weight": torch.zeros(2)}, older):  # another program's, another version's
            torch.save(content, run / "ckpt" / "last.pt")
            assert f"last.pt {other}" in refused(capsys, "--resume", run)
        (run / "ckpt" / "last.pt").unlink()
        auto(tmp_path / "runs", "--max_steps", "35")
        assert "starting a new one" in capsys.readouterr().out
