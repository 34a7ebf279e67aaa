"""Whether chains keep up with the loss: a line that says so while there is time to act."""

from typing import Any

PATIENCE = 100  # steps
TOLD_APART = 0.95  # AUROC of real images against samples by log p(x); 0.5 is a balance, 0 the opposite error
BEHIND = "below nearly all real images: chains do not reach what the loss calls likely"
AHEAD = "above nearly all real images: chains climb faster than the loss can push down"
ADVICE = "more --sgld_step, --sgld_step_max, --sgld_grad_clamp with --sgld_clamp, or --start class_gaussian may help"


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
        where = BEHIND if auroc > 0.5 else AHEAD
        self.warned_at = step
        self.warning = f"for {PATIENCE} steps, up to step {step}, samples lay {where} (AUROC {auroc:.2f}); {ADVICE}"
        return self.warning
