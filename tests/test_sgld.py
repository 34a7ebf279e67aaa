"""Langevin chains against closed forms, and the replay buffer's bookkeeping."""

import math
import random

import pytest
import torch
from small_runs import reference_chain, seeded

from models import build_model, frozen_sampler_model
from sgld import SGLD, ReplayBuffer, Sampler, annealed_chain, input_gradient, normal_like, uniform_images

SHAPE, BF16 = (3, 8, 8), torch.bfloat16


def gaussian(mean, std):
    return lambda x: -0.5 * ((x - mean) / std).square().flatten(1).sum(1)


@pytest.mark.parametrize("run", [reference_chain, lambda f, *a: SGLD(f)(*a)], ids=["reference", "engine"])
def test_one_step_on_a_gaussian_against_the_closed_form(run):
    x = uniform_images(4, SHAPE, seeded())
    noise = normal_like(x, seeded(1))
    chain = run(gaussian(0.5, 2.0), x, 1, 0.3, 0.1, seeded(1))
    slope = -(x - 0.5) / 4
    torch.testing.assert_close(chain.x, x + 0.3 * slope + 0.1 * noise)
    torch.testing.assert_close(chain.grad, slope)
    assert chain.x.dtype == torch.float32 and not chain.x.requires_grad


ALL = {"grad_clamp": 0.01, "clamp": True, "normalize": True, "compile": True}
CHAINS = [({"norm": norm}, {}) for norm in ("none", "batch", "instance", "group")]
CHAINS += [({"dropout_rate": 0.3}, {}), ({"activation": "silu"}, {}), ({"norm": "batch"}, ALL)]
CHAINS += [({"norm": "batch"}, {name: ALL[name]}) for name in ("grad_clamp", "clamp", "normalize")]


@pytest.mark.parametrize("options, given", CHAINS, ids=str)
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2, 0])], ids=["log p(x)", "log p(x, y)"])
def test_engine_equals_reference_in_fp32(options, given, labels):
    torch.manual_seed(0)
    model = build_model((3, 32, 32), 3, 10, 1, **options)
    x = uniform_images(4, SHAPE, seeded())
    fast_model = frozen_sampler_model(model, torch.float32)
    model.train() if options.get("norm") == "batch" else model.eval()
    limits = {name: value for name, value in given.items() if name != "compile"}
    chain = (4, 3.0, 0.01) if limits else (10, 1.0, 0.01)
    slow = reference_chain(model.log_density, x, *chain, seeded(1), labels, **limits)
    fast = SGLD(fast_model.log_density, **given)(x, *chain, seeded(1), labels)
    free = SGLD(fast_model.log_density)(x, *chain, seeded(1), labels)
    atol = 1e-4 if "compile" in given else 1e-5 if limits else 1e-6
    torch.testing.assert_close(fast.x, slow.x, rtol=0, atol=atol)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-4, atol=atol)
    assert not limits or (free.x - fast.x).abs().max() > 0.02
    assert "clamp" not in limits or fast.x.abs().max() <= 1


@pytest.mark.parametrize("norm", ["none", "batch", "instance", "group"])
def test_bf16_gradients_are_those_of_mixed_precision(norm):
    """The copy has the gradients of the network itself, to the last bit, and they are near those of fp32."""
    torch.manual_seed(0)
    model = build_model((3, 32, 32), 10, 16, 2, norm=norm)
    for p in model.parameters():
        p.data.mul_(1 + torch.rand(p.shape) / 10)  # as training leaves them: no number that bf16 holds exactly
    x = uniform_images(16, (3, 16, 16), seeded())
    exact, ours = (input_gradient(frozen_sampler_model(model, d).log_density, x, None) for d in (torch.float32, BF16))
    model.dtype = BF16
    assert torch.equal(ours, input_gradient(model.log_density, x, None))
    least = {"none": 0.995, "group": 0.98, "batch": 0.96, "instance": 0.94}[norm]
    assert torch.cosine_similarity(ours.flatten(1), exact.flatten(1)).mean() > least


