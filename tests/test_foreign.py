"""Checkpoints of other programs, in each of their forms, and those that --mode export writes for them."""

import pickle
import re
import shutil
from argparse import Namespace
from collections import OrderedDict
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import equal, reference_chain, refused, seeded
from test_data import write_pngs

from checkpoints.files import CHECKPOINT_FORMAT
from checkpoints.load import Trained, build_for, load_model
from checkpoints.other_programs import open_checkpoint
from config import Config
from main import main
from models import frozen_sampler_model
from sgld import SGLD, chain_options
from utils import UserError

CPU = torch.device("cpu")
MEAN, DEVIATION = torch.tensor([[0.49140, 0.48216, 0.44653], [0.24703, 0.24349, 0.26159]]).view(2, 3, 1, 1)


def conv(generator, name, channels_out, channels_in, kernel=3, bias=True):
    weight = torch.randn(channels_out, channels_in, kernel, kernel, generator=generator)
    made = {f"{name}.weight": weight / (channels_in * kernel**2) ** 0.5}
    return made | ({f"{name}.bias": torch.randn(channels_out, generator=generator) / 9} if bias else {})


def linear(generator, name, out, features):
    weight = torch.randn(out, features, generator=generator) / features**0.5
    return {f"{name}.weight": weight, f"{name}.bias": torch.randn(out, generator=generator)}


def normalisation(generator, name, norm, channels):
    draw = lambda: torch.rand(channels, generator=generator) + 0.5  # noqa: E731
    affine = {f"{name}.weight": draw(), f"{name}.bias": draw() - 1}
    if norm == "act":
        return {f"{name}.{key}": value.view(1, -1, 1, 1) for key, value in (("loc", draw() - 1), ("scale", draw()))}
    if norm == "batch":
        statistics = {f"{name}.running_mean": draw() - 1, f"{name}.running_var": draw()}
        return affine | statistics | {f"{name}.num_batches_tracked": torch.tensor(7)}
    return {} if norm == "none" else affine


def blocks(stages, n, width, robust=False):
    """Of each block its name, its channels before and after, and its stride."""
    before = 16
    for stage, i in product(range(1, stages + 1), range(n)):
        now, name = 8 * 2**stage * width, f"block{stage}.layer.{i}" if robust else f"f.layer{stage}.{i}"
        yield name, before, now, 2 if stage > 1 and i == 0 else 1
        before = now


def weights_of(norm="none", classes=10, channels=3, width=1, stages=3, n=1, extra=True, robust=False):
    """What a file of the JEM family or of a robust classifier holds: names and shapes, random values."""
    g, f, short = torch.Generator().manual_seed(3), "" if robust else "f.", "convShortcut" if robust else "shortcut.0"
    w = conv(g, f"{f}conv1", 16, channels, bias=not robust)
    for name, before, now, stride in blocks(stages, n, width, robust):
        w |= normalisation(g, f"{name}.bn1", norm, before) | conv(g, f"{name}.conv1", now, before, bias=not robust)
        w |= normalisation(g, f"{name}.bn2", norm, now) | conv(g, f"{name}.conv2", now, now, bias=not robust)
        if before != now or stride == 2:
            w |= conv(g, f"{name}.{short}", now, before, 1, bias=not robust)
    w |= normalisation(g, f"{f}bn1", norm, now)
    if robust:
        return w | linear(g, "fc", classes, now)
    w |= linear(g, "class_output", classes, now) | linear(g, "energy_output", 1, now)
    return w | (linear(g, "f.linear", classes, now) if extra else {})


robust_weights = partial(weights_of, "batch", width=2, n=2, robust=True)


