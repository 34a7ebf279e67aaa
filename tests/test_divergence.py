"""Runs that diverge go back, change their settings, and end well; those out of balance are warned of.

``SURVIVAL_FAULTS=100 python -m pytest tests/test_divergence.py`` is the long form.
"""

import json
import math
import os
import random
import signal
from unittest.mock import Mock

import pytest
import torch
from small_runs import HARSH, at_step, equal, metrics, start, state, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import divergence
import main
import trainer
from logger.metrics_log import Balance

FAULTS = int(os.environ.get("SURVIVAL_FAULTS", 3))


pytestmark = pytest.mark.usefixtures("undisturbed")


def nan_gradients(run):
    for p in run.model.parameters():  # what an update with NaN gradients leaves
        p.data.fill_(math.nan)


def huge_step(run):
    for p in run.model.parameters():  # what one update at a learning rate of 1e10 leaves
        p.data.add_(torch.randn_like(p), alpha=1e10)


def runaway_energy(run):
    run.model.class_output.weight.data.mul_(1e6)


FAULT_KINDS = (nan_gradients, huge_step, runaway_energy)


class TestDivergence:
    @pytest.mark.parametrize("i", range(FAULTS))
    def test_injected_faults_are_survived(self, i, tmp_path, monkeypatch, capsys):
        rng = random.Random(i)
        fault = FAULT_KINDS[i % len(FAULT_KINDS)]
        monkeypatch.setattr(divergence, "STATE_EVERY", 10)
        injected = at_step(monkeypatch, rng.randint(1, 33), fault)
        status, run = start(tmp_path, "--seed", str(i))
        end = state(run)
        assert injected and status == 0 and end["step"] == 34
        assert all(t.isfinite().all() for t in end["model"].values())
        assert end["buffer"]["images"].isfinite().all()
        events = [line for line in metrics(run) if "event" in line]
        assert end["recovery"]["recoveries"] == len(events) == 1
        steps = [line["step"] for line in metrics(run) if "event" not in line]
        assert steps == sorted(set(steps)) and steps[-1] == 34
        last = metrics(run)[-1]
        assert math.isfinite(last["loss/total"]) and abs(last["loss/generative"]) < 1e3
        assert "diverged at step" in capsys.readouterr().out
        board = EventAccumulator(str(run))
        board.Reload()
        assert "event/recovery/text_summary" in board.Tags()["tensors"]

    def test_a_snapshot_is_good_only_when_training_went_on_well(self, tmp_path, monkeypatch, undisturbed):
        """Ill weights that pass the check of step 20 are in its snapshot: the run goes on from step 10 instead."""
        monkeypatch.setattr(divergence, "STATE_EVERY", 10)
        at_step(monkeypatch, 20, huge_step)
        status, run = start(tmp_path)
        (event,) = [line for line in metrics(run) if "event" in line]
        assert status == 0 and "back to step 10" in event["message"]
        assert not equal(state(run)["model"], state(undisturbed)["model"])

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
        remedies = ["new randomness", "2 times the SGLD steps", "learning rate x 0.5", "energy_l2 0.1"]
        for message, words in zip(messages, [*remedies, "learning rate x 0.25"], strict=True):
            assert "diverged at step 10; back to step 0" in message and words in message
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("failed: ") and "--sgld_step" in err and "--lr" in err

    def test_a_divergence_soon_after_another_calls_for_a_remedy_and_a_late_one_does_not(self, tmp_path, monkeypatch):
        monkeypatch.setattr(divergence, "STATE_EVERY", 2)  # soon: within 10 steps
        for step in (10, 20, 34):
            at_step(monkeypatch, step, lambda run: run.diverged.fill_(True))
        _, run = start(tmp_path)
        messages = [line["message"] for line in metrics(run) if "event" in line]
        assert len(messages) == 3 and "2 times the SGLD steps" in messages[1]
        assert "new randomness" in messages[0] and "new randomness" in messages[2]

    def test_what_a_recovery_changes_and_remembers(self):
        def changes(**options):
            recovery = divergence.Recovery(main.Config(**options))
            return [recovery.go_back(step)[1].partition(" (")[0] for step in (1, 2, 3, 4)], recovery.remedies

        rates = [f"learning rate x {rate}" for rate in (0.5, 0.25, 0.125)]
        assert changes(mode="baseline_train")[0] == ["new randomness", *rates]
        assert changes(recipe="dat", sgld_step=10)[0][1] == rates[0]  # whose chains grow by themselves
        assert changes(energy_l2=0.5)[1]["energy_l2"] == 0.5
        one = divergence.Recovery(main.Config())
        for step in range(3):
            one.keep({"step": step})
        assert one.go_back(5000)[0] == {"step": 1}
        one.keep({"step": 4})  # on the way to the next divergence
        for step in (5500, 5600):
            resumed = divergence.Recovery(main.Config())
            resumed.load_state_dict(one.state_dict())
            (state, change), (_, same) = one.go_back(step), resumed.go_back(step)
            assert state == {"step": 1} and change == same
        assert resumed.remedies["sgld_step_factor"] == 2

    def test_each_recovery_has_new_randomness_and_is_on_disk(self):
        run, seeds = trained(1), []
        run.logger, run.checkpoint, run.rng.seed = Mock(), Mock(), seeds.append
        run.recovery.keep(run.state_dict())
        run.recover()
        run.recover()
        assert seeds == [1_000_004, 2_000_007] and run.checkpoint.call_args.args == ("last.pt",)

    @pytest.mark.parametrize("gap", [-2.0, 0.5, 2.0])
    @pytest.mark.parametrize("part", ["loss/generative", "loss/total", "gradient_norm"])
    def test_a_gap_of_either_sign_and_what_is_not_finite_is_a_divergence(self, part, gap):
        run = trained(0, diverge_threshold=1.0, mode="energy_train" if "generative" in part else "baseline_train")
        wrong = torch.tensor(gap if "generative" in part else {-2.0: -math.inf, 0.5: 9.0, 2.0: math.nan}[gap])
        backward, wrongs = run.loss_and_gradient, iter([{part: wrong}])
        run.loss_and_gradient = lambda *a, **k: backward(*a, **k) | next(wrongs, {})
        for run.step in (1, 2):
            run.training_step()
        assert run.diverged == (abs(gap) > 1)

    def test_a_divergence_of_another_process_counts(self, tmp_path, monkeypatch):
        others = iter([0, 1, *[0] * 99])  # what the other processes have seen, each time that they are asked
        monkeypatch.setattr(trainer.distributed, "all_reduce_sum", lambda x: x if x.ndim else x + next(others))
        _, run = start(tmp_path)
        assert len([line for line in metrics(run) if "event" in line]) == 1

    def test_remedies_act(self, monkeypatch):
        seen, original = [], trainer.SGLD.__call__
        monkeypatch.setattr(trainer.SGLD, "__call__", lambda self, x, n, *a: seen.append(n) or original(self, x, n, *a))
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

    @pytest.mark.parametrize("norm, value", [("none", math.nan), ("batch", math.inf)])
    @pytest.mark.parametrize("weights", [{}, {"p_x_weight": 0.0, "p_x_y_weight": 0.5, "class_cond": True}])
    def test_an_image_that_is_not_finite_is_noticed_in_the_step_that_draws_it(self, norm, value, weights):
        run = trained(0, norm=norm, batch_size=16, buffer_size=20, reinit_freq=0.0, **weights)
        run.buffer.images[:10, 0, 3, 3] = value
        run.training_step()
        assert run.diverged

    @pytest.mark.slow
    def test_a_run_that_really_diverges_is_saved(self, tmp_path):
        harsh = [*HARSH, "--max_steps", "120", "--sample_every", "1000", "--seed", "3"]
        status, _ = start(tmp_path / "without", *harsh, "--max_recoveries", "0")
        assert status == 1
        status, run = start(tmp_path / "with", *harsh)
        assert status == 0 and state(run)["recovery"]["recoveries"] >= 1
        assert metrics(run)[-1]["accuracy/test"] > 0.5  # by chance 0.1; how far a run comes depends on its seed

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
        Killed, original = type("Killed", (BaseException,), {}), trainer.Trainer.checkpoint

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
        status, run = start(tmp_path, *"--norm batch --ema 0.9 --max_steps 17 --ckpt_every 5".split())
        events = [line for line in metrics(run) if "event" in line]
        assert status == 0 and len(events) == 1
        assert seen[0] == 0 and min(seen[1:]) > 0  # of the first step's weights there is nothing to estimate yet

    def test_the_best_score_outlives_a_recovery(self, tmp_path, monkeypatch):
        scores = iter([0.9, 1.0, 0.5, 1.0, 0.5, 1.0])  # of validation and test images, in turn
        monkeypatch.setattr(trainer, "accuracy", lambda *_: next(scores))
        at_step(monkeypatch, 15, nan_gradients)
        _, run = start(tmp_path, "--max_steps", "25")
        assert state(run)["recovery"]["recoveries"] == 1 and state(run)["best"] == {"best.pt": 0.9}
        assert state(run, "best.pt")["step"] == 13
        options = "--mode test --eval classification --max_images 20 --gpu cpu --load_ckpt".split()
        assert main.main([*options, str(run / "ckpt" / "best.pt")]) == 0
        assert main.main([*options, str(run)]) == 0
        before, after = (json.loads((run / name / "results.json").read_text())["about"] for name in ("eval", "eval-2"))
        assert "divergences" not in before
        assert after["divergences"] == "1; training went on with new randomness"


