"""Several processes as torchrun starts them, against one process and against threads that exchange by hand."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import DIGITS, new_run, refused, state
from under_torchrun import COMMON, CONFIGS, MEASURE, divided_work, gradient, run_of, shorten_attacks, statistics, train

import data
import distributed
import main
import trainer
import utils
from checkpoints.files import load_checkpoint
from checkpoints.load import open_trained
from checkpoints.resume import shard_state
from config import Config
from config.checks import check_sizes
from distributed import World
from logger.metrics_log import read_log
from utils import UserError

HERE = Path(__file__).parent
SMALL = [*DIGITS, *"--batch_size 20 --n_valid 100 --buffer_size 100".split()]


def torchrun(script: Path, *options: str, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"--max_restarts={restarts}", str(script), *options]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", n_valid=COMMON["n_valid"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes did, by configuration, of each."""
    folder = tmp_path_factory.mktemp("ranks")
    status, out, err = end(torchrun(HERE / "under_torchrun.py", "steps", str(folder)))
    assert status == 0, err
    assert err.count("error: --batch_size 15 cannot be divided evenly among 2 processes") == 1
    both = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert [of_rank["refused"] for of_rank in both] == [2, 2]
    return {name: [of_rank[name] for of_rank in both] for name in both[0]}


class Twins:
    """Two runs in one process, each in a thread, that wait for each other where processes would."""

    def __init__(self, monkeypatch):
        self.rank, self.barrier, self.given = threading.local(), threading.Barrier(2, timeout=60), {}
        monkeypatch.setattr(distributed, "all_reduce_mean", self.mean)
        monkeypatch.setattr(distributed, "current_world", lambda: World(self.rank.value, 2))

    def exchanged(self, x):
        self.given[self.rank.value] = x.detach().clone()
        self.barrier.wait()
        result = (self.given[0] + self.given[1]) / 2
        self.barrier.wait()
        return result

    def mean(self, x):
        class Mean(torch.autograd.Function):
            forward = backward = staticmethod(lambda ctx, x: self.exchanged(x))

        return Mean.apply(x)

    def train(self, runs, n_steps=3):
        def one(rank, run):
            self.rank.value, backward = rank, run.loss_and_gradient

            def averaged(*inputs):
                parts = backward(*inputs)
                for p in run.model.parameters():
                    p.grad = self.exchanged(p.grad)
                return parts

            run.loss_and_gradient = averaged
            return train(run, n_steps)

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(one, (0, 1), runs))


def joined(both):
    """The images of a step of two processes, as one process has them."""
    pairs = zip(both[0]["inputs"], both[1]["inputs"], strict=True)
    return trainer.StepBatch(*(None if a is None else torch.cat([a, b]) for a, b in pairs))


class TestTwoProcesses:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_equal_two_shards_in_one_process_bit_for_bit(self, name, ranks, digits, monkeypatch):
        runs = [run_of(name, digits, World(rank, 2)) for rank in (0, 1)]
        for process, twin in zip(ranks[name], Twins(monkeypatch).train(runs), strict=True):
            assert process.keys() == twin.keys()
            for part in process.keys() - {"inputs"}:
                assert torch.equal(process[part], twin[part]), part

    @pytest.mark.parametrize("name", CONFIGS)
    def test_keep_the_same_weights_and_share_the_batches_of_one_process(self, name, ranks, digits):
        one, other = ranks[name]
        for part in one.keys() - {"inputs", "buffer", "age"}:
            assert torch.equal(one[part], other[part]), part
        assert not (one["buffer"] == other["buffer"]).flatten(1).all(1).any()
        assert len(one["buffer"]) == len(other["buffer"]) == (COMMON | CONFIGS[name])["buffer_size"] // 2
        whole = run_of(name, digits).draw_step_batch(chain_length=1)[0]
        for part, expected in zip(joined(ranks[name]), whole, strict=True):
            if part is not None and part.shape[1:] == whole.x.shape[1:] and expected is not whole.samples:
                assert torch.equal(part, expected)
        assert torch.equal(joined(ranks[name]).y, whole.y)

    @pytest.mark.parametrize("name", ["plain", "synced"])
    def test_have_the_gradient_of_one_process(self, name, ranks, digits, monkeypatch):
        monkeypatch.setitem(CONFIGS[name], "sync_batch_norm", False)  # torch's batch normalisation
        run = run_of(name, digits)
        run.loss_and_gradient(joined(ranks[name]))
        expected = gradient(run)
        for process in ranks[name]:
            assert (process["gradient"] - expected).norm() < 1e-6 * expected.norm()
            torch.testing.assert_close(process["statistics"], statistics(run))
        alone = run_of(name, digits)
        alone.loss_and_gradient(ranks[name][0]["inputs"])
        assert (gradient(alone) - expected).norm() > 0.1 * expected.norm()  # the half of it is another one

    def test_divide_work_as_one_process_does_it(self, ranks):
        results, after, kind, message = divided_work()
        assert kind == "ValueError" and len(results) == 5
        for rank, found in enumerate(ranks["divided"]):
            assert str(found[0]) == str(results) and found[1] == after
            assert found[2:] == [["RuntimeError", "ValueError"][rank], message]

    def test_agree_on_what_is_absent_if_one_of_them_fails_between_two_parts_of_a_metric(self, ranks):
        failed = ["RuntimeError: a", "ValueError: a"]
        assert ranks["attempts"] == [[{"metric": reason}, ["0", "1", "2"]] for reason in failed]