def features_of(w, x, norm):
    """By a file of the JEM family or of a robust classifier."""
    robust = "fc.weight" in w
    f, short = ("", "convShortcut") if robust else ("f.", "shortcut.0")

    def convolved(name, h, stride=1, padding=1):
        return F.conv2d(h, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding)

    def active(name, h):
        affine = w.get(f"{name}.weight"), w.get(f"{name}.bias")
        match norm:
            case "batch":
                h = F.batch_norm(h, w[f"{name}.running_mean"], w[f"{name}.running_var"], *affine)
            case "layer":
                h = F.group_norm(h, 1, *affine)
            case "instance":
                h = F.instance_norm(h, None, None, *affine)
            case "act":
                h = w[f"{name}.scale"] * (h + w[f"{name}.loc"])
        return F.leaky_relu(h, 0.0 if robust else 0.2)

    h = convolved(f"{f}conv1", ((x + 1) / 2 - MEAN) / DEVIATION if robust else x)
    for name, _, _, stride in blocks(4, 9, 1, robust):
        if f"{name}.conv1.weight" in w:
            a = active(f"{name}.bn1", h)
            r = active(f"{name}.bn2", convolved(f"{name}.conv1", a, stride if robust else 1))
            r = convolved(f"{name}.conv2", r, 1 if robust else stride)
            shortened = f"{name}.{short}.weight" in w
            h = r + (convolved(f"{name}.{short}", a if robust else h, stride, 0) if shortened else h)
    return active(f"{f}bn1", h).mean((2, 3))


def logits_of(w, x, norm="batch"):
    head = "fc" if "fc.weight" in w else "class_output"
    return features_of(w, x, norm) @ w[f"{head}.weight"].T + w[f"{head}.bias"]


def prefixed(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def resnet_and_linear(w):
    made = {n.replace("f.", "resnet.").replace("class_output", "linear"): v for n, v in w.items() if "energy" not in n}
    second = {name.replace("resnet.", "main.0.").replace("linear.", "main.1."): v for name, v in made.items()}
    return {"EnergyModel": made | {n: v for n, v in second.items() if "main.0.main.1" not in n}, "epoch": 3}


def vera(w):
    inside = {name.removeprefix("f."): v for name, v in w.items() if name.startswith("f.") and "f.linear" not in name}
    inside |= {name.replace("class_output", "linear"): v for name, v in w.items() if name.startswith("class_output")}
    inside |= normalisation(torch.Generator().manual_seed(0), "layer1.0.bn1", "batch", 16)
    model = prefixed("logp_net.", inside) | {"generator.0.weight": torch.zeros(2, 2)}
    return {"epoch": 5, "model": model, "args": Namespace(lr=np.float64(1e-4))}


def opened(tmp_path, raw, new_format=True, **given):
    torch.save(raw, tmp_path / "theirs.pt", _use_new_zipfile_serialization=new_format)
    path, content = open_checkpoint(str(tmp_path / "theirs.pt"), given)
    return load_model(Trained(Config.from_dict(content["config"], ""), path, content), CPU), content


def assert_same(model, x, expected, tolerance=1e-5):
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=tolerance, rtol=tolerance)


FORMS = {"bare": lambda w: w, "dict": lambda w: {"model_state_dict": w, "epoch": 3}}
FORMS |= {"module": partial(prefixed, "module."), "vera": vera, "re-implementation": resnet_and_linear}
NORMS = product(("none", "batch", "layer", "instance", "act"), ("bare", "dict", "module"))


@pytest.mark.parametrize(
    "options, form, config",
    [
        *(({"norm": norm}, form, {"norm": norm, "depth": 10, "width": 1}) for norm, form in NORMS),
        ({"classes": 100}, "bare", {"dataset": "cifar100"}),
        ({"channels": 1}, "bare", {"dataset": "mnist"}),
        ({"stages": 4, "norm": "batch"}, "bare", {"dataset": "folder"}),
        ({"n": 2, "width": 2, "extra": False}, "bare", {"dataset": "cifar10", "depth": 16, "width": 2}),
        ({}, "vera", {"dropout_rate": 0.3}),
        ({}, "re-implementation", {"dropout_rate": 0.25}),
    ],
)
def test_files_of_the_jem_family(tmp_path, options, form, config):
    w, norm = weights_of(**options), options.get("norm", "none")
    model, content = opened(tmp_path, FORMS[form](w), **({"norm": norm} if norm in ("layer", "instance") else {}))
    x = torch.rand(2, options.get("channels", 3), 64, 64) * 2 - 1
    assert_same(model, x, logits_of(w, x, norm))
    assert config.items() <= content["config"].items()


