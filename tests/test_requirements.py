"""The requirements files name what the program imports, and no more."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
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