def test_annealed_chain_against_its_formula():
    """10 levels from 1 to 0.1, even in log; step and noise are the chain's times level^2; clamped each time."""
    density, x = gaussian(0.2, 5.0), uniform_images(3, SHAPE, seeded())
    frames = annealed_chain(SGLD(density), x, 2.0, 0.04, seeded(1))
    assert frames.shape == (301, 3, *SHAPE) and frames.abs().max() <= 1 and torch.equal(frames[0], x)
    expected, rng = x, seeded(1)
    for i in range(300):
        factor = 10 ** (-2 * (i // 30) / 9)
        gradient = -(expected - 0.2) / 25
        expected = (expected + factor * 2.0 * gradient + factor * 0.04 * normal_like(x, rng)).clamp(-1, 1)
        torch.testing.assert_close(frames[i + 1], expected, rtol=1e-4, atol=1e-5)
    of_class = SGLD(lambda x, y: density(x - y[:, None, None, None]))
    assert torch.equal(annealed_chain(of_class, x, 2.0, 0.04, seeded(1), 10, torch.zeros(3)), frames[::10])


def sampler(size=20, n_classes=2, reinit_freq=0.0, seed=1):
    """A sampler whose chains stay where they start, from a buffer of the class numbers."""
    buffer = ReplayBuffer(size, n_classes, class_numbers, seeded())
    engine = SGLD(lambda x, y=None: 0 * x.sum((1, 2, 3)))
    return Sampler(engine, buffer, fresh_sevens, reinit_freq, 1.0, 0.0, seeded(seed), random.Random(seed))


def class_numbers(classes, rng):
    return torch.tensor(classes, dtype=torch.float32)[:, None, None, None].expand(-1, *SHAPE).contiguous()


def fresh_sevens(classes, rng):
    return class_numbers(classes, rng) + 7


class TestSampler:
    @pytest.mark.parametrize("class_cond", [False, True])
    def test_places_are_all_different_and_cover_the_buffer(self, class_cond):
        one, seen = sampler(50), set()
        for _ in range(80):
            _, index, _ = one.draw(10, class_cond)
            assert len(set(index.tolist())) == 10
            seen |= set(index.tolist())
        assert seen == set(range(50))

    @pytest.mark.parametrize("class_cond", [False, True])
    def test_chains_climb_the_density_of_their_class(self, class_cond):
        def density(x, y=None):
            return -(x.flatten(1) - (5.0 if y is None else y[:, None] / 10)).square().sum(1)

        one = sampler(30, 3)
        one.engine, one.step_size = SGLD(density), 0.25
        x, y, measured = one(12, 3, class_cond)
        assert (y is not None) == class_cond
        goal = y / 10 if class_cond else torch.full((12,), 5.0)
        _, places, _ = (again := sampler(30, 3)).draw(12, class_cond)
        start = again.buffer.images[places]  # a step of 0.25 halves the way to the goal
        expected = goal[:, None, None, None] + (start - goal[:, None, None, None]) / 2**3
        torch.testing.assert_close(x, expected.expand_as(x))
        slope = 4 * (x - goal[:, None, None, None])  # where the last step began, twice as far from the goal
        assert measured["sgld/gradient_norm"].item() == pytest.approx(slope.flatten(1).norm(dim=1).mean().item())
        assert measured["sgld/saturated_share"] == (x.abs() >= 1).float().mean()
        torch.testing.assert_close(one.buffer.images[places], x)
        others = [i for i in range(30) if i not in places.tolist()]
        assert torch.equal(one.buffer.images[others], again.buffer.images[others])

    @pytest.mark.parametrize("size, n_classes", [(20, 2), (53, 5), (31, 7)])
    def test_chains_of_a_class_stay_in_its_part_of_the_buffer(self, size, n_classes):
        one, counts = sampler(size, n_classes), torch.zeros(n_classes)
        for _ in range(50):
            x, index, y = one.draw(12, class_cond=True)
            assert (x == y[:, None, None, None]).all() and torch.equal(index * n_classes // size, y)
            one.buffer.store(index, x)
            counts += y.bincount(minlength=n_classes)
        assert counts.max() - counts.min() <= 25
        assert len(set(torch.cat([one.draw(12, class_cond=True)[1] for _ in range(99)]).tolist())) == size

    @pytest.mark.parametrize("class_cond", [False, True])
    @pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 1.0])
    def test_reinitialisation_rate(self, rate, class_cond):
        one, n = sampler(100, 7, rate), torch.zeros(7)
        for _ in range(1000):
            x, _, y = one.draw(5, class_cond)
            fresh = (x >= 7).all((1, 2, 3))
            if class_cond:
                assert torch.equal(x[fresh], fresh_sevens(y[fresh].tolist(), None))
            n += (x[fresh][:, 0, 0, 0] - 7).long().bincount(minlength=7)
        assert abs(n.sum() / 5000 - rate) <= 4 * math.sqrt(rate * (1 - rate) / 5000)
        assert (n - 5000 * rate / 7).abs().max() <= 5 * math.sqrt(5000 * rate / 7)  # of each class about as many

    def test_age_counts_chains_since_the_fresh_start(self):
        one = sampler(10)
        for _ in range(3):
            one(10, 1)
        assert one.buffer.age.tolist() == [3] * 10
        one.reinit_freq = 1.0
        assert one(4, 1)[2]["sgld/buffer_age"].item() == pytest.approx((4 * 1 + 6 * 3) / 10)
        assert sorted(one.buffer.age.tolist()) == [1] * 4 + [3] * 6