def test_second_names(tmp_path):
    w, x = weights_of("batch", extra=False), torch.rand(2, 3, 32, 32)
    second = {"f.layer_one.weight": w["f.conv1.weight"], "f.other_layers.0.0.conv1.bias": torch.zeros(16)}
    for new_format in (True, False):  # that of the first PyTorch versions, too
        assert_same(opened(tmp_path, w | second, new_format)[0], x, logits_of(w, x, "batch"))
    with pytest.raises(UserError, match="two different values"):
        opened(tmp_path, w | {"module.class_output.bias": w["class_output.bias"] + 1})


def test_the_activation_of_a_plain_classifier_is_assumed(tmp_path, capsys):
    w = weights_of("batch", extra=False, channels=1)
    plain = {n.removeprefix("f.").replace("class_output", "linear"): v for n, v in w.items() if "energy" not in n}
    content = opened(tmp_path, plain, dataset="digits")[1]
    assert content["config"]["activation"] == "relu" and content["data"]["shape"] == [1, 8, 8]
    assert "--activation assumed" in capsys.readouterr().err
    common = f"--dataset digits --gpu cpu --depth 10 --width 1 --norm batch --load_ckpt {tmp_path / 'theirs.pt'}"
    assert main([*common.split(), "--logdir", str(tmp_path)]) == 2
    assert "give --activation relu" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["bare", "average", "both", "empty"])
def test_robust_classifiers_whose_averaged_weights_stay_such_in_an_export(tmp_path, capsys, form):
    w, x = robust_weights(), torch.rand(3, 3, 32, 32) * 2 - 1
    other = {name: value + 1 for name, value in w.items()}
    raw = {
        "bare": w,
        "average": prefixed("module.module.", w) | {"n_averaged": torch.tensor(4)},
        "both": {"model_state_dict": other, "ema_state_dict": OrderedDict(w), "lr": np.float32(0.1)},
        "empty": {"model_state_dict": w, "ema_state_dict": None},
    }[form]
    model, content = opened(tmp_path, raw)
    assert_same(model, x, logits_of(w, x))
    assert (content["config"]["recipe"], content["config"]["backbone"]) == ("dat", "robust")
    told = capsys.readouterr().err
    assert ("its averaged weights" in told) == ("ema" in content["state"]) == (form == "both")
    assert "--image_size, --activation assumed" in told
    there = str(tmp_path / "there.safetensors")
    assert main(["--mode", "export", "--load_ckpt", str(tmp_path / "theirs.pt"), "--export", there]) == 0
    assert equal(open_checkpoint(there, {})[1]["state"].get("ema"), content["state"].get("ema"))


def test_chains_of_a_robust_file_equal_those_written_out_from_its_tensors(tmp_path):
    """DAT's chains use running statistics: x + lr * grad / |grad|, in [-1, 1], whatever else is in the batch."""
    w, start = robust_weights(), torch.rand(4, 3, 32, 32, generator=seeded()) * 2 - 1
    model, content = opened(tmp_path, w)
    cfg = Config.from_dict(content["config"], "file")
    limits, ends = {"clamp": True, "normalize": True}, {}
    x = reference_chain(lambda x: logits_of(w, x).logsumexp(1), start, 5, cfg.sgld_lr, 0.0, seeded(), **limits).x
    for statistics in (cfg.norm_statistics, "batch"):
        chains = SGLD(frozen_sampler_model(model, torch.float32, statistics).log_density, **chain_options(cfg))
        ends[statistics] = chains(start, 5, cfg.sgld_lr, cfg.sgld_std, torch.Generator()).x
    assert (ends["running"] - x).flatten(1).norm(dim=1).max() < 0.02  # kinks of relu magnify rounding
    assert (ends["batch"] - x).flatten(1).norm(dim=1).min() > 0.2


def test_the_energy_head_is_log_p_x_when_asked(tmp_path):
    w, x = weights_of("batch"), torch.rand(2, 3, 32, 32)
    model, _ = opened(tmp_path, w, separate_energy=True, recipe="m-jem")
    expected = features_of(w, x, "batch") @ w["energy_output.weight"].T + w["energy_output.bias"]
    assert_same(model.log_density, x, expected[:, 0])
    assert_same(lambda x: model(x).softmax(1), x, logits_of(w, x, "batch").softmax(1))


