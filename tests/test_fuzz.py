"""Whatever the command line holds, the program ends with a status and at most one line, never with a traceback."""

from dataclasses import fields
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main
from config import Config
from config.cli import option_names

OPTIONS = [f for f in fields(Config) if f.name not in ("mode", "gpu")]
SWITCHES = [[name + end] for f in OPTIONS if f.type is bool for name in option_names(f) for end in ("", "=True")]
NAMES = [f"--{f.name}" for f in OPTIONS if f.type is not bool]
OLD = str(Path(__file__).parent / "files" / "format_2.pt")  # a checkpoint of digits
WORDS = "0 1 -1 2 4 10 nan inf -inf 1e400 0.5 auto off digits folder all cpu .. /dev/null /nonexistent/x é"
WORDS = [*WORDS.split(), "", "\x00", "9" * 21]
VALUES = st.one_of(st.sampled_from(WORDS), st.text(max_size=8), st.integers().map(str), st.floats().map(str))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(["energy_train", "baseline_train", "test", "sample", "export", "fly"]),
    options=st.lists(st.tuples(st.sampled_from(NAMES), VALUES) | st.sampled_from(SWITCHES), max_size=3),
    stray=st.sampled_from([True, *[False] * 9]),
)
def test_no_command_line_ends_in_a_traceback(mode, options, stray, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A command that is right does little: the last of equal options counts.
    little = {
        "test": f"--load_ckpt {OLD} --eval classification --max_images 20",
        "sample": f"--load_ckpt {OLD} --n_samples 10 --n_sample_steps 1",
        "export": f"--load_ckpt {OLD} --export weights.pt",
    }
    train = "--dataset digits --depth 10 --width 1 --batch_size 8 --buffer_size 20 --sgld_step 1 --max_steps 1"
    chosen = [part for option in options for part in option]
    arguments = ["--mode", mode, "--gpu", "cpu", *chosen, *little.get(mode, train).split()]
    try:
        status = main.main([*arguments, *(["stray"] if stray else [])])
    except SystemExit as stop:  # --help
        status = stop.code
    captured = capsys.readouterr()
    assert status in (0, 2) or (status == 1 and "failed: " in captured.err)  # it may diverge again and again
    assert "Traceback" not in captured.err
    if status == 2:
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and captured.err.splitlines()[-1] == lines[0]
