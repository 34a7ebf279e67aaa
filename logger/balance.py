"""Whether chains keep up with the loss: a line that says so while there is time to act."""

from typing import Any

PATIENCE = 100  # steps
TOLD_APART = 0.95  # AUROC of real images against samples by log p(x); 0.5 is a balance, 0 the opposite error
BEHIND = "chains do not reach what the loss calls likely; --sgld_step_max, more --sgld_step or --start class_gaussian"
AHEAD = "chains climb faster than the loss pushes down; a smaller --sgld_lr, or --sgld_grad_clamp with --sgld_clamp"


class Balance:
    """Follows ``sgld/auroc`` in the lines of a run's log; those of before a resume are read again."""

    def __init__(self, lines: list[dict[str, Any]]):
        self.balanced_at = self.warned_at = 0  # steps
        self.warning = ""  # the last one
        for line in lines:
            self.add(line["step"], line)

    def add(self, step: int, values: dict[str, Any]) -> str:
        """The warning that is due after a line of the log, or an empty text; one for each time that it gets so far."""
        auroc = values.get("sgld/auroc")
        if auroc is None:
            return ""
        if 1 - TOLD_APART <= auroc <= TOLD_APART:
            self.balanced_at = step
        if step - self.balanced_at < PATIENCE or self.warned_at > self.balanced_at:
            return ""
        self.warned_at, why = step, BEHIND if auroc > 0.5 else AHEAD
        self.warning = f"log p(x) tells samples from real images (AUROC {auroc:.2f}, {PATIENCE} steps): {why} may help"
        return self.warning
