"""What a trained network is for: samples, scores, and ``load_run``, the entry for notebooks and other programs."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("checkpoints", "config", "evaluation", "logger", "models")


def refuse_others() -> None:
    """Raise ImportError, in one line, if Python finds modules of another program under the names of this one's."""
    names = {file.stem for file in ROOT.glob("*.py")} - {"main"} | set(FOLDERS)
    found = {name: find_spec(name) for name in sorted(names)}
    files = {
        name: spec and (spec.origin or next(iter(spec.submodule_search_locations))) for name, spec in found.items()
    }
    others = [f"{name} ({file})" for name, file in files.items() if file is None or ROOT not in Path(file).parents]
    if others:
        raise ImportError(
            f"other modules have the names of this program's: {', '.join(others)}: rename them, or put {ROOT} first in "
            "sys.path before anything else is imported"
        )


refuse_others()

from generation.trained_run import TrainedRun, load_run  # noqa: E402

__all__ = ["TrainedRun", "load_run"]
