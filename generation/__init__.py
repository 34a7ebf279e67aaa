"""What a trained network is for: samples, scores, and ``load_run``, the entry for notebooks and other programs."""

from generation.trained_run import TrainedRun, load_run

__all__ = ["TrainedRun", "load_run"]
