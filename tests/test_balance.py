"""A warning where chains do not keep up with the loss, on the terminal, in the log and at the end."""

import os
import signal

import pytest
from small_runs import at_step, metrics, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from logger.metrics_log import Balance

PLAIN = "--batch_size 32 --warmup_steps 10 --ema 0 --dropout_rate 0 --sample_every 1000".split()


@pytest.mark.parametrize(
    "auroc, warned, words",
    [
        ([0.96] * 9, [], ""),
        ([0.96] * 25, [100], "chains do not reach"),
        ([0.04] * 10, [100], "chains climb faster"),
        ([0.5, 0.5] + [0.96] * 9 + [0.94] + [0.96] * 9, [], ""),
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
        assert words in balance.warning and bool(balance.warning) == bool(warned)


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
