"""What a trained network is for: samples, scores, and ``load_run``, the entry for notebooks and other programs."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

folders = ("checkpoints", "config", "evaluation", "logger", "models")
for name in (*folders, *sorted(file.stem for file in ROOT.glob("*.py") if file.stem != "main")):
    found = Path(getattr(find_spec(name), "origin", None) or name).resolve()
    if ROOT not in found.parents:  # a user's own module, in a folder that comes first or imported before
        advice = f"rename it, or put {ROOT} first in sys.path before it is imported"
        raise ImportError(f"{found} has the name of a module of this program: {advice}")

from generation.trained_run import TrainedRun, load_run  # noqa: E402

__all__ = ["TrainedRun", "load_run"]
