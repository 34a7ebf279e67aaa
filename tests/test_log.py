"""What goes to TensorBoard besides numbers."""

import os

import pytest

from logger.metrics_log import Log
from utils import UserError


def test_a_place_that_is_no_utf8_is_one_line(tmp_path):
    place = tmp_path / os.fsdecode(b"runs\xff")
    place.mkdir()
    with pytest.raises(UserError, match="not valid UTF-8; rename it, or give --no_log"):
        Log(place, tensorboard=True)
    Log(place, tensorboard=False).close()
