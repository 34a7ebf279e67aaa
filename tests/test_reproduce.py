"""The named runs of benchmarks/reproduce.py."""

import os
import sys
from pathlib import Path

import pytest

import main
from benchmarks import reproduce
from config import Config
from config.cli import parse


def options(name, *further):
    return parse(reproduce.command(name, False, list(further), "there")[2:], Config)


@pytest.mark.parametrize("name", reproduce.TRAIN)
def test_every_run_has_valid_options(name):
    cfg = Config(**options(name, "--seed", "7", "--load_ckpt", "first"))
    assert (cfg.note, cfg.seed, Path(cfg.logdir).name) == (name, 7, "there")
    assert (cfg.mode == "baseline_train") == name.endswith("_baseline")


def test_a_baseline_differs_in_nothing_but_the_samples():
    for name in (name for name in reproduce.TRAIN if name.endswith("_baseline")):
        jem, plain = options(name.replace("digits_baseline", "digits_jem").removesuffix("_baseline")), options(name)
        differ = {key for key in jem.keys() | plain.keys() if jem.get(key) != plain.get(key)}
        of_samples = {"sgld_step", "buffer_size", "gif_every", "start", "p_x_batch_size", "mean_energy_l2"}
        assert differ <= {"mode", "note", "mean_energy_form", "p_x_weight"} | of_samples


def test_the_newest_run_of_a_name_is_measured(tmp_path):
    for end in ("1_train_digits", "1_train_digits-10", "1_train_digits-2", "2_train_digits_jem"):
        (tmp_path / f"2026010{end}").mkdir()
    assert reproduce.command("digits", True, [], str(tmp_path))[7].endswith("_train_digits-10")


@pytest.mark.slow
def test_train_and_measure(tmp_path, monkeypatch, capsys):

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["", "digits", "--logdir", str(tmp_path), "--gpu", "cpu", *options])
        monkeypatch.setattr(os, "execv", lambda program, line: sys.exit(main.main(line[2:])))
        with pytest.raises(SystemExit) as stop:
            reproduce.main()
        return stop.value.code, *capsys.readouterr()

    status, _, err = run("--test")
    assert status == 2 and "train it first" in err
    status, out, _ = run("--max_steps", "3", "--sgld_step", "2", "--warmup_steps", "0")
    assert status == 0 and "--max_steps 601" in out.splitlines()[0]
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("_energy_train_digits")
    status, _, _ = run("--test", "--eval", "classification", "--max_images", "50")
    assert status == 0 and (folder / "eval" / "results.json").is_file()
    assert run("--lr", "x")[0] == 2
