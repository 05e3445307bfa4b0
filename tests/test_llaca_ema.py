"""The moving average: shards, blocks, precision, the range rule, resume, and what it refuses."""

import numpy as np
import pytest
import torch
from walks import NAMES, STEPS, run, walk

from llaca import ema
from llaca.beta import VARIANTS
from llaca.ema import BLOCK, DynamicAverage


@pytest.fixture(params=BLOCK)
def kernels(request):
    """Each half of the arithmetic: what runs on a CPU by default, and what runs on a GPU."""
    return request.param


@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_add_up_over_shards(variant, kernels):
    """Two ranks holding a third and two thirds of each tensor, their tables added: the step of the whole."""
    thetas, gradients = walk()

    def shard(row, rank):
        return [t.flatten()[: t.numel() // 3] if rank == 0 else t.flatten()[t.numel() // 3 :] for t in row]

    whole = DynamicAverage(NAMES, thetas[0], variant, kernels=kernels)
    ranks = [DynamicAverage(NAMES, shard(thetas[0], r), variant, kernels=kernels) for r in (0, 1)]
    for t in range(1, STEPS + 1):
        table = whole.measure(thetas[t], gradients[t])
        parts = [ranks[r].measure(shard(thetas[t], r), shard(gradients[t], r)) for r in (0, 1)]
        assert table.dtype == torch.float64 and table.shape[0] == len(NAMES)
        torch.testing.assert_close(sum(parts), table, rtol=1e-5, atol=1e-6, equal_nan=True)
        whole.update(table, thetas[t])
        for r in (0, 1):
            ranks[r].update(sum(parts), shard(thetas[t], r))
    joined = [torch.cat(pair) for pair in zip(*(r.averages().values() for r in ranks), strict=True)]
    for one, both in zip(whole.averages().values(), joined, strict=True):
        torch.testing.assert_close(both, one.flatten(), rtol=0, atol=1e-5)


def test_where_the_tensors_are_cut_does_not_matter(monkeypatch, kernels):
    thetas, gradients = walk()
    together = run(thetas, gradients, "eq45", kernels=kernels)
    monkeypatch.setitem(ema.BLOCK, kernels, 7)
    cut = run(thetas, gradients, "eq45", kernels=kernels)
    for a, b in zip(together.averages().values(), cut.averages().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_number_and_a_rank_without_elements_are_averaged_like_others(variant, dtype, kernels):
    """A tensor without dimensions moves as one of length 1 does; an empty shard adds nothing and stays empty."""
    thetas, gradients = walk(dtype=dtype)  # the last tensor has one element
    plain = run(thetas, gradients, variant, kernels=kernels)
    thetas, gradients = (
        [[*row[:3], row[3].squeeze(), row[0].new_empty(0)] for row in rows] for rows in (thetas, gradients)
    )
    average = run(thetas, gradients, variant, names=[*NAMES, "empty"], kernels=kernels)
    found, trace, wanted = average.averages(), average.drain_trace(), plain.drain_trace()
    np.testing.assert_array_equal(trace.raw[:, :4], wanted.raw)
    np.testing.assert_array_equal(trace.beta[:, :4], wanted.beta)
    for name, wanted in plain.averages().items():
        assert torch.equal(found[name].view(wanted.shape), wanted)
    assert found["scale"].shape == () and found["empty"].shape == (0,)
    table = average.measure(thetas[-1], gradients[-1])
    lag = average._columns.index("lag") if "lag" in average._columns else None
    assert all(value == 0 for column, value in enumerate(table[-1]) if column != lag)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_halves_of_the_arithmetic_agree(variant, dtype):
    thetas, gradients = walk(dtype=dtype)
    loop, foreach = (run(thetas, gradients, variant, kernels=kernels) for kernels in BLOCK)
    for a, b in zip(loop.averages().values(), foreach.averages().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for a, b in zip(loop.drain_trace(), foreach.drain_trace(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_blocks_cover_every_element_once_and_are_full():
    sizes = [5, 0, 12, 1, 3]
    found = ema.blocks(sizes, 7)
    assert [sum(end - start for _, start, end in block) for block in found] == [7, 7, 7]
    parts = [(i, place) for block in found for i, start, end in block for place in range(start, end)]
    assert parts == [(i, place) for i, size in enumerate(sizes) for place in range(size)]
    assert ema.blocks([0, 0], 7) == [[(0, 0, 0), (1, 0, 0)]]


def test_large_sums_are_accurate(kernels):
    """2^24 is where a float32 counter stops; 25 million ones must still be 25 million."""
    n = 25_000_000
    average = DynamicAverage(["w"], [torch.zeros(n)], "fixed", kernels=kernels)
    table = average.measure([torch.ones(n)], [torch.ones(n)])
    np.testing.assert_allclose(table.numpy(), [[n, n]], rtol=1e-6)


def test_average_is_float32_where_the_weights_are_bfloat16(kernels):
    """Weights moving from 1 to 2: 300 steps of weight 0.01 reach 2 - 0.99^300; in bfloat16 they do not."""
    start, end = torch.ones(5, dtype=torch.bfloat16), torch.full((5,), 2.0, dtype=torch.bfloat16)
    average = DynamicAverage(["w"], [start], "fixed", beta=0.99, kernels=kernels)
    for _ in range(300):
        average.step([end], [torch.zeros(5, dtype=torch.bfloat16)])
    assert average.averages()["w"].dtype == torch.float32
    torch.testing.assert_close(average.averages()["w"], torch.full((5,), 2 - 0.99**300), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_weights_are_measured_in_float32(variant, kernels):
    thetas, gradients = walk(dtype=torch.bfloat16)
    trace = run(thetas, gradients, variant, kernels=kernels).drain_trace()
    exact = [[t.float() for t in row] for row in thetas], [[g.float() for g in row] for row in gradients]
    reference = run(*exact, variant, kernels=kernels).drain_trace()
    np.testing.assert_array_equal(trace.beta, reference.beta)


def test_range_rule_counts(kernels):
    """One tensor whose release beta is inside, below and at minus infinity, by construction."""
    theta = [[torch.full((2,), float(t))] for t in range(5)]
    g = [[torch.full((2,), x)] for x in (0.0, 100.0, -100.0, -100.1, -100.1)]
    average = run(theta, g, "lcia_release", names=["w"], fallback=0.9, start="stage_start", kernels=kernels)
    trace = average.drain_trace()
    # |gap|: 2, then 2 (t - theta*); |change|: 0, 400, 0.2, 0
    star = 0.9 * 0 + 0.1 * 1
    beta2 = 1 - 2 * 201 / (2 * (2 - star) * 400)
    star = beta2 * star + (1 - beta2) * 2
    assert trace.fallback[:, 0].tolist() == [True, False, True, True]
    np.testing.assert_allclose(trace.beta[:, 0], [0.9, beta2, 0.9, 0.9], rtol=1e-6)
    assert trace.raw[2, 0] < 0 and trace.raw[3, 0] == -np.inf
    star = 0.9 * (0.9 * star + 0.1 * 3) + 0.1 * 4
    torch.testing.assert_close(average.averages()["w"], torch.full((2,), star), rtol=1e-6, atol=0)
    np.testing.assert_allclose(average.fallback_share(), [0.75])


def test_start(kernels):
    thetas, gradients = walk()
    for start, beta in (("stage_start", 0.99), ("after_first_step", 0.0)):
        average = run(thetas, gradients, "eq45", steps=[1], start=start, kernels=kernels)
        for star, before, after in zip(average.averages().values(), thetas[0], thetas[1], strict=True):
            torch.testing.assert_close(star, beta * before + (1 - beta) * after)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_exact(variant, tmp_path, kernels):
    thetas, gradients = walk()
    straight = run(thetas, gradients, variant, kernels=kernels)
    first = run(thetas, gradients, variant, steps=range(1, 8), kernels=kernels)
    torch.save(first.state_dict(), tmp_path / "average.pt")
    second = DynamicAverage(NAMES, thetas[0], variant, kernels=kernels)
    second.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    for t in range(8, STEPS + 1):
        second.step(thetas[t], gradients[t])
    for a, b in zip(straight.averages().values(), second.averages().values(), strict=True):
        assert torch.equal(a, b)
    np.testing.assert_array_equal(straight.fallback_share(), second.fallback_share())
    for a, b in zip(straight.drain_trace(), second.drain_trace(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_resume_refuses_another_average():
    thetas, _ = walk()
    state = DynamicAverage(NAMES, thetas[0], "eq45").state_dict()
    with pytest.raises(ValueError, match=r"other settings.*eq45_norm.*eq14_norm"):
        DynamicAverage(NAMES, thetas[0], "eq14").load_state_dict(state)
    with pytest.raises(ValueError, match="other names"):
        DynamicAverage(list("abcd"), thetas[0], "eq45").load_state_dict(state)


def test_trace_is_drained_in_pieces(kernels):
    thetas, gradients = walk()
    average = run(thetas, gradients, "eq45", steps=range(1, 6), kernels=kernels)
    first = average.drain_trace()
    for t in range(6, STEPS + 1):
        average.step(thetas[t], gradients[t])
    second, whole = average.drain_trace(), run(thetas, gradients, "eq45", kernels=kernels).drain_trace()
    assert (first.first_step, second.first_step, len(second.beta)) == (1, 6, STEPS - 5)
    np.testing.assert_array_equal(np.concatenate([first.beta, second.beta]), whole.beta)
    assert average.drain_trace().beta.shape == (0, len(NAMES))


def test_memory_is_what_the_variant_needs():
    """Copies of the parameters held after a step, theta* included."""
    thetas, gradients = walk()
    copies = {}
    for variant in VARIANTS:
        state = run(thetas, gradients, variant, steps=[1, 2]).state_dict()
        copies[variant] = 1 + len(state["past"])
        assert all(len(tensors) == len(NAMES) for tensors in state["past"].values())
    assert copies == {
        "eq14_norm": 3,
        "eq14_norm_ones": 3,
        "eq14_elem": 3,
        "eq45_norm": 2,
        "eq45_norm_ones": 2,
        "eq45_elem": 3,
        "lcia_release": 2,
        "next_release": 2,
        "lcia_horizon": 2,
        "fixed": 1,
        "uniform": 1,
        "secant": 3,
    }


@pytest.mark.parametrize("variant", ["eq45", "fixed", "secant"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda p, g: g.__setitem__(1, None), ValueError, "step 2: gradient of layers.0.lora_B is missing"),
        (lambda p, g: g.__setitem__(2, g[2][:3]), ValueError, r"gradient of projector.bias has shape \(3,\)"),
        (
            lambda p, g: g.__setitem__(0, g[0].double()),
            ValueError,
            "gradient of layers.0.lora_A has dtype torch.float64",
        ),
        (
            lambda p, g: p.__setitem__(0, p[0].bfloat16()),
            ValueError,
            "parameter of layers.0.lora_A has dtype",
        ),
        (
            lambda p, g: g[1].__setitem__((0, 0), torch.nan),
            FloatingPointError,
            "gradient not finite in layers.0.lora_B$",
        ),
        (
            lambda p, g: g[2].__setitem__(3, torch.inf),
            FloatingPointError,
            "step 2: gradient not finite in projector.bias",
        ),
        (
            lambda p, g: p[2].__setitem__(3, torch.nan),
            FloatingPointError,
            "parameter not finite in projector.bias",
        ),
        (lambda p, g: g.pop(), ValueError, "3 gradients for 4 averaged tensors"),
    ],
)
def test_bad_input_names_the_tensor_and_moves_nothing(variant, spoil, error, message, kernels):
    thetas, gradients = walk()
    average = run(thetas, gradients, variant, steps=[1], kernels=kernels)
    before = [star.clone() for star in average.averages().values()]
    parameters, grads = [p.clone() for p in thetas[2]], [g.clone() for g in gradients[2]]
    spoil(parameters, grads)
    with pytest.raises(error, match=message):
        average.step(parameters, grads)
    assert average.steps == 1
    assert all(torch.equal(a, b) for a, b in zip(average.averages().values(), before, strict=True))


def test_averages_follow_live_parameters_that_require_gradients(kernels):
    """As a trainer calls it: nn.Parameters, their .grad, an optimizer; no graph, no aliasing."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    names, parameters = zip(*model.named_parameters(), strict=True)
    average = DynamicAverage(names, parameters, "fixed", beta=0.5, kernels=kernels)
    expected = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        average.step(parameters, [p.grad for p in parameters])
        expected = [0.5 * e + 0.5 * p.detach() for e, p in zip(expected, parameters, strict=True)]
    for star, e in zip(average.averages().values(), expected, strict=True):
        assert not star.requires_grad
        torch.testing.assert_close(star, e)