class TestCommandLine:
    def test_a_killed_process_changes_nothing(self, tmp_path, capsys, digits, monkeypatch):
        """torchrun starts all anew; they end as undisturbed, and measure; one goes on from the checkpoint of two."""
        options = "--recipe sada-jem --max_steps 20 --ckpt_every 10 --resume auto".split()
        options = ["dies", str(tmp_path / "runs"), *SMALL, *options]
        status, out, err = end(torchrun(HERE / "under_torchrun.py", *options, restarts=1))
        assert status == 0 and "a process of this run has ended" in err, err
        (run,) = (tmp_path / "runs").iterdir()
        found, size = load_checkpoint(run / "ckpt" / "last.pt"), (run / "ckpt" / "last.pt").stat().st_size
        assert int(out.partition(" MB for checkpoints")[0].split()[-1]) == pytest.approx(3 * size / 1e6, abs=1)
        assert found["state"]["step"] == 20 and len(read_log(run / "metrics.jsonl")) == 2
        assert [sum(line["sgld/classes"]) for line in read_log(run / "metrics.jsonl")] == [10 * 64] * 2
        with monkeypatch.context() as patches:
            cfg = Config.from_dict(found["config"], "")
            runs = [trainer.Trainer(cfg, digits, torch.device("cpu"), World(rank, 2)) for rank in (0, 1)]
            twins = Twins(patches).train(runs, 20)
        for rank, (twin, own) in enumerate(zip(twins, found["state"]["processes"], strict=True)):
            assert all(torch.equal(twin[f"model.{name}"], value) for name, value in found["state"]["model"].items())
            assert torch.equal(twin["buffer"], found["state"]["buffer"]["images"][rank::2])
            assert torch.equal(runs[rank].rng.sgld.get_state(), own["rng"]["sgld"])
        assert open_trained({"mode": "sample", "load_ckpt": str(run)}).cfg.n_chains == 32  # half of 64: of one process
        shorten_attacks(monkeypatch.setattr)
        assert main.main([*MEASURE, str(run), "--feature_ckpt", str(run)]) == 0
        two, one = (json.loads((run / name / "results.json").read_text()) for name in ("eval", "eval-2"))
        assert all(two[name]["results"] == one[name]["results"] != {} for name in one["options"]["eval"].split(","))
        pictures = [{path.name for path in (run / name).glob("*.png")} for name in ("eval", "eval-2")]
        assert pictures[0] == pictures[1] and len(pictures[0]) > 3 and not (run / "eval-3").exists()
        assert main.main(["--resume", str(run), "--recipe", "sada-jem", "--max_steps", "22"]) == 0  # keeps its batch
        assert "The run had 2 processes and goes on with 1" in capsys.readouterr().out
        assert state(run)["step"] == 22 and "processes" not in state(run)
        more = [trainer.Trainer(cfg, digits, torch.device("cpu"), World(rank, 2)) for rank in (0, 1)]
        for one in more:  # chains of their own, though both have the state of one
            one.resume(state(run))
        assert not torch.equal(*(one.rng.sgld.get_state() for one in more))

    @pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
    def test_signals_to_one_process_are_for_all(self, tmp_path):
        options = [*SMALL, "--batch_size", "2", "--max_steps", "100000", "--logdir", str(tmp_path / "runs")]
        process = torchrun(HERE.parent / "main.py", *options)
        wait_for(lambda: any(path.read_text().count("\n") > 1 for path in tmp_path.rglob("metrics.jsonl")), process)
        (checkpoint,) = tmp_path.glob("runs/*/ckpt/last.pt")
        first = load_checkpoint(checkpoint)["state"]["step"]
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        one = next(int(p) for p in children if b"RANK=1" in Path(f"/proc/{p}/environ").read_bytes().split(b"\0"))
        before = checkpoint.stat().st_mtime_ns
        os.kill(one, 10)  # SIGUSR1
        wait_for(lambda: checkpoint.stat().st_mtime_ns > before, process)
        saved = load_checkpoint(checkpoint)["state"]["step"]
        os.kill(one, 15)
        status, out, err = end(process)
        assert status != 0 and err.count("exitcode  : 143") == 2, err
        last = load_checkpoint(checkpoint)
        assert first == 0 < saved < 600  # an epoch, which ends with a checkpoint, has 668 steps
        assert f"Stopped after step {last['state']['step']};" in out and last["state"]["step"] >= saved
        assert out.count("Stopped") == 1 and f'File "{HERE.parent / "main.py"}"' not in err
        assert len(last["state"]["processes"]) == 2