PLAIN = "--batch_size 32 --warmup_steps 10 --ema 0 --dropout_rate 0 --sample_every 1000".split()


@pytest.mark.parametrize(
    "auroc, warned, words",
    [
        ([0.96] * 9, [], ""),
        ([0.96] * 25, [100], "chains do not reach"),
        ([0.04] * 10, [100], "chains climb faster"),
        ([0.5, 0.5] + [0.96] * 9 + [0.94] + [0.96] * 9, [], ""),
        ([0.96] * 12 + [0.94], [100], ""),  # which is over at the end
        ([0.96, 0.02] * 5 + [0.5] + [1.0] * 12, [100, 210], "chains do not reach"),
        ([None] * 20, [], ""),  # not finite, or without samples
    ],
)
def test_it_is_due_after_a_hundred_steps_and_once_for_each_time(auroc, warned, words):
    log = [{"step": 10 * i, "sgld/auroc": value} for i, value in enumerate(auroc, start=1)]
    for cut in range(0, len(log), 4):  # where a run is resumed
        balance, said = Balance(log[:cut]), []
        for line in log[cut:]:
            if balance.add(line["step"], line):
                said.append(line["step"])
        assert said == [step for step in warned if step > 10 * cut]
        assert words in balance.warning and bool(balance.warning) == bool(words)


def test_a_run_out_of_balance_says_so_also_when_it_is_resumed(tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 105, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    status, run = start(tmp_path, *PLAIN, "--norm", "batch", "--max_steps", "200")
    assert status == 143 and "Warning" not in capsys.readouterr().out
    assert main.main(["--resume", str(run)]) == 0
    balanced = max(line["step"] for line in metrics(run) if line.get("sgld/auroc", 1) <= 0.95)
    (event,) = [line for line in metrics(run) if "event" in line]
    assert event["event"] == "warning" and event["step"] == balanced + 100 and 0 < balanced < 100
    out = capsys.readouterr().out
    assert out.count(event["message"]) == 2 and f"(last in balance at step {balanced})" in out.splitlines()[-1]
    board = EventAccumulator(str(run))
    board.Reload()
    (text,) = board.Tensors("event/warning/text_summary")
    assert text.step == event["step"] and text.tensor_proto.string_val[0].decode() == event["message"]
