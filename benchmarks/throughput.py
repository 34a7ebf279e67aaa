"""How fast sampler, training step, data path and full loop are, against the plain loop of plain.py.

    python benchmarks/throughput.py --depth 16 --width 2 --batch_size 64 --device cpu
    python benchmarks/throughput.py --depth 28 --width 10 --batch_size 128 --device cuda --json h200.json

Both sides run in turn in one process after a warm-up; times are medians, with the smallest and largest behind them.
FLOPs are those of the network passes that the method needs (FlopCounterMode). The ceiling is the best bf16 rate found
in the same process, of matrix products of several sizes and of a convolution of the network. The overhead of the loop
is what logging, pictures, evaluation and checkpoints add to bare training steps.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import utils  # noqa: E402
from benchmarks.command import device_named, run_script
from benchmarks.plain import PlainTraining, plain_sampler  # noqa: E402
from config import Config  # noqa: E402
from config.recipes import RECIPES  # noqa: E402
from logger.progress import compiled  # noqa: E402
from logger.run_dir import RunDir  # noqa: E402
from models import build_model  # noqa: E402
from trainer import Trainer  # noqa: E402


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(functions: dict, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, ``repeats`` times in turn after one warm-up round."""
    times = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            start = clock(device)
            function()
            if i:
                times[name].append(clock(device) - start)
    return times


@torch.no_grad()
def ceiling(network: torch.nn.Module, x: torch.Tensor) -> tuple[float, str]:
    """The highest rate in bf16 that was found here, in FLOP/s, and of what.

    Candidates are matrix products of several sizes, and the network's most common convolution of images x (N, C, H, W):
    small products find their operands in the cache, and a library may do a convolution better than any product.
    """
    candidates = {}
    for n in (2048, 4096, 8192) if x.is_cuda else (512, 1024, 2048):
        a, b = (torch.randn(n, n, device=x.device, dtype=torch.bfloat16) for _ in range(2))
        candidates[f"a matrix product of size {n}"] = (partial(torch.matmul, a, b), 2 * n**3)
    shapes = convolutions(network, x)
    (c_in, c_out, height, width), _ = Counter(shapes).most_common(1)[0]
    like = {"device": x.device, "dtype": torch.bfloat16}
    images = torch.randn(len(x), c_in, height, width, **like).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c_out, c_in, 3, 3, **like).contiguous(memory_format=torch.channels_last)
    name = f"a 3x3 convolution of {c_in} to {c_out} channels at {height}x{width}"
    flops = 2 * len(x) * height * width * c_in * c_out * 9
    candidates[name] = (partial(torch.nn.functional.conv2d, images, weight, padding=1), flops)
    rates, times = {}, 20 if x.is_cuda else 1  # the time to start one of them does not count on a GPU

    def many(function):
        for _ in range(times):
            function()

    for name, (function, flops) in candidates.items():
        rates[name] = times * flops / min(measure({"rate": partial(many, function)}, x.device, 10)["rate"])
    best = max(rates, key=rates.get)
    return rates[best], best


