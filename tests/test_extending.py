"""The examples of docs/extending.md, used in a copy of the program; links of all pages; the requirements files."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
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
    assert len(blocks) == 11
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
    return done.stdout + done.stderr


def test_the_examples_train_and_measure(extended, tmp_path):
    train, measure = re.findall(r"^python main\.py (.*)$", PAGE, re.MULTILINE)
    out = run(extended, *train.split(), *SMALL, tmp_path, "--norm", "batch")
    assert "stripes 1x8x8: 288 train, 32 valid, 80 test" in out and "CNN-1" in out and "diverged" not in out
    assert out.count("does not use --norm\n") == 1  # --width and --recipe, it does
    (run_dir,) = tmp_path.iterdir()
    options = json.loads((run_dir / "config.json").read_text())["options"]
    assert (options["recipe"], options["sgld_step"], options["start"]) == ("short-chains", 4, "gaussian")
    for line in read_log(run_dir / "metrics.jsonl"):
        if "loss/total" in line:
            terms = line["loss/classification"] + line["loss/generative"] + 0.1 * line["loss/center"]
            assert line["loss/total"] == pytest.approx(terms + 0.01 * line["loss/slope"], abs=1e-4)
            assert line["loss/center"] >= 0 and line["loss/slope"] > 0
    run(extended, *measure.replace("runs/<run>", str(run_dir)).split(), "--gpu", "cpu")
    results = json.loads((run_dir / "eval" / "results.json").read_text())
    assert 0.5 <= results["confidence"]["results"]["largest probability"]["value"] <= 1
    assert "batch normalisation" not in results["about"]  # the network has none, whatever the option


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


FOUND = [path for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern)]
PRODUCT = sorted(p.relative_to(ROOT) for p in FOUND if p.parent.name not in ("tests", "benchmarks", ".venv"))

# Trains and samples as if the packages of --mode test were not installed, and lists what has been imported.
PROGRAM = """
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys(["torchmetrics", "torch_fidelity", "pyautoattack"]))
import main
tiny = "--gpu cpu --logdir runs --dataset digits --depth 10 --width 1".split()
train = "--batch_size 16 --sgld_step 1 --buffer_size 32 --max_steps 2".split()
assert main.main([*tiny, *train]) == 0
sample = "--mode sample --n_samples 2 --n_sample_steps 2 --load_ckpt".split()
assert main.main([*tiny, *sample, str(next(Path("runs").iterdir()))]) == 0
print(*sys.modules)
"""


def listed(file):
    """The packages of a requirements file."""
    lines = (ROOT / file).read_text().splitlines()
    return {re.split("[><=]", line)[0].lower() for line in lines if line and line[0] not in "#-"}


def imported(path):
    """Top-level names of all packages that a file imports, the product's own and Python's left out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names - {path.parts[0].removesuffix(".py") for path in PRODUCT} - set(sys.stdlib_module_names)


def test_every_import_is_of_a_listed_package():
    distributions = packages_distributions()
    for path in PRODUCT:
        allowed = listed("requirements.txt")
        if path.parts[0] == "evaluation":
            allowed |= listed("requirements-eval.txt")
        for name in imported(ROOT / path):
            found = {distribution.lower().replace("_", "-") for distribution in distributions.get(name, [])}
            assert found & allowed, f"{path} imports {name}"


def test_training_and_sampling_need_no_evaluation_package_and_no_pyplot(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "half-removed-1.0.dist-info").mkdir()  # a package without name and version
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.splitlines()[-1].split()) & {"matplotlib.pyplot", "pytest", "hypothesis"}
