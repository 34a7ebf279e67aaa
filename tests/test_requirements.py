"""What training and sampling need is no more than requirements.txt lists."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

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
    return {re.split("[><=]", line)[0] for line in lines if line and line[0] not in "#-"}


def test_training_and_sampling_need_no_evaluation_package_and_no_pyplot(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.splitlines()[-1].split())
    assert not imported & {"cv2", "imageio", "matplotlib.pyplot", "pytest", "hypothesis"}


def test_each_package_is_listed_once():
    train, test, dev = (listed(f"requirements{part}.txt") for part in ("", "-eval", "-dev"))
    assert {"torch", "torchvision", "pillow", "matplotlib", "tensorboard"} <= train
    assert {"torchmetrics", "torch-fidelity", "pyautoattack"} == test
    assert {"pytest", "ruff"} <= dev and not train & test and not (train | test) & dev
    assert (ROOT / "requirements-dev.txt").read_text().count("-r requirements") == 2