def test_chains_run_as_their_authors_ran_them(tmp_path):
    chosen = {"start": "class_gaussian", "sgld_std": 0.0, "sgld_clamp": True, "sgld_grad_clamp": 1.0}
    assert chosen.items() <= opened(tmp_path, weights_of("batch"))[1]["config"].items()
    for recipe, start in (("m-jem", "gaussian"), ("oe-jem", "class_gaussian"), ("dat", "class_gaussian")):
        assert opened(tmp_path, weights_of("batch"), recipe=recipe)[1]["config"]["start"] == start
    _, content = opened(tmp_path, weights_of())
    assert (content["config"]["start"], content["config"]["sgld_clamp"]) == ("uniform", False)


class Code:
    def __reduce__(self):
        return Path("owned").touch, ()


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "lacks f.layer2.0.conv2.bias"),
        ("extra", "has f.layer2.0.conv3.bias"),
        ("shape", "of the shape (3,), not (32,)"),
        ("no energy", "lacks energy_output.weight"),
        ("other", "looked for f.conv1.weight"),
        ("code", "more than tensors"),
        ("torn", "incomplete"),
        ("torn legacy", "refused: it is broken"),
        ("pickle", "incomplete or not a checkpoint"),
    ],
)
def test_what_is_none_of_these_is_refused_in_one_line(tmp_path, monkeypatch, capsys, kind, message):
    monkeypatch.chdir(tmp_path)
    w, path, options = weights_of(), tmp_path / f"{kind}.pt", ["--separate_energy"] if kind == "no energy" else []
    if kind in ("missing", "no energy"):
        del w["f.layer2.0.conv2.bias" if kind == "missing" else "energy_output.weight"]
    if kind in ("extra", "shape"):
        w["f.layer2.0.conv3.bias" if kind == "extra" else "f.layer2.0.conv2.bias"] = torch.zeros(3)
    raw = {"other": {"weight": torch.zeros(3)}, "code": {**w, "x": Code()}}.get(kind, w)
    torch.save(raw, path, _use_new_zipfile_serialization=kind != "torn legacy")
    if kind.startswith("torn"):
        path.write_bytes(path.read_bytes()[:-2000])
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Code()))
    assert message in refused(capsys, "--mode", "sample", "--load_ckpt", str(path), "--logdir", "runs", *options)
    assert list(tmp_path.iterdir()) == [path]  # nothing was written, neither by the code in the file


def test_sampling_measuring_and_training_go_on_from_them(tmp_path, capsys):
    write_pngs(tmp_path / "data", "train/a", "train/b", "test/a", "test/b", n=12, side=32)
    w = weights_of("batch", classes=2)
    buffer = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    torch.save({"model_state_dict": w, "replay_buffer": buffer}, tmp_path / "theirs.pt")
    held = open_checkpoint(str(tmp_path / "theirs.pt"), {})[1]["state"]["buffer"]["images"]
    assert torch.equal(held, buffer / 127.5 - 1)
    common = ["--dataset", "folder", "--data_dir", str(tmp_path / "data"), "--n_valid", "4", "--gpu", "cpu"]
    common += ["--logdir", str(tmp_path / "runs"), "--load_ckpt", str(tmp_path / "theirs.pt")]
    assert main([*common, "--mode", "sample", "--n_samples", "4", "--n_sample_steps", "2"]) == 0
    assert "--depth 10 --width 1 --norm batch --recipe jem++ " in capsys.readouterr().err
    assert main([*common, "--mode", "sample", "--n_samples", "4", "--n_sample_steps", "1", "--from_buffer"]) == 0
    assert main([*common, "--mode", "test", "--eval", "classification"]) == 0
    assert "unknown in training" in next((tmp_path / "runs").glob("*/eval/report.md")).read_text()
    train = ["--recipe", "jem++", "--depth", "10", "--width", "1", "--batch_size", "4", "--p_x_batch_size", "4"]
    train += ["--buffer_size", "16", "--max_steps", "2", "--warmup_steps", "0", "--decay_epochs", "1"]
    assert main([*common, *train]) == 0 and "Starting from the weights of" in capsys.readouterr().out
    assert main([*common, *train, "--norm", "none"]) == 2
    assert "holds another network: give --norm batch" in capsys.readouterr().err
    torch.save(weights_of(), tmp_path / "ten.pt")  # 10 classes, so CIFAR-10, but of another size
    short = ["--n_samples", "2", "--n_sample_steps", "1", "--image_size", "16", "--load_ckpt", str(tmp_path / "ten.pt")]
    assert main(["--mode", "sample", "--gpu", "cpu", "--logdir", str(tmp_path / "ten"), *short]) == 0
    assert "does not use" not in capsys.readouterr().err


