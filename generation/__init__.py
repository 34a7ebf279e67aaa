"""What a trained network is for: samples, scores, and ``load_run``, the entry for notebooks and other programs."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

names = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {path.stem for path in ROOT.glob("*.py")} - {"main"}
for name in sorted(filter(str.isidentifier, names)):  # not what editors leave, as .#trainer.py
    found = Path(getattr(find_spec(name), "origin", None) or name).resolve()
    if ROOT not in found.parents:  # a user's own module, in a folder that comes first or imported before
        advice = f"rename it, or put {ROOT} first in sys.path before it is imported"
        raise ImportError(f"{found} has the name of a module of this program: {advice}")

from generation.trained_run import TrainedRun, load_run  # noqa: E402

__all__ = ["TrainedRun", "load_run"]
