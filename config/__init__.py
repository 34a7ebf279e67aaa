"""A run's options, checked, and what follows from them."""

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from config.checks import contradictions
from config.cli import absolute_path, check_value
from config.options import ATTACKS, METRICS, STARTS, Options
from config.recipes import RECIPES
from utils import UserError

FORMER = ("counterfactual", "counterfactual_eps")  # options that older checkpoints name and nothing reads


@dataclass(frozen=True, init=False)
class Config(Options):
    """Options given, then those of ``recipe``, then the defaults. Raises UserError that names all that is wrong."""

    def __init__(self, **given: Any):
        recipe = RECIPES[given["recipe"]].options if str(given.get("recipe")) in RECIPES else {}
        options = asdict(Options(**recipe | given))  # a TypeError for a name that is no option's
        if "start_dir" in given and not {"start", "outlier_images"} & given.keys():
            options["start"] = "folder"
        for f in fields(self):
            object.__setattr__(self, f.name, absolute_path(f, options[f.name]))
        wrong = [check_value(f, getattr(self, f.name)) for f in fields(self)]
        problems = [text for text in wrong if text] or list(contradictions(self))
        if problems:
            raise UserError("; ".join(problems))

    @classmethod
    def from_dict(cls, options: dict[str, Any], source: str) -> "Config":
        """A Config of a checkpoint's options as they are, fit for training or not; ``source`` names it in errors."""
        options = {name: value for name, value in options.items() if name not in FORMER}
        if unknown := options.keys() - {f.name for f in fields(cls)}:
            raise UserError(f"{source} has options this version does not know: {', '.join(sorted(unknown))}")
        try:  # checked as for --mode sample, which has no rules for training; then its own mode again
            found = cls(**asdict(Options()) | options | {"mode": "sample", "denoise": None, "from_buffer": False})
            object.__setattr__(found, "mode", options.get("mode", Options.mode))
            return found
        except UserError as error:
            raise UserError(f"{source} has an option this version refuses: {error}") from None

    @property
    def decay_at(self) -> list[int]:
        """The epochs in ``--decay_epochs``, ascending."""
        words = [word.strip() for word in self.decay_epochs.split(",") if word.strip()]
        if not all(re.fullmatch("[1-9][0-9]{0,8}", word) for word in words):
            raise UserError(f"--decay_epochs takes epochs, separated by commas, as 60,120, not {self.decay_epochs!r}")
        return sorted(map(int, words))

    @property
    def separate_p_x(self) -> bool:
        """Whether log p(x) has real images of its own."""
        own = self.p_x_batch_size or self.p_x_no_augment or self.labels_per_class or self.augment == "auto"
        return self.draws_samples and bool(own)

    @property
    def n_chains(self) -> int:
        """Chains of a step, and real images of log p(x)."""
        return self.p_x_batch_size or self.batch_size

    @property
    def fresh_steps(self) -> int:
        """SGLD steps of a sample's chain: those given, or else of twenty training chains (why: docs/experiments.md)."""
        default = max(min(20 * self.sgld_step, 200), self.sgld_step, self.sgld_step_max or 0)
        return default if self.n_sample_steps is None else self.n_sample_steps

    @property
    def metrics(self) -> list[str]:
        """The names in ``--eval``; none where nothing is measured."""
        return self._names("eval", METRICS) if self.mode == "test" else []

    @property
    def chosen_attacks(self) -> list[str]:
        """The names in ``--attacks``."""
        return self._names("attacks", ATTACKS)

    @property
    def refinements(self) -> list[str]:
        """The attacks on JEM's refinement, where robustness is measured."""
        return [name for name in self.chosen_attacks if "refined" in name] if "robustness" in self.metrics else []

    def _names(self, name: str, known: tuple[str, ...]) -> list[str]:
        text = getattr(self, name)
        words = list(known if text in ("all", None) else dict.fromkeys(word.strip() for word in text.split(",")))
        for word in words:
            if word not in known:
                raise UserError(f"--{name} takes all, or some of {', '.join(known)}, separated by commas, not {word!r}")
        return words

    @property
    def start_shares(self) -> dict[str, float]:
        """The names in ``--start`` and their shares, which add up to 1."""
        return self._shares("start")

    @property
    def outlier_shares(self) -> dict[str, float]:
        """The names in ``--outlier_images`` and their shares, which add up to 1; none without ``--outlier_weight``."""
        return self._shares("outlier_images") if self.outlier_weight and self.draws_samples else {}

    @property
    def start_name(self) -> str:
        """What ``--start`` names, in words."""
        shares = self.start_shares
        return ", ".join(STARTS[name] + f" ({share:.0%})" * (len(shares) > 1) for name, share in shares.items())

    def _shares(self, name: str) -> dict[str, float]:
        found = {}
        for word in getattr(self, name).split(","):
            start, colon, text = word.strip().partition(":")
            try:
                share = float(text if colon else 1)
            except ValueError:
                share = 0.0
            if start not in STARTS or start in found or not 0 < share < 1e6:
                several = "several, each once, with shares above 0, as gaussian:0.8,uniform:0.2"
                raise UserError(f"--{name} takes one of {', '.join(STARTS)}, or {several}, not {word.strip()!r}")
            found[start] = share
        total = sum(found.values())
        return {start: share / total for start, share in found.items()}

    @property
    def draws_samples(self) -> bool:
        """Whether the run draws negative samples (and so has a replay buffer)."""
        return self.mode == "energy_train" and (self.p_x_weight > 0 or self.p_x_y_weight > 0)

    @property
    def classifies(self) -> bool:
        """Whether labels have a part in the training: without, the classes mean nothing."""
        return self.p_y_x_weight > 0 or self.p_x_y_weight > 0
