"""What happens when training diverges: states to go back to, and settings that become gentler."""

from typing import Any

from config import Config
from utils import TrainingFailed, tree_to

STATE_EVERY = 200  # steps between states that training can go back to


class Recovery:
    """Two states to go back to, in the host's memory, and what divergence has changed.

    proven: the state to go back to: training went on well for a while after it. latest: a later state, which is proven
    when the next one comes. ``remedies`` change the options of the rest of the run. The first of several divergences
    that are close together brings new randomness, the second twice the SGLD steps (unless chains grow by themselves),
    the fourth a small penalty on energies, all others half the learning rate; the last three as JEM's authors advise.
    """

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.proven = self.latest = None
        self.remedies = {"sgld_step_factor": 1, "lr_factor": 1.0, "energy_l2": cfg.energy_l2}
        self.recoveries, self.failed_at = 0, -1  # in the whole run; the last one's step
        self.close_failures = 0  # each soon after the one before

    def keep(self, state: dict[str, Any]) -> None:
        """``state`` is the latest, and the one before it has proven good."""
        self.proven = state if self.latest is None else self.latest
        self.latest = state

    def go_back(self, step: int) -> tuple[dict[str, Any], str]:
        """The state to go on from after a divergence, and what is changed; TrainingFailed if it was one too many."""
        if self.recoveries >= self.cfg.max_recoveries:
            advice = "more --sgld_step, a lower --lr, or --energy_l2 0.1" if self.cfg.draws_samples else "a lower --lr"
            raise TrainingFailed(f"training diverged at step {step} (recoveries: {self.recoveries}): try {advice}")
        self.close_failures = self.close_failures + 1 if step <= self.failed_at + 5 * STATE_EVERY else 1
        self.recoveries, self.failed_at = self.recoveries + 1, step
        self.latest = self.proven  # what came after it may be bad
        return self.proven, f"{self._change_settings()} (recovery {self.recoveries} of {self.cfg.max_recoveries})"

    def _change_settings(self) -> str:
        if self.close_failures == 2 and self.cfg.draws_samples and not self.cfg.sgld_step_max:
            self.remedies["sgld_step_factor"] *= 2  # of chains that do not grow
            return f"{self.remedies['sgld_step_factor']} times the SGLD steps"
        if self.close_failures == 4 and self.cfg.draws_samples:
            self.remedies["energy_l2"] = max(0.1, self.remedies["energy_l2"])
            return f"energy_l2 {self.remedies['energy_l2']:g}"
        if self.close_failures >= 2:
            self.remedies["lr_factor"] *= 0.5
            return f"learning rate x {self.remedies['lr_factor']:g}"
        return "new randomness"

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("remedies", "recoveries", "close_failures", "failed_at")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in tree_to(state).items():
            setattr(self, name, value)
