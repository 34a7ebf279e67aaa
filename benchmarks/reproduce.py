"""Train or measure a named run: its exact options, once.

    python benchmarks/reproduce.py digits                                     # trains
    python benchmarks/reproduce.py digits --test                              # --mode test on the newest such run
    python benchmarks/reproduce.py cifar10_cpu_robust --data_dir PATH         # further options go to main.py
    python benchmarks/reproduce.py cifar10_cpu_robust_oe --data_dir PATH --load_ckpt runs/<run of cifar10_cpu_robust>

It prints the command before it runs it. The cifar10_cpu runs read a folder of images; ``--dataset cifar10`` after
their names gives them the original files.
"""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

MAIN = Path(__file__).parent.parent / "main.py"

DIGITS = (
    "--dataset digits --depth 10 --width 2 --lr 1e-3 --warmup_steps 100 --batch_size 64 --max_steps 801 --eval_every 5"
)
FASHION = (
    "--dataset fashion_mnist --depth 10 --width 2 --lr 1e-3 --warmup_steps 200 --batch_size 64 --max_steps 3001 "
    "--sigma 0.1 --ema 0.999"
)
CIFAR = (
    "--gpu cpu --recipe m-jem --no_separate_energy --dataset folder --depth 16 --width 2 --schedule cosine "
    "--warmup_steps 400 --max_steps 8500 --ema 0.999"
)
CIFAR_CHAINS = "--start class_gaussian --p_x_batch_size 32 --mean_energy_l2 0.1 --mean_energy_form means"
CIFAR_JEM = (
    "--gpu cpu --dataset folder --depth 16 --width 2 --lr 1e-3 --warmup_steps 500 --batch_size 64 --max_steps 5001 "
    "--ema 0.999"
)
CIFAR_OE = (
    "--gpu cpu --recipe oe-jem --dataset folder --depth 16 --width 2 --buffer_size 5000 --epochs 4 --decay_epochs 2,3 "
    "--adversarial_steps 1"
)
TRAIN = {  # name: the options that train it
    "digits": "--recipe sada-jem --dataset digits --depth 10 --width 2 --batch_size 64 --schedule cosine "
    "--warmup_steps 60 --max_steps 601 --buffer_size 2000 --gif_every 300 --eval_every 5",
    "digits_jem": f"--mode energy_train {DIGITS} --buffer_size 2000 --gif_every 300",
    "digits_baseline": f"--mode baseline_train {DIGITS}",
    "fashion_mnist": f"--mode energy_train {FASHION} --buffer_size 5000",
    "fashion_mnist_baseline": f"--mode baseline_train {FASHION}",
    "cifar10_gpu": "--recipe sada-jem --schedule cosine --warmup_steps 200 --max_steps 3510 --ema 0.999 --eval_every 2",
    "cifar10_cpu": f"--mode energy_train {CIFAR} {CIFAR_CHAINS} --p_x_weight 0.2 --buffer_size 5000",
    "cifar10_cpu_weight_1": f"--mode energy_train {CIFAR} {CIFAR_CHAINS} --buffer_size 5000",
    "cifar10_cpu_short": "--gpu cpu --recipe m-jem --no_separate_energy --dataset folder --depth 10 --width 2 --ema "
    f"0.99 {CIFAR_CHAINS} --p_x_weight 0.2 --schedule cosine --warmup_steps 100 --max_steps 1700 --buffer_size 5000 "
    "--eval_every 3",
    "cifar10_cpu_oe": f"{CIFAR_OE} --lr 0.01 --p_x_weight 0.2 --adversarial_eps 0.1 --outlier_images "
    "smooth:0.45,shapes:0.5,mixed:0.05",
    "cifar10_cpu_robust": f"--mode energy_train {CIFAR} {CIFAR_CHAINS} --p_x_weight 0.2 --buffer_size 5000 "
    "--adversarial_eps 0.1 --adversarial_steps 1",
    "cifar10_cpu_robust_oe": f"{CIFAR_OE} --lr 0.005 --p_x_weight 0.5 --adversarial_eps 0.05 --outlier_images "
    "smooth:0.48,shapes:0.5,mixed:0.02",
    "cifar10_cpu_baseline": f"--mode baseline_train {CIFAR}",
    "cifar10_cpu_jem": f"--mode energy_train {CIFAR_JEM} --sgld_step 10 --buffer_size 5000",
    "cifar10_cpu_jem_baseline": f"--mode baseline_train {CIFAR_JEM}",
    "cifar10": "--mode energy_train",  # the method's own settings, which are the defaults
    "cifar10_baseline": "--mode baseline_train",
}
SHORT = (  # what two CPU cores measure in a few minutes
    "--ood_datasets noise,constant,interp,shuffled,fashion_mnist --max_images 200 --attack_images 40 --one_epsilon "
    "--refine_steps 3 --n_samples 100 --ais_chains 50 --ais_temperatures 200"
)
SHORT_TIMES = (
    "Shortened: one and a half to six minutes on two CPU cores, of which robustness one to three, quality one (with "
    "Inception's weights), likelihood half a minute to two, the others seconds."
)
TEST = dict.fromkeys(("digits_jem", "digits_baseline"), SHORT) | {"digits": f"{SHORT} --n_sample_steps 25"}


def command(name: str, test: bool, further: list[str], logdir: str) -> list[str]:
    """The command line of a run; its measurement takes the newest run of that name in ``logdir``."""
    program = [sys.executable, str(MAIN), "--logdir", logdir]
    if not test:
        return [*program, *TRAIN[name].split(), "--note", name, *further]
    runs = [path for path in Path(logdir).glob(f"*_train_{name}*") if re.search(rf"{name}(-\d+)?$", path.name)]
    runs.sort(key=lambda path: (path.name.partition("_")[0], len(path.name), path.name))  # by time, and -10 after -2
    if not runs:
        print(f"error: no run of {name} in {logdir}: train it first", file=sys.stderr)
        raise SystemExit(2)
    return [*program, "--mode", "test", "--load_ckpt", str(runs[-1]), *TEST.get(name, "").split(), *further]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", choices=TRAIN)
    parser.add_argument("--test", action="store_true", help="measure the newest run of this name")
    parser.add_argument("--logdir", default="runs")
    args, further = parser.parse_known_args()
    line = command(args.name, args.test, further, args.logdir)
    print(shlex.join(line), flush=True)
    if args.test and args.name in TEST:
        print(SHORT_TIMES, flush=True)
    os.execv(line[0], line)  # signals reach the training itself


if __name__ == "__main__":
    main()
