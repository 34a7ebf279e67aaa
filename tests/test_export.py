"""--mode export: names and shapes are those of docs/checkpoints.md, and the numbers those of the network."""

import re
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch
from small_runs import refused
from test_foreign import blocks, logits_of

from checkpoints.files import CHECKPOINT_FORMAT
from checkpoints.load import build_for, load_model
from checkpoints.other_programs import open_checkpoint
from config import Config
from main import main

DOCS = Path(__file__).parent.parent / "docs" / "checkpoints.md"
ROBUST = {"backbone": "robust", "activation": "relu", "recipe": "dat", "norm": "batch"}


def documented(program, norm, depth, width, channels, classes, stages=3):
    """Names and shapes by the table of the docs, with JEM++'s second names."""
    found, robust, places_of, norms = {}, program == "robust", [], []
    for name, before, m, stride in blocks(stages, (depth - 4) // 6, width, robust):
        stage, i = re.findall(r"\d", name)
        places_of.append({"s": stage, "i": i, "m": m, "p": before, "short": before != m or stride == 2})
        norms += [(f"{name}.bn1", before), (f"{name}.bn2", m)]
    norms.append(("bn1" if robust else "f.bn1", m))
    table = DOCS.read_text().split("### Names and shapes")[1]
    rows = re.findall(r"^\| `(.+?)` \| ?(.*?) ?\| (.+?) \| (.+?) \|$", table, re.M)
    assert len(rows) == 28
    for name, shape, programs, of_norms in rows:
        if not {program, "all"} & set(programs.split(", ")) or not {norm, "all"} & set(of_norms.split(", ")):
            continue
        places = [{"name": name, "m": m}]
        if "{norm}" in name:
            places = [{"name": name.replace("{norm}", layer), "b": b} for layer, b in norms]
        elif "{s}" in name:
            places = [{"name": name.format(**b), **b} for b in places_of if b["short"] or "hortcut" not in name]
        for place in places:
            sizes = place | {"c": channels, "k": classes}
            found[place["name"]] = tuple(sizes[n] if n in sizes else int(n) for n in shape.split(", ") if n)
    if program == "jem++":
        second = {"f.conv1.": "f.layer_one.", "f.bn1.": "f.other_layers.3."}
        second |= {f"f.layer{s}.": f"f.other_layers.{s - 1}." for s in (1, 2, 3)}
        for one, other in second.items():
            found |= {name.replace(one, other): shape for name, shape in found.items() if name.startswith(one)}
    return found


def checkpoint(path, classes=10, shape=(3, 32, 32), buffer=None, **options):
    """A checkpoint of this program with random weights."""
    cfg, g = Config(depth=options.pop("depth", 10), width=1, load_ckpt=".", **options), torch.Generator().manual_seed(5)
    model = build_for(cfg, shape, classes).eval()
    weights = model.state_dict()
    weights |= {n: torch.rand(v.shape, generator=g) / 2 + 0.1 for n, v in weights.items() if ".bn" in n and v.ndim}
    state = {"step": 3, "model": weights}
    if buffer is not None:
        state["buffer"] = {"images": buffer, "age": torch.zeros(len(buffer))}
    data = {"shape": list(shape), "class_names": [str(i) for i in range(classes)]}
    torch.save({"format": CHECKPOINT_FORMAT, "config": asdict(cfg), "data": data, "state": state}, path)
    model.load_state_dict(weights)
    return model


def arguments(tmp_path):
    return ["--mode", "export", "--load_ckpt", str(tmp_path / "a.pt"), "--export", str(tmp_path / "b.pt")]


FAMILY = list(product(("jem", "jem++", "sada-jem"), ("none", "batch", "layer", "instance", "act")))


@pytest.mark.parametrize("program, norm", [*FAMILY, ("robust", "batch")])
@pytest.mark.parametrize("depth, classes", [(10, 7), (16, 10)])
def test_names_shapes_and_logits_are_those_of_the_program(tmp_path, capsys, program, norm, depth, classes):
    options = {"norm": norm} | (ROBUST if program == "robust" else {})
    buffer = torch.rand(20, 3, 32, 32)
    model = checkpoint(tmp_path / "a.pt", classes, depth=depth, buffer=buffer, **options)
    assert main([*arguments(tmp_path), "--export_for", program]) == 0
    told = capsys.readouterr().out
    assert ("changes for such a network: see docs/checkpoints.md" in told) == (classes == 7)
    file = torch.load(tmp_path / "b.pt", weights_only=True)
    weights = file if program == "robust" else file["model_state_dict"]
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    assert shapes == documented(program, norm, depth, 1, 3, classes)
    assert all(v == 1 and v.dtype == torch.uint8 for n, v in weights.items() if n.endswith("initialized"))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    path, content = open_checkpoint(str(tmp_path / "b.pt"), {"norm": norm})
    back = load_model(Config.from_dict(content["config"], ""), path, content).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(weights, x, norm), model(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(back(x), model(x), atol=1e-6, rtol=1e-6)
    if program != "robust":
        assert list(file) == ["model_state_dict", "replay_buffer"] and torch.equal(file["replay_buffer"], buffer)


@pytest.mark.parametrize(
    "options, chosen",
    [
        ({}, "for JEM;"),
        ({"recipe": "jem++"}, "for JEM++"),
        ({"recipe": "m-jem"}, "for SADA-JEM or M-JEM; whose scripts"),
        ({"stages": 4, "shape": (3, 64, 64)}, "for SADA-JEM or M-JEM; whose scripts"),
        (ROBUST, "for DAT"),
        ({"separate_energy": True}, "for JEM; whose scripts need options or changes for such a network: see"),
        ({"shape": (1, 8, 8)}, "for JEM; whose scripts"),
        (ROBUST | {"activation": "silu"}, "are in [0, 1]; whose scripts"),
    ],
)
def test_the_line_says_which_program_and_whether_it_builds_such_a_network(tmp_path, capsys, options, chosen):
    checkpoint(tmp_path / "a.pt", **options)
    assert main(arguments(tmp_path)) == 0
    out = capsys.readouterr().out
    assert chosen in out and out.count("\n") == 1
    assert ("whose scripts" in out) == ("whose scripts" in chosen)
    file = torch.load(tmp_path / "b.pt", weights_only=True)
    assert ("1000 images of noise" in out) == ("replay_buffer" in file) == (options.get("backbone") != "robust")
    if "replay_buffer" in file:
        assert tuple(file["replay_buffer"].shape) == (1000, *options.get("shape", (3, 32, 32)))
        assert -1 <= file["replay_buffer"].min() < -0.9 < 0.9 < file["replay_buffer"].max() <= 1
    if options.get("stages") == 4:
        shapes = {name: tuple(value.shape) for name, value in file["model_state_dict"].items()}
        assert shapes == documented("sada-jem", "none", 10, 1, 3, 10, stages=4)


@pytest.mark.parametrize(
    "options, export_for, lacks",
    [
        ({"norm": "group"}, "auto", "--norm group"),
        ({"activation": "silu", "norm": "group"}, "sada-jem", "--norm group, --activation silu"),
        ({"stages": 4}, "jem", "--stages 4"),
        ({}, "robust", "--backbone jem, --norm none, --activation leaky_relu"),
        (ROBUST, "jem", "--backbone robust, --activation relu"),
        (ROBUST | {"separate_energy": True}, "auto", "--separate_energy"),
    ],
)
def test_a_network_that_the_program_lacks_is_refused(tmp_path, capsys, options, export_for, lacks):
    checkpoint(tmp_path / "a.pt", **options)
    assert f"has no {lacks}:" in refused(capsys, *arguments(tmp_path), "--export_for", export_for)
    assert not (tmp_path / "b.pt").exists()
    assert main([*arguments(tmp_path), "--export", str(tmp_path / "b.safetensors")]) == 0  # the last of two counts