class TestPlace:
    def test_a_state_of_other_processes_is_divided_anew(self):
        buffer = {"images": torch.arange(12)}
        three = {"step": 5, "processes": [{"rng": rank} for rank in range(3)], "buffer": buffer}
        assert [shard_state(three, World(rank, 3))["rng"] for rank in range(3)] == [0, 1, 2]
        parts = [shard_state(three, World(rank, 2)) for rank in range(2)]
        assert [part["rng"] for part in parts] == [0, 0]
        assert sorted(torch.cat([part["buffer"]["images"] for part in parts]).tolist()) == list(range(12))
        assert shard_state(three, World())["buffer"]["images"].tolist() == list(range(12))

    @pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
    def test_a_number_that_is_none(self, name, monkeypatch, capsys):
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(variable, "x1" if variable == name else "2")
        line = refused(capsys)
        assert line.startswith("error: start several processes with torchrun") and "'x1'" in line

    def test_processes_find_each_other_after_others_have_gone(self):
        """A process that was started and ended before it was answered, and a whole attempt, leave their traces."""
        whole = torch.distributed.HashStore()
        whole.set("ticket/1", "of one that has gone")
        for attempt in ("first", "second"):
            with ThreadPoolExecutor() as threads:
                parts = list(threads.map(distributed.unused_part, (whole, whole), (0, 1), (2, 2), timeout=20))
            assert not parts[1].check(["attempt"])
            parts[0].set("attempt", attempt)
            assert parts[1].get("attempt").decode() == attempt

    @pytest.mark.parametrize(
        "variables, n",
        [
            ("SLURM_JOB_ID=7 SLURM_NTASKS=2 SLURM_PROCID=1", 2),
            ("SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=4 ENVIRONMENT=BATCH", 4),  # srun -n 4 in a script
            ("OMPI_COMM_WORLD_SIZE=2 SLURM_NTASKS=8 SLURM_PROCID=0 ENVIRONMENT=BATCH", 2),  # mpirun -n 2 in a script
            ("SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1", 1),  # srun -n 1 in a job of 8 tasks
            ("SLURM_NTASKS=8 SLURM_PROCID=0 ENVIRONMENT=BATCH", 1),  # the script itself
            ("SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 RANK=0 WORLD_SIZE=1", 1),  # srun torchrun
        ],
    )
    def test_equal_runs_of_srun_and_mpirun_are_refused(self, variables, n, monkeypatch, capsys):
        for pair in variables.split():
            monkeypatch.setenv(*pair.split("="))
        words = "error: there is no option" if n == 1 else f"error: this is one of {n} equal runs"
        assert refused(capsys, "--no_such_option").startswith(words)

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"p_x_batch_size": 15}, "--p_x_batch_size 15 cannot be divided evenly among 2 processes"),
            ({"buffer_size": 101}, "--buffer_size 101 cannot be divided evenly among 2 processes"),
            ({"outlier_weight": 1.0, "outlier_batch_size": 15}, "--outlier_batch_size 15 cannot be divided evenly"),
            ({"norm": "batch", "batch_size": 2, "stages": 4}, "no variance"),
            ({"class_cond": True, "buffer_size": 110}, "among 2 processes and 10 classes"),
        ],
    )
    def test_what_cannot_be_divided(self, changes, words):
        cfg = Config(**({"batch_size": 20, "buffer_size": 100} | changes))
        n_images = {"batch_size": 1000} | ({"p_x_batch_size": 1000} if cfg.separate_p_x else {})
        check_sizes(cfg, n_images, 10, 1, (1, 8, 8))
        with pytest.raises(UserError, match=words):
            check_sizes(cfg, n_images, 10, 2, (1, 8, 8))

    def test_devices(self, monkeypatch):
        with pytest.raises(UserError, match="torchrun --nproc_per_node=2 main.py"):
            utils.pick_device("0,1")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        assert utils.pick_device("3") == torch.device("cuda", 3)
        for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, known=capability: known)
            assert utils.pick_dtype("auto", torch.device("cuda", 3)) == dtype
        for name, value in {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        assert utils.pick_device("0") == torch.device("cuda", 1)
        assert utils.pick_device("2,3") == torch.device("cuda", 3)
        with pytest.raises(UserError, match="2 processes on this machine need a GPU each"):
            monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
            utils.pick_device("0")


def test_images_that_stay_on_the_host(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10_000))
    gpu = torch.device("cuda", 0)
    assert [data.stays_on_host(n, gpu, "auto") for n in (2000, 2001)] == [False, True]
    assert [data.stays_on_host(5000, gpu, where) for where in ("cpu", "gpu")] == [True, False]
    assert not data.stays_on_host(5000, torch.device("cpu"), "auto")
    asked = []
    monkeypatch.setattr(data, "stays_on_host", lambda n_bytes, device, where: asked.append(where))
    new_run([*SMALL, "--max_steps", "1", "--data_device", "gpu"], tmp_path)
    assert asked == ["gpu"]