def convolutions(network: torch.nn.Module, x: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """Channels in and out, height and width of the output, of each 3x3 convolution that images x pass."""
    shapes, handles = [], []

    def note(module, inputs, output):
        shapes.append((module.in_channels, module.out_channels, *output.shape[2:]))

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            handles.append(module.register_forward_hook(note))
    network(x)
    for handle in handles:
        handle.remove()
    return shapes


def share_of(rate: float, highest: float) -> str:
    if rate > highest:
        return f"{rate / highest:.2f} times the ceiling: the ceiling is too low"
    return f"{100 * rate / highest:.0f} % of the ceiling"


def pass_flops(network: torch.nn.Module, x: torch.Tensor, *, train: bool) -> int:
    """FLOPs of a forward pass and of the backward pass to the parameters (train) or to the input (an SGLD step)."""
    network.requires_grad_(train)
    with FlopCounterMode(display=False) as counter:
        network(x.clone().requires_grad_(not train)).sum().backward()
    network.requires_grad_(True)
    network.zero_grad()
    return counter.get_total_flops()


def synthetic(n: int, shape: tuple[int, int, int], device: torch.device) -> data.ImageData:
    """Random images in CIFAR-10's numbers; speed does not depend on what they show."""

    def split(n):
        return data.Split(
            torch.randint(256, (n, *shape), dtype=torch.uint8, device=device), torch.randint(10, (n,), device=device)
        )

    return data.ImageData(split(n * 9 // 10), split(n // 10), split(n // 5), tuple("0123456789"), True)


def timed_recipe(recipe: str) -> dict[str, Any]:
    """What a step of a recipe needs to be timed as one of the middle of training: options that replace its own.

    Chains that grow in training have half of their largest length; where statistics are frozen, no first phase is read.
    """
    options = RECIPES[recipe].options
    longest = options.get("sgld_step_max")  # of dat's chains, which begin with no step
    given = {"sgld_step": longest // 2, "sgld_step_max": None} if longest else {}
    return given | {"load_ckpt": "." * (options.get("norm_statistics") == "frozen")}


def show(name: str, times: list[float], plain: list[float] | None = None, note: str = "") -> dict:
    median = statistics.median(times)
    row = {"what": name, "seconds": median, "min": min(times), "max": max(times), "repeats": len(times)}
    text = f"{name:34} {1e3 * median:10.1f} ms  ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})"
    if plain:
        row["speedup"] = statistics.median(plain) / median
        text += f"  {row['speedup']:5.2f} x"
    print(f"{text}  {note}", flush=True)
    return row


def options(description: str) -> argparse.ArgumentParser:
    """What is measured: the options that the benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--sgld_step", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--compile", choices=["on", "off"], help="default: on for CUDA, off for the CPU")
    return parser


def prepare(args: argparse.Namespace, **more) -> tuple[torch.device, Config]:
    """The device, tuned as for training, and the Config of these options."""
    device = device_named(args.device)
    utils.set_speed_options(device)
    names = ("depth", "width", "batch_size", "sgld_step", "precision")
    compile = args.compile or ("on" if device.type == "cuda" else "off")
    return device, Config(**{name: getattr(args, name) for name in names}, compile=compile, **more)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--images", type=int, default=50_000, help="random images of the data set")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", default="sampler,step,data", help="sampler, step, data, loop, scaling, by commas")
    parser.add_argument("--loop_steps", type=int, default=501, help="steps of the full loop; 501 has a GIF in it")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args()
    parts, known = args.parts.split(","), ("sampler", "step", "data", "loop", "scaling")
    if unknown := [part for part in parts if part not in known]:
        parser.error(f"--parts takes some of {', '.join(known)}, not {', '.join(unknown)}")
    device, cfg = prepare(args, max_steps=args.loop_steps)
    shape = (3, args.image_size, args.image_size)
    images = synthetic(args.images, shape, device)
    ours = Trainer(cfg, images, device)
    ours.step = 1
    torch.manual_seed(0)
    network = build_model((3, 32, 32), 10, args.depth, args.width).to(device, memory_format=torch.contiguous_format)
    plain = PlainTraining(
        network, images.train.images, images.train.labels, cfg.buffer_size, args.batch_size, args.sgld_step
    )
    start = plain.buffer[: args.batch_size]
    highest, of_what = ceiling(network, start)
    dtype = str(ours.dtype).removeprefix("torch.")
    print(
        f"{utils.device_name(device)}, torch {torch.__version__}; WRN-{args.depth}-{args.width}, "
        f"batch {args.batch_size}, {args.sgld_step} SGLD steps, {dtype}, compile {cfg.compile}\n"
        f"ceiling: {highest / 1e12:.3f} TFLOP/s in bf16, the best of several rates, of {of_what}"
    )
    rows = []

    def against_plain(name, plain_function, our_function, flops):
        def plain_as_elsewhere() -> None:  # the loop that everybody writes leaves cuDNN's fastest algorithms on
            with torch.backends.cudnn.flags(enabled=True, deterministic=False, allow_tf32=True):
                plain_function()

        times = measure({"plain": plain_as_elsewhere, "ours": our_function}, device, args.repeats)
        rate = flops / statistics.median(times["ours"])
        rows.append(show(f"{name}, plain", times["plain"]))
        note = f"{rate / 1e12:.3f} TFLOP/s, {share_of(rate, highest)}"
        row = show(name, times["ours"], times["plain"], note)
        rows.append(row | {"flops": flops, "share_of_ceiling": rate / highest})

    sampling_flops = args.sgld_step * pass_flops(network, start, train=False)
    training_flops = 2 * pass_flops(network, start, train=True)  # real and sampled images

    if "sampler" in parts:
        against_plain(
            "sampler",
            lambda: plain_sampler(network, start, args.sgld_step, 1.0, 0.01),
            lambda: ours.sampler.engine(start, args.sgld_step, 1.0, 0.01, ours.rng.sgld),
            sampling_flops,
        )
    if "step" in parts:
        ours.training_step()
        ours.step = 2  # the epoch's order is drawn at its first step
        against_plain("training step", plain, ours.training_step, sampling_flops + training_flops)
    if "data" in parts:
        batch = torch.arange(args.batch_size, device=device)
        times = measure(
            {"data": lambda: data.augment(images.train.images[batch], True, 0.03, ours.rng.data)}, device, 20
        )
        rows.append(show("batch and augmentation", times["data"]))
    if "loop" in parts:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            warm_up = Trainer(replace(cfg, max_steps=2, gif_every=1), images, device)  # imports, first pictures
            warm_up.train(RunDir.create(folder, "warm-up", ""))
            whole = Trainer(cfg, images, device)
            before = clock(device)
            whole.train(RunDir.create(folder, "benchmark", ""))
            loop = clock(device) - before
        bare = Trainer(cfg, images, device)
        before = clock(device)
        for step in range(1, args.loop_steps + 1):
            bare.step = step
            bare.training_step()
        steps = clock(device) - before
        n = args.loop_steps * args.batch_size
        rows.append(show(f"{args.loop_steps} bare steps", [steps], note=f"{n / steps:.1f} images/s"))
        rows.append(
            show(
                "the same with log and dumps",
                [loop],
                note=f"{n / loop:.1f} images/s, overhead {100 * (loop / steps - 1):.1f} %",
            )
        )
    if "scaling" in parts:
        for name, values in {
            "batch_size": (args.batch_size // 2, args.batch_size * 2),
            "width": (1, 2, 4),
            "sgld_step": (5, 10, 40),
        }.items():
            for value in values:
                torch.compiler.reset()  # it stops compiling what has been compiled for eight other networks
                run = Trainer(replace(cfg, **{name: value}), images, device)
                run.step = 1
                run.training_step()
                run.step = 2
                times = measure({"step": run.training_step}, device, args.repeats)
                rows.append(show(f"training step, {name} {value}", times["step"]))
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory of the process: {memory / 2**30:.2f} GiB; compiled: {compiled(ours.forward, ours.sampler)}")
    if args.json:
        content = {
            "environment": utils.environment(device),
            "options": vars(args),
            "ceiling_flops_per_second": highest,
            "ceiling_of": of_what,
            "peak_bytes": memory,
            "compiled": compiled(ours.forward, ours.sampler),
            "rows": rows,
        }
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
