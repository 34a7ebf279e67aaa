"""Where the time of a training step goes, by torch.profiler.

python benchmarks/profile_step.py --depth 28 --width 10 --batch_size 128
"""

import sys
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.command import run_script
from benchmarks.throughput import clock, options, prepare, synthetic  # noqa: E402
from trainer import Trainer  # noqa: E402

KINDS = {  # the first kind with a word of an operation's or kernel's name counts
    "elementwise (fused)": ("triton_poi",),
    "reductions (fused)": ("triton_red", "triton_per"),
    "noise": ("normal_", "uniform_", "random_", "distribution", "philox"),
    "convolution": (
        "conv",
        "gemm",
        "cutlass",
        "xmma",
        "implicit",
        "sm80",
        "sm90",
        "wgrad",
        "dgrad",
        "mkldnn",
        "nvjet",
        "cudnn",
    ),
    "optimiser": ("adam", "foreach", "multi_tensor", "sgd"),
    "copies": ("copy", "memcpy", "memset", "clone", "contiguous", "cat", "index", "gather", "zero_", "fill_"),
    "reductions": ("sum", "mean", "norm", "softmax", "logsumexp", "reduce", "max"),
    "elementwise": ("elementwise", "leaky_relu", "add", "mul", "silu", "where", "div", "sub", "triton", "isfinite"),
}


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in name.lower() for word in words)), "other")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    device, cfg = prepare(args)
    on_gpu = device.type == "cuda"
    run = Trainer(cfg, synthetic(5000, (3, 32, 32), device), device)
    for run.step in (1, 2):  # warm-up
        run.training_step()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        before = clock(device)  # the profiler itself takes a second to start and to stop
        for _ in range(args.steps):
            run.training_step()
        wall = (clock(device) - before) / args.steps

    seconds: dict[str, float] = {}
    operations = profiler.key_averages()
    for event in operations:
        time = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 / args.steps
        seconds[kind_of(event.key)] = seconds.get(kind_of(event.key), 0) + time
    seconds["gaps"] = max(0.0, wall - sum(seconds.values()))
    print(
        f"one training step of WRN-{args.depth}-{args.width}, batch {args.batch_size}, {args.sgld_step} SGLD steps, "
        f"{str(run.dtype).removeprefix('torch.')}: {1e3 * wall:.1f} ms under the profiler"
    )
    for kind, time in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{kind:12} {1e3 * time:9.1f} ms  {100 * time / wall:5.1f} %")
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(operations.table(sort_by=key, row_limit=15, max_name_column_width=60))


if __name__ == "__main__":
    run_script(main)
