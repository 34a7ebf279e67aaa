"""The examples of docs/extending.md, pasted into a copy of the program and used from the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from logger.metrics_log import read_log

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
SMALL = "--gpu cpu --batch_size 16 --buffer_size 64 --warmup_steps 2 --no_log --logdir".split()


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the program with every Python block of the page in its place."""
    copy = tmp_path_factory.mktemp("program")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py"), *ROOT.glob("evaluation/*.jinja")]:
        if path.parent.name not in ("tests", "benchmarks"):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    blocks = re.findall(r"```python\n# (at the end of )?(\S+?)(, below `([^`]+)`)?\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 8
    for at_the_end, name, below, line, code in blocks:
        assert (copy / name).exists() == bool(at_the_end or below)
        before, found, after = (copy / name).read_text().partition(line) if below else ("", "", "")
        rest, _, after = after.partition("\n")
        with open(copy / name, "w" if below else "a") as file:
            file.write(f"{before}{found}{rest}\n{code}{after}" if below else "\n\n" + code)
    return copy


def run(program, *options):
    done = subprocess.run([sys.executable, "main.py", *map(str, options)], cwd=program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_train_and_measure(extended, tmp_path):
    train, measure = re.findall(r"^python main\.py (.*)$", PAGE, re.MULTILINE)
    out = run(extended, *train.split(), *SMALL, tmp_path)
    assert "stripes 1x8x8: 288 train, 32 valid, 80 test" in out and "CNN-1" in out and "diverged" not in out
    (run_dir,) = tmp_path.iterdir()
    options = json.loads((run_dir / "config.json").read_text())["options"]
    assert (options["recipe"], options["sgld_step"], options["start"]) == ("short-chains", 4, "gaussian")
    assert all(line["loss/center"] >= 0 for line in read_log(run_dir / "metrics.jsonl") if "loss/total" in line)
    run(extended, *measure.replace("runs/<run>", str(run_dir)).split(), "--gpu", "cpu")
    results = json.loads((run_dir / "eval" / "results.json").read_text())
    assert 0.5 <= results["confidence"]["results"]["largest probability"]["value"] <= 1


def test_the_table_names_what_is_there():
    for name, file in re.findall(r"`(\w+)` in `([\w/.]+)`", PAGE):
        assert re.search(rf"^(def )?{name}\b", (ROOT / file).read_text(), re.MULTILINE), (name, file)


def test_links_of_all_pages_lead_somewhere():
    pages = {page: page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    titles = {page: re.findall("^#+ (.*)", text.lower(), re.MULTILINE) for page, text in pages.items()}
    anchors = {page: [re.sub(r"[^\w -]", "", x).replace(" ", "-") for x in found] for page, found in titles.items()}
    for page, text in pages.items():
        for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            target = (page.parent / file).resolve() if file else page
            assert target.exists() and (not anchor or anchor in anchors[target]), f"{page.name}: {file}#{anchor}"
