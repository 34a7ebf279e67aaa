"""What a trained network is for: samples, scores, and ``load_run``, the entry for notebooks and other programs."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def refuse_others() -> None:
    """Raise ImportError, in one line, if Python finds modules of another program under the names of this one's."""
    others = []
    for name in ("config", "models", *sorted(file.stem for file in ROOT.glob("*.py") if file.stem != "main")):
        file = Path(getattr(find_spec(name), "origin", None) or name)
        if ROOT not in (file.parent.resolve(), file.parent.parent.resolve()):
            others.append(f"{name} ({file})")
    if others:
        advice = f"rename them, or put {ROOT} first in sys.path before they are imported"
        raise ImportError(f"other modules have the names of this program's: {', '.join(others)}: {advice}")


refuse_others()

from generation.trained_run import TrainedRun, load_run  # noqa: E402

__all__ = ["TrainedRun", "load_run"]
