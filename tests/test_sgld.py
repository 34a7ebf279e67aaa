"""Langevin chains against closed forms, and the replay buffer's bookkeeping."""

import math

import pytest
import torch

from models import build_model, sampling_copy
from sgld import SGLD, ReplayBuffer, annealed_chain, normal_like, reference_chain, uniform_images

SHAPE = (3, 8, 8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(mean, std):
    return lambda x: -0.5 * ((x - mean) / std).square().flatten(1).sum(1)


@pytest.mark.parametrize("run", [reference_chain, lambda f, *a: SGLD(f)(*a)], ids=["reference", "engine"])
def test_one_step_on_a_gaussian_against_the_closed_form(run):
    x = uniform_images(4, SHAPE, generator())
    noise = normal_like(x, generator(1))
    chain = run(gaussian(0.5, 2.0), x, 1, 0.3, 0.1, generator(1))
    slope = -(x - 0.5) / 4
    torch.testing.assert_close(chain.x, x + 0.3 * slope + 0.1 * noise)
    torch.testing.assert_close(chain.grad, slope)
    assert chain.x.dtype == torch.float32 and not chain.x.requires_grad


def test_stationary_distribution_on_a_gaussian():
    """With step a and noise s, x <- (1 - a) x + s z ends in N(0, s^2 / (1 - (1 - a)^2)), whatever its start."""
    a, s = 0.1, 0.5
    x = uniform_images(500, (1, 4, 4), generator())
    end = SGLD(gaussian(0.25, 1.0))(x, 100, a, s, generator(1)).x
    n, variance = end.numel(), s**2 / (1 - (1 - a) ** 2)
    assert abs(end.mean() - 0.25) < 4 * math.sqrt(variance / n)
    assert abs(end.var() - variance) < 4 * variance * math.sqrt(2 / n)


def test_mean_after_some_steps_decays_as_theory_says():
    x = torch.ones(2000, 1, 4, 4)
    end = SGLD(gaussian(0.0, 1.0))(x, 10, 0.1, 0.05, generator()).x
    assert end.mean().item() == pytest.approx(0.9**10, abs=4 * 0.11 / math.sqrt(end.numel()))


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "batch"}, {"norm": "instance"}, {"norm": "group"}, {"dropout_rate": 0.3}, {"activation": "silu"}],
)
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2, 0])], ids=["log p(x)", "log p(x, y)"])
def test_engine_equals_reference_in_fp32(options, labels):
    torch.manual_seed(0)
    model = build_model(3, 3, 10, 1, **options)
    x = uniform_images(4, SHAPE, generator())
    fast_model = sampling_copy(model, torch.float32)
    model.train() if options.get("norm") == "batch" else model.eval()
    slow = reference_chain(model.log_density, x, 10, 1.0, 0.01, generator(1), labels)
    fast = SGLD(fast_model.log_density)(x, 10, 1.0, 0.01, generator(1), labels)
    torch.testing.assert_close(fast.x, slow.x, rtol=0, atol=1e-6)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["none", "batch", "instance", "group"])
def test_bf16_gradients_are_as_good_as_those_of_mixed_precision(norm):
    """Against fp32, the bf16 copy is nowhere worse than torch.autocast, the usual way to compute in bf16."""
    torch.manual_seed(0)
    model = build_model(3, 10, 16, 2, norm=norm)
    x = uniform_images(16, (3, 16, 16), generator())

    def gradient(model, dtype=torch.float32):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return SGLD(model.log_density)(x, 1, 1.0, 0.0, generator()).grad.flatten(1)

    exact = gradient(sampling_copy(model, torch.float32))
    ours = gradient(sampling_copy(model, torch.bfloat16))
    usual = gradient(sampling_copy(model, torch.float32), torch.bfloat16)
    assert (ours - exact).norm() < 1.1 * (usual - exact).norm()
    assert (
        torch.cosine_similarity(ours, exact).mean()
        > {"none": 0.995, "group": 0.98, "batch": 0.96, "instance": 0.94}[norm]
    )


def test_compiled_engine_equals_eager():
    torch.manual_seed(0)
    density = sampling_copy(build_model(1, 3, 10, 1), torch.float32).log_density
    x = uniform_images(4, (1, 8, 8), generator())
    eager = SGLD(density)(x, 5, 1.0, 0.01, generator(1))
    compiled = SGLD(density, compile=True)(x, 5, 1.0, 0.01, generator(1))
    torch.testing.assert_close(compiled.x, eager.x, rtol=0, atol=1e-6)


def test_without_a_compiler_the_engine_warns_once_and_runs(monkeypatch):
    def broken(function, **options):
        def fail(*args):
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    x = uniform_images(4, SHAPE, generator())
    sgld = SGLD(gaussian(0.0, 1.0), compile=True)
    with pytest.warns(RuntimeWarning, match="without it") as caught:
        chain = sgld(x, 5, 0.1, 0.01, generator(1))
    assert len(caught) == 1
    torch.testing.assert_close(chain.x, SGLD(gaussian(0.0, 1.0))(x, 5, 0.1, 0.01, generator(1)).x)


