"""What goes to TensorBoard besides numbers."""

import os

import pytest
from small_runs import hyperparameters
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from logger.metrics_log import Log
from utils import UserError


def test_options_that_are_no_utf8_are_escaped_for_tensorboard(tmp_path):
    log = Log(tmp_path, tensorboard=True)
    log.hyperparameters({"data_dir": os.fsdecode(b"caf\xe9"), "max_steps": None, "lr": 0.5})
    log.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    found = hyperparameters(board)
    assert found["data_dir"].string_value == r"caf\udce9" and found["max_steps"].string_value == "None"
    assert found["lr"].number_value == 0.5


def test_a_place_that_is_no_utf8_is_one_line(tmp_path):
    place = tmp_path / os.fsdecode(b"runs\xff")
    place.mkdir()
    with pytest.raises(UserError, match="not valid UTF-8; rename it, or give --no_log"):
        Log(place, tensorboard=True)
    Log(place, tensorboard=False).close()