@pytest.mark.parametrize("make", [lambda: weights_of("batch"), lambda: weights_of("act"), robust_weights])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_an_export_holds_the_same_weights_bit_for_bit(tmp_path, make, suffix):
    w, there = make(), tmp_path / f"there.{suffix}"
    torch.save(w, tmp_path / "theirs.pt")
    options = ["--export_for", "robust" if "fc.weight" in w else "jem"] if suffix == "pt" else []
    assert main(["--mode", "export", "--load_ckpt", str(tmp_path / "theirs.pt"), "--export", str(there), *options]) == 0
    contents = [open_checkpoint(str(path), {})[1] for path in (tmp_path / "theirs.pt", there)]
    assert "ema" not in contents[1]["state"] and equal(*(content["state"]["model"] for content in contents))
    assert contents[0]["config"] == contents[1]["config"]


def test_an_export_overwrites_nothing(tmp_path, capsys):
    torch.save(weights_of(), tmp_path / "theirs.pt")
    (tmp_path / "there.pt").write_text("mine")
    export = ["--mode", "export", "--load_ckpt", str(tmp_path / "theirs.pt"), "--export"]
    targets = {"there.pt": "exists", "no/no/there.pt": "there is no folder", "there.zip": "ends in .pt"}
    for target, message in targets.items():
        assert main([*export, str(tmp_path / target)]) == 2 and message in capsys.readouterr().err
    assert (tmp_path / "there.pt").read_text() == "mine"
    assert main(export[:-1]) == 2
    (tmp_path / "torn.safetensors").write_bytes(b"12345678901")
    error = refused(capsys, *export[:3], str(tmp_path / "torn.safetensors"), "--export", str(tmp_path / "x.pt"))
    assert "not a safetensors file" in error


def test_a_checkpoint_of_the_first_release_opens(tmp_path, capsys):
    old = str(Path(__file__).parent / "files" / "format_2.pt")  # digits, step 0, written by the first release
    path, content = open_checkpoint(old, {})
    model, x = load_model(Trained(Config.from_dict(content["config"], old), path, content), CPU), torch.rand(2, 1, 8, 8)
    assert_same(model, x, logits_of(torch.load(old, weights_only=True)["state"]["model"], x, "none"))
    sample = ["--mode", "sample", "--n_samples", "10", "--n_sample_steps", "2", "--gpu", "cpu"]
    assert main([*sample, "--load_ckpt", old, "--logdir", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*/samples.npz"))
    (tmp_path / "run" / "ckpt").mkdir(parents=True)
    shutil.copy(old, tmp_path / "run" / "ckpt" / "last.pt")
    (tmp_path / "run" / "config.json").write_text("{}")
    assert ": start a new run with --load_ckpt" in refused(capsys, "--resume", str(tmp_path / "run"))


DOCS = Path(__file__).parent.parent / "docs" / "checkpoints.md"
ROBUST = {"backbone": "robust", "activation": "relu", "recipe": "dat", "norm": "batch"}
FAMILY = list(product(("jem", "jem++", "sada-jem"), ("none", "batch", "layer", "instance", "act")))


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
    back = load_model(Trained(Config.from_dict(content["config"], ""), path, content), CPU)
    assert_same(model, x, logits_of(weights, x, norm))
    assert_same(back, x, model(x), tolerance=1e-6)
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
        (ROBUST | {"activation": "silu"}, "for DAT (images in [0, 1]); whose scripts"),
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