def test_an_error_of_the_density_itself_is_not_taken_for_a_missing_compiler():
    def broken(x):
        raise ValueError("my density")

    with pytest.raises(ValueError, match="my density"):
        SGLD(broken, compile=True)(uniform_images(4, SHAPE, generator()), 1, 0.1, 0.01, generator())


def test_chain_leaves_its_start_alone_and_follows_its_generator():
    x = uniform_images(4, SHAPE, generator())
    before, sgld = x.clone(), SGLD(gaussian(0.0, 1.0))
    first, second, other = (sgld(x, 3, 0.1, 0.01, generator(seed)).x for seed in (1, 1, 2))
    assert torch.equal(x, before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_no_parameter_gradient_is_made():
    model = build_model(1, 3, 10, 1)
    SGLD(model.log_density)(uniform_images(2, (1, 8, 8), generator()), 2, 1.0, 0.01, generator())
    assert all(p.grad is None for p in model.parameters())


def test_annealed_chain_against_its_formula():
    """10 levels from 1 to 0.1, even in log; step 0.01 (level / 0.1)^2; noise step * std / lr; clamped each time."""
    density, x = gaussian(0.2, 5.0), uniform_images(3, SHAPE, generator())
    frames = annealed_chain(SGLD(density), x, 2.0, 0.04, generator(1))
    assert frames.shape == (301, 3, *SHAPE)
    assert frames.abs().max() <= 1
    expected, rng = x, generator(1)
    for i in range(300):
        step = 0.01 * (10 ** (-(i // 30) / 9) / 0.1) ** 2
        gradient = -(expected - 0.2) / 25
        expected = (expected + step * gradient + step * 0.02 * normal_like(x, rng)).clamp(-1, 1)
        torch.testing.assert_close(frames[i + 1], expected, rtol=1e-4, atol=1e-5)
    some = annealed_chain(SGLD(density), x, 2.0, 0.04, generator(1), every=10)
    assert torch.equal(some, frames[::10])


def test_uniform_images():
    x = uniform_images(400, SHAPE, generator())
    assert x.shape == (400, *SHAPE) and x.is_contiguous(memory_format=torch.channels_last)
    assert -1 <= x.min() < -0.99 and 0.99 < x.max() <= 1
    assert x.var().item() == pytest.approx(1 / 3, abs=0.01)


class TestReplayBuffer:
    def test_places_are_all_different_and_cover_the_buffer(self):
        buffer, rng = ReplayBuffer(50, SHAPE, generator()), generator(1)
        seen = set()
        for _ in range(60):
            _, index = buffer.draw(10, 0.0, rng)
            assert len(set(index.tolist())) == 10
            seen |= set(index.tolist())
        assert seen == set(range(50))

    def test_draw_returns_the_images_of_its_places(self):
        buffer = ReplayBuffer(20, SHAPE, generator())
        x, index = buffer.draw(8, 0.0, generator(1))
        assert torch.equal(x, buffer.images[index])

    def test_store_writes_its_places_and_no_other(self):
        buffer = ReplayBuffer(20, SHAPE, generator())
        before = buffer.images.clone()
        x, index = buffer.draw(8, 0.0, generator(1))
        buffer.store(index, x + 5)
        others = [i for i in range(20) if i not in index.tolist()]
        assert torch.equal(buffer.images[index], before[index] + 5)
        assert torch.equal(buffer.images[others], before[others])

    @pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 1.0])
    def test_reinitialisation_rate(self, rate):
        buffer, rng, n = ReplayBuffer(100, SHAPE, generator()), generator(1), 0
        buffer.images.fill_(7)  # no fresh image has a 7
        for _ in range(100):
            x, _ = buffer.draw(50, rate, rng)
            fresh = (x != 7).flatten(1).any(1)
            assert (x[fresh].abs() <= 1).all() and (x[~fresh] == 7).all()
            n += fresh.sum().item()
        assert abs(n / 5000 - rate) <= 4 * math.sqrt(rate * (1 - rate) / 5000)

    def test_age_counts_chains_since_the_fresh_start(self):
        buffer, rng = ReplayBuffer(10, SHAPE, generator()), generator(1)
        for _ in range(3):
            x, index = buffer.draw(10, 0.0, rng)
            buffer.store(index, x)
        assert buffer.age.tolist() == [3] * 10
        x, index = buffer.draw(4, 1.0, rng)
        buffer.store(index, x)
        assert sorted(buffer.age.tolist()) == [1] * 4 + [3] * 6

    def test_images_that_are_not_finite_are_replaced(self):
        buffer = ReplayBuffer(10, SHAPE, generator())
        buffer.images[3, 0, 0, 0] = math.nan
        buffer.images[5, 1, 2, 3] = math.inf
        buffer.age.fill_(9)
        x, index = buffer.draw(10, 0.0, generator(1))
        assert x.isfinite().all()
        buffer.store(index, x)
        assert buffer.images.isfinite().all()
        assert {i: a for i, a in enumerate(buffer.age.tolist()) if a != 10} == {3: 1, 5: 1}

    def test_state_survives(self):
        one, two = ReplayBuffer(10, SHAPE, generator()), ReplayBuffer(10, SHAPE, generator(1))
        one.age.fill_(4)
        two.load_state_dict(one.state_dict())
        assert torch.equal(one.images, two.images) and torch.equal(one.age, two.age)
