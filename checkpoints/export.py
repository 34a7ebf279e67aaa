"""--mode export: a checkpoint's network as a file that other programs open."""

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from checkpoints.load import load_model
from checkpoints.other_programs import authors_weights
from config import Config
from logger.files import replace_file
from utils import UserError, printable


def run(cfg: Config, path: Path, content: dict[str, Any]) -> int:
    """Write the network of ``content``, read from ``path``, to ``--export``; returns the exit status.

    The averaged weights are written where there are any. Raises UserError for a file that is there already.
    """
    target = Path(cfg.export)
    weights = load_model(cfg, path, content).state_dict()
    if os.path.exists(target):  # False where it may not be looked at
        raise UserError(f"--export {target} exists: name a new file")
    if target.suffix == ".pt":
        file = io.BytesIO()
        torch.save({"model_state_dict": authors_weights(weights, cfg.backbone)}, file)
        written = file.getvalue()
    else:
        about = {"config": content["config"], "data": content["data"], "step": content["state"]["step"]}
        about["averaged"] = "ema" in content["state"]
        tensors = {name: value.contiguous() for name, value in weights.items()}
        written = save(tensors, {name: json.dumps(value) for name, value in about.items()})
    replace_file(target, written)
    print(f"Wrote {printable(target)} ({len(written) / 2**20:.1f} MiB)")
    return 0
