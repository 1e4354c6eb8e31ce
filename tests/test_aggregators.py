"""The mathematics on its own: against the oracle, its structure, and its edge cases."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from element_wise import TrimmedMean
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import CurvatureOracle, NormalizedMeanOracle, Oracle, error

from adacons_hvd import AdaCons, Aggregator, Curvature, Mean, NormalizedMean, Statistics
from adacons_hvd.aggregators.adacons import CANCELLATION, resample
from adacons_hvd.insight import MovingAverages, SickWorkers
from adacons_hvd.ops import torch as torch_ops

ABLATION = {
    "basic": {"momentum": 0.0, "normalize": False},
    "momentum": {"normalize": False},
    "normalization": {"momentum": 0.0},
    "both": {},
}
VARIANTS = [{**row, "scale": scale} for row in ABLATION.values() for scale in ("unit", "average")]
LENGTHS = ("unit", "agreement", "average")
CURVATURES = [
    *({"memory": memory, "workers": True} for memory in (0, 1, 4, 8)),
    *({"memory": memory, "workers": False} for memory in (1, 4, 8)),
]
AGGREGATORS = [
    Mean(),
    *(AdaCons(**variant) for variant in VARIANTS),
    *(NormalizedMean(length=length) for length in LENGTHS[:2]),
    *(Curvature(memory=2, length=length) for length in LENGTHS),
    Curvature(memory=2, workers=False),
]


def fresh(aggregator: Aggregator) -> Aggregator:
    """The same settings, without a memory."""
    return type(aggregator)(**vars_of(aggregator))


def vars_of(aggregator: Aggregator) -> dict[str, object]:
    return {name: value for name, value in vars(aggregator).items() if name[0] != "_"}


def gradients(seed: int, workers: int = 5, length: int = 12, noise: float = 0.6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(length, generator=generator, dtype=torch.float64)
    own = torch.randn(workers, length, generator=generator, dtype=torch.float64)
    scale = 0.5 + torch.rand(workers, 1, generator=generator, dtype=torch.float64)
    return scale * (common + noise * own)


# --- against the oracle -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("workers", [1, 2, 3, 8, 40])
def test_twenty_steps_equal_the_oracle(variant, workers):
    aggregator, judge = AdaCons(**variant), Oracle(**{"momentum": 0.99, **variant})
    for step in range(20):
        g = gradients(step, workers)
        expected = judge(list(g.numpy()))
        assert error([aggregator(g).numpy()], [expected]) < 1e-12


@pytest.mark.parametrize("variant", CURVATURES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_curvature_equals_the_oracle_over_thirty_steps(variant, length, workers):
    settings = {**variant, "length": length, "damping": 0.7}
    aggregator, judge = Curvature(**settings), CurvatureOracle(**settings)
    for step in range(30):
        g = gradients(step, workers) * (1 + step % 3)
        assert error([aggregator(g).numpy()], [judge(list(g.numpy()))]) < 1e-12
    assert aggregator._memory["fallbacks"] == 0


@pytest.mark.parametrize("variant", CURVATURES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_curvature_of_narrow_gradients_is_computed_in_wide_arithmetic(variant, dtype):
    aggregator, judge = Curvature(**variant), CurvatureOracle(**variant)
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for step in range(12):
        g = gradients(step, length=300).to(dtype)
        found = aggregator(g)
        assert found.dtype == dtype
        assert error([found.double().numpy()], [judge(list(g.double().numpy()))]) < tolerance


@pytest.mark.parametrize("length", ["unit", "agreement"])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_the_normalized_mean_equals_the_oracle(length, workers):
    g = gradients(workers, workers)
    found = NormalizedMean(length=length)(g)
    assert error([found.numpy()], [NormalizedMeanOracle(length)(list(g.numpy()))]) < 1e-14


def test_the_mean_is_the_mean():
    g = gradients(0)
    assert torch.allclose(Mean()(g), g.mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_gradients_are_weighed_in_wide_arithmetic(dtype):
    g = (gradients(3, length=300) * 50).to(dtype)
    expected = Oracle()(list(g.double().numpy()))
    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    found = AdaCons()(g)
    assert found.dtype == dtype
    assert error([found.double().numpy()], [expected]) < tolerance


def test_half_precision_norms_do_not_overflow():
    g = torch.full((3, 4000), 60_000.0, dtype=torch.float16)
    decision, _ = AdaCons().explain(g)
    assert not decision.fallback.any()
    assert torch.allclose(decision.weights, decision.weights[0])
    assert math.isclose(Statistics.of(g).norms[0], 60_000 * math.sqrt(4000), rel_tol=1e-3)


def test_large_sums_keep_their_digits():
    """One single-precision sum over four million elements would be off by some 2e-5 here."""
    g = torch.randn(2, 1 << 22, generator=torch.Generator().manual_seed(0))
    exact = g[0].double().square().sum().item()
    assert abs(Statistics.of(g).squares[0].item() / exact - 1) < 2e-6


@pytest.mark.parametrize("workers", [3, 16, 17, 64])
def test_the_gramian_and_the_moments_tell_the_same(workers):
    g = gradients(1, workers, 50)
    plain, full = Statistics.of(g), Statistics.of(g, gramian=True)
    assert torch.allclose(plain.dots, full.dots)
    assert torch.allclose(plain.squares, full.squares)
    assert torch.allclose(full.gramian, g @ g.T)


def test_many_groups_are_decided_at_once_as_they_are_one_by_one():
    each = [gradients(seed, 6) for seed in range(4)]
    stacked = [Statistics.of(g) for g in each]
    together = Statistics(
        torch.stack([s.dots for s in stacked]),
        torch.stack([s.squares for s in stacked]),
        torch.stack([s.present for s in stacked]),
    )
    memory = {}
    alone = [{} for _ in each]
    for _ in range(3):
        whole = AdaCons().decide(together, memory)
        memory = whole.memory
        for i, s in enumerate(stacked):
            single = AdaCons().decide(s, alone[i])
            alone[i] = single.memory
            assert torch.equal(whole.weights[i], single.weights)


# --- structure ----------------------------------------------------------------------------------


@st.composite
def matrices(draw):
    workers, length = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    seed = draw(st.integers(0, 2**31))
    return gradients(seed, workers, length, noise=draw(st.floats(0.0, 1.0)))


@settings(max_examples=60, deadline=None)
@given(g=matrices(), seed=st.integers(0, 1000), index=st.integers(0, len(AGGREGATORS) - 1))
def test_permuting_workers_permutes_weights(g, seed, index):
    aggregator = AGGREGATORS[index]
    order = torch.randperm(len(g), generator=torch.Generator().manual_seed(seed))
    one, other = fresh(aggregator), fresh(aggregator)
    for step in range(3):
        rolled = g.roll(step, 1) + 0.1 * step * g.flip(1)
        weights = one.explain(rolled)[0].weights
        permuted = other.explain(rolled[order])[0].weights
        # Where coefficients tie, momentum may hand their values to either worker, with one result.
        both = (weights @ rolled, permuted @ rolled[order])
        distinct = Statistics.of(rolled).dots.unique().numel() == len(g)
        assert torch.allclose(permuted, weights[order], rtol=1e-6) or not distinct
        assert torch.allclose(*both, rtol=1e-5, atol=1e-9) or not distinct


@settings(max_examples=60, deadline=None)
@given(g=matrices(), factor=st.floats(1e-6, 1e6), index=st.integers(0, len(AGGREGATORS) - 1))
def test_scaling_all_gradients_scales_as_documented(g, factor, index):
    aggregator = AGGREGATORS[index]
    decision, _ = fresh(aggregator).explain(g)
    assume(not decision.fallback.any())
    base, scaled = fresh(aggregator)(g), fresh(aggregator)(g * factor)
    is_direction = (
        aggregator.normalize and aggregator.scale == "unit"
        if isinstance(aggregator, AdaCons)
        else getattr(aggregator, "length", "average") != "average"
    )
    expected = base if is_direction else base * factor
    assert torch.allclose(scaled, expected, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    g=matrices(),
    workers=st.integers(1, 9),
    steps=st.integers(1, 3),
    index=st.integers(0, len(AGGREGATORS) - 1),
)
def test_equal_gradients_give_the_average(g, workers, steps, index):
    aggregator = AGGREGATORS[index]
    one = g[0]
    assume(one.norm() > 1e-6)
    for _ in range(steps):
        found = aggregator_result = fresh(aggregator)(one.expand(workers, -1).clone())
    wanted = getattr(aggregator, "length", getattr(aggregator, "scale", "average"))
    if wanted == "average":
        expected = one
    elif wanted == "agreement" or getattr(aggregator, "normalize", True):
        expected = one / one.norm()  # the direction alone
    else:
        expected = one * workers  # Eq. 8 as printed: a sum
    assert torch.allclose(found, expected, rtol=1e-9), aggregator_result


@settings(max_examples=60, deadline=None)
@given(g=matrices())
def test_the_unit_scale_is_at_most_one_long(g):
    decision, _ = AdaCons().explain(g)
    assume(not decision.fallback.any() and (decision.stages["normalized"] >= 0).all())
    assert (decision.weights @ g).norm() <= 1 + 1e-9
    assert math.isclose((decision.weights * Statistics.of(g).norms).sum(), 1, rel_tol=1e-9)


# --- edge cases ---------------------------------------------------------------------------------


def test_a_zero_gradient_gets_weight_zero():
    g = gradients(0)
    g[2] = 0
    remembering = AdaCons()
    remembering(gradients(0))  # the momentum would have one for the next step's zero
    for aggregator in (AdaCons(), remembering):
        decision, _ = aggregator.explain(g)
        assert decision.weights[2] == 0
        assert (decision.weights[[0, 1, 3, 4]] > 0).all()
        assert not decision.fallback.any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_all_zero_gradients_fall_back_and_are_counted_and_teach_nothing(variant):
    aggregator = AdaCons(**variant)
    for _ in range(2):
        decision, _ = aggregator.explain(torch.zeros(3, 4))
    assert decision.fallback.all()
    assert decision.memory["fallbacks"].item() == 2
    # The momentum starts with the first step that has a gradient.
    g = gradients(0, 3, 4)
    assert torch.allclose(aggregator(g), AdaCons(**variant)(g))


@pytest.mark.parametrize("ratio", [1.0, 0.5, 3.0])
def test_opposing_gradients_fall_back_to_the_average(ratio):
    """For two opposing gradients the coefficients of Eq. 7 add up to exactly zero."""
    g = torch.tensor([[1.0, 2.0], [-ratio, -2 * ratio]], dtype=torch.float64)
    decision, rows = AdaCons(momentum=0).explain(g)
    assert decision.fallback.all()
    assert torch.allclose(decision.weights @ rows, g.mean(0))


@pytest.mark.parametrize(("above", "falls"), [(1.5, False), (0.5, True), (-0.5, True)])
def test_the_threshold_of_cancellation(above, falls):
    dots = torch.tensor([1.0, -1.0], dtype=torch.float64)
    dots[0] = (1 + above * CANCELLATION) / (1 - above * CANCELLATION)
    squares = torch.ones(2, dtype=torch.float64)
    decision = AdaCons(momentum=0).decide(Statistics(dots, squares, squares > 0), {})
    assert bool(decision.fallback) is falls


def test_without_normalization_nothing_cancels():
    g = torch.tensor([[1.0, 2.0], [-1.0, -1.0]])
    assert not AdaCons(momentum=0, normalize=False).explain(g)[0].fallback.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
class TestNonfinite:
    def test_propagates_as_in_an_average_and_is_forgotten(self, value):
        aggregator = AdaCons()
        aggregator(gradients(0))
        before = {k: v.clone() for k, v in aggregator._memory.items()}
        bad = gradients(1)
        bad[3, 5] = value
        decision, rows = aggregator.explain(bad)
        result = decision.weights @ rows
        assert not math.isfinite(result[5])
        assert torch.allclose(result[:5], bad.mean(0)[:5])
        assert decision.fallback.all()
        assert torch.equal(aggregator._memory["curve"], before["curve"])
        assert torch.equal(aggregator._memory["updates"], before["updates"])
        assert aggregator._memory["fallbacks"].item() == 1

    def test_excluded_is_as_if_the_worker_were_not_there(self, value):
        bad = gradients(1)
        bad[3, 5] = value
        rest = bad[[0, 1, 2, 4]]
        for variant in VARIANTS:
            one, other = AdaCons(**variant, nonfinite="exclude"), AdaCons(**variant)
            decision, rows = one.explain(bad)
            assert torch.isfinite(rows).all()
            assert decision.weights[3] == 0
            assert torch.allclose(decision.weights @ rows, other(rest))
            assert torch.isfinite(one._memory.get("curve", torch.zeros(1))).all()

    def test_excluded_later_reads_the_momentum_at_fewer_points(self, value):
        aggregator = AdaCons(nonfinite="exclude")
        g = gradients(0)
        aggregator(g)
        curve = aggregator._memory["curve"]
        bad = gradients(1)
        bad[0, 0] = value
        decision, rows = aggregator.explain(bad)
        # The oracle over the four that remain, starting from the curve read at four points.
        judge = Oracle()
        judge.m = np.interp(np.linspace(0, 4, 4), np.arange(5), curve.numpy()).tolist()
        assert error([(decision.weights @ rows).numpy()], [judge(list(rows[1:].numpy()))]) < 1e-12
        # The curve itself keeps its five points.
        four = Statistics.of(rows[1:])
        alpha = np.sort((four.dots / four.norms).numpy())
        five = np.interp(np.linspace(0, 3, 5), np.arange(4), alpha)
        expected = 0.99 * curve.numpy() + 0.01 * five
        assert np.allclose(aggregator._memory["curve"].numpy(), expected)

    def test_raises_and_names_the_rank(self, value):
        bad = gradients(1)
        bad[3, 5] = value
        with pytest.raises(FloatingPointError, match="gradient of rank 3 holds NaN or infinity"):
            AdaCons(nonfinite="raise")(bad)

    def test_everyone_excluded_gives_zero(self, value):
        bad = torch.full((3, 4), value)
        assert torch.equal(AdaCons(nonfinite="exclude")(bad), torch.zeros(4))


def test_one_worker_ten_billion_times_larger():
    g = gradients(0).float()
    g[1] *= 1e10
    result = AdaCons()(g)
    assert torch.isfinite(result).all()
    assert error([result.numpy()], [Oracle()(list(g.double().numpy()))]) < 1e-5


def test_gradients_near_the_smallest_numbers():
    g = (gradients(0) * 1e-18).float()
    result = AdaCons()(g)
    assert error([result.numpy()], [Oracle()(list(g.double().numpy()))]) < 1e-5
    vanishing = torch.full((3, 4), 1e-42)  # denormal, and their squares are zero
    assert torch.isfinite(AdaCons()(vanishing)).all()


def test_the_momentum_stays_finite_whatever_comes():
    aggregator = AdaCons()
    for step in range(40):
        g = gradients(step).float()
        if step % 3 == 1:
            g[step % 5] *= [1e30, math.inf, math.nan, 1e-30, 0.0][step % 5]
        aggregator(g)
        assert torch.isfinite(aggregator._memory["curve"]).all()


def test_an_identity_is_equal_for_equal_settings_and_no_others():
    aggregator = AdaCons()
    before = aggregator.identity
    assert before == AdaCons().identity
    aggregator.scale = "average"
    assert before != aggregator.identity == AdaCons(scale="average").identity
    assert MovingAverages(AdaCons()).identity == MovingAverages(AdaCons()).identity != AdaCons().identity


def test_an_identity_tells_classes_of_one_name_apart_also_of_aggregators_inside():
    def defined_again():
        class Mine(Mean):
            pass

        return Mine()

    assert repr(defined_again()) == repr(defined_again())
    assert defined_again().identity != defined_again().identity
    assert MovingAverages(defined_again()).identity != MovingAverages(defined_again()).identity


def test_an_identity_keeps_functions_so_that_no_other_takes_the_address_that_the_repr_shows():
    class Weighed(Mean):
        def __init__(self, function):
            super().__init__()
            self.function = function

    weighed = Weighed(lambda x: x)
    identity, function = weighed.identity, weakref.ref(weighed.function)
    del weighed
    gc.collect()
    assert function() is not None
    assert identity != Weighed(lambda x: x).identity


def test_an_identity_is_a_key_whatever_it_has_in_it():
    class Called:
        def __eq__(self, other):
            return True

        def __call__(self, worker):
            pass

    first, second = SickWorkers(AdaCons(), callback=Called()), SickWorkers(AdaCons(), callback=Called())
    assert len({first.identity, first.identity, second.identity}) == 2


def test_only_a_class_that_says_so_itself_is_pure_also_around_one_that_is():
    class Counting(MovingAverages):
        pass

    assert MovingAverages(AdaCons()).is_pure
    assert SickWorkers(AdaCons()).is_pure
    assert not Counting(AdaCons()).is_pure

    class Mine(Mean):
        pass

    assert not SickWorkers(Mine()).is_pure


# --- the mean gradients of earlier steps ----------------------------------------------------------


@pytest.mark.parametrize("workers", [True, False])
def test_steps_without_a_usable_gradient_are_not_kept(workers):
    """The oracle never sees them."""
    aggregator, judge = Curvature(3, workers=workers), CurvatureOracle(3, workers=workers)
    for step in range(12):
        if step % 3 == 1:
            bad = gradients(step)
            bad[2, 1] = math.nan
            assert aggregator.explain(bad)[0].fallback.all()
        if step % 3 == 2:
            assert torch.equal(aggregator(torch.zeros(5, 12, dtype=torch.float64)), torch.zeros(12))
        g = gradients(step)
        assert error([aggregator(g).numpy()], [judge(list(g.numpy()))]) < 1e-12
    assert aggregator._memory["kept"] == 12
    assert aggregator._memory["fallbacks"] == 8


@pytest.mark.parametrize("workers", [True, False])
def test_an_excluded_worker_is_as_if_it_were_not_there_in_the_past_as_well(workers):
    aggregator, judge = Curvature(4, workers=workers, nonfinite="exclude"), CurvatureOracle(4, workers=workers)
    for step in range(10):
        g = gradients(step)
        rest = [row.numpy().copy() for k, row in enumerate(g) if step % 2 or k != step % 5]
        if step % 2 == 0:
            g[step % 5, 3] = math.inf
        assert error([aggregator(g).numpy()], [judge(rest)]) < 1e-12


def test_another_number_of_workers_keeps_the_past():
    aggregator, judge = Curvature(4), CurvatureOracle(4)
    for step, workers in enumerate([5, 5, 3, 8, 1, 2]):
        g = gradients(step, workers)
        assert error([aggregator(g).numpy()], [judge(list(g.numpy()))]) < 1e-12


def test_other_parameters_empty_the_past():
    aggregator, judge = Curvature(4), CurvatureOracle(4)
    for step in range(3):
        aggregator(gradients(step))
    g = gradients(0, length=7)
    assert error([aggregator(g).numpy()], [judge(list(g.numpy()))]) < 1e-12


@pytest.mark.parametrize("workers", [True, False])
def test_gradients_that_collapse_give_the_average_until_the_past_is_as_small(workers):
    """The system is then made of rounding, and what it gives would be, too."""
    aggregator = Curvature(2, workers=workers)
    for step in range(3):
        aggregator(gradients(step))
    fallbacks = []
    for step in range(4):
        g = gradients(step) * 1e-6
        decision, _ = aggregator.explain(g)
        fallbacks.append(decision.fallback.item())
        if fallbacks[-1]:
            assert torch.allclose(decision.weights, torch.full((5,), 0.2, dtype=torch.float64))
            assert not decision.past_weights.any()
    assert fallbacks == [True, True, False, False]


def test_the_past_goes_on_where_it_was_saved(tmp_path):
    settings = {"memory": 3, "damping": 0.5}
    aggregator = Curvature(**settings)
    for step in range(5):
        aggregator(gradients(step))
    torch.save(aggregator.state_dict(), tmp_path / "state.pt")
    other = Curvature(**settings)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(5, 9):
        assert torch.equal(other(gradients(step)), aggregator(gradients(step)))


@pytest.mark.parametrize("length", ["unit", "agreement"])
def test_a_mean_that_cancels_is_left_as_it_is(length):
    g = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    decision, rows = NormalizedMean(length=length).explain(g)
    assert decision.fallback.all()
    assert torch.equal(decision.weights.float() @ rows, torch.zeros(2))


def test_an_aggregator_that_works_element_by_element():
    g = gradients(0, 6).float()
    aggregator = TrimmedMean()
    assert aggregator.needs == "every worker's gradient element by element"
    assert torch.allclose(aggregator(g), g.sort(0).values[1:-1].mean(0))
    g[2, 3] = math.nan
    assert torch.allclose(aggregator(g), g.mean(0), equal_nan=True)
    excluding = TrimmedMean()
    excluding.nonfinite = "exclude"
    rest = g[[0, 1, 3, 4, 5]]
    assert torch.allclose(excluding(g), rest.sort(0).values[1:-1].mean(0))


# --- memory and settings ------------------------------------------------------------------------


def test_state_dict_continues_where_it_was_and_loads_with_weights_only(tmp_path):
    one, other = AdaCons(), AdaCons()
    for step in range(4):
        one(gradients(step))
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(4, 8):
        assert torch.equal(one(gradients(step)), other(gradients(step)))


def test_another_number_of_workers_resamples_the_momentum():
    aggregator = AdaCons()
    aggregator(gradients(0, workers=4))
    curve = aggregator._memory["curve"]
    decision, _ = aggregator.explain(gradients(1, workers=7))
    expected = np.interp(np.linspace(0, 3, 7), np.arange(4), curve.numpy())
    alpha = np.sort(decision.stages["first-order"].numpy())
    assert np.allclose(decision.memory["curve"], 0.99 * expected + 0.01 * alpha)
    assert decision.memory["steps"].item() == 2


@pytest.mark.parametrize(("before", "after"), [(1, 5), (5, 1), (4, 4), (3, 9), (9, 2)])
def test_resampling_keeps_ends_and_order(before, after):
    curve = torch.linspace(1, 2, before, dtype=torch.float64) ** 2
    found = resample(curve, after)
    assert found.shape == (after,)
    assert found[0] == curve[0]
    assert after == 1 or found[-1] == curve[-1]
    assert (found.diff() >= 0).all()
    assert before != after or torch.equal(found, curve)


def test_states_of_something_else_or_of_a_later_version_are_refused():
    with pytest.raises(ValueError, match="not the state of an aggregator"):
        AdaCons().load_state_dict({"state": {}, "param_groups": []})
    later = {**AdaCons().state_dict(), "version": 99}
    with pytest.raises(ValueError, match="of version 99, written by a later adacons_hvd"):
        AdaCons().load_state_dict(later)


def test_repr_and_equality():
    expected = "AdaCons(momentum=0.99, normalize=True, scale='unit', nonfinite='propagate')"
    assert repr(AdaCons()) == expected
    used = AdaCons()
    used(gradients(0))
    assert repr(used) == expected
    assert used == AdaCons() == eval(expected)
    assert AdaCons() != AdaCons(momentum=0.9)
    assert AdaCons() != Mean()
    assert len({AdaCons(), AdaCons(), Mean()}) == 2
    for each in (NormalizedMean(length="agreement"), Curvature(memory=3, damping=0.5, workers=False)):
        assert eval(repr(each)) == each


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"momentum": -0.1}, "momentum must be at least 0 and below 1, got -0.1"),
        ({"normalize": "no"}, "normalize must be True or False, got 'no'"),
        ({"scale": "big"}, "scale must be one of unit, average, got 'big'"),
        ({"nonfinite": "hide"}, "nonfinite must be one of propagate, exclude, raise, got 'hide'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        AdaCons(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": -1}, "memory must be a whole number of steps, or 0, got -1"),
        ({"memory": 1.5}, "memory must be a whole number of steps, or 0, got 1.5"),
        ({"damping": 0}, "damping must be a positive number, got 0"),
        ({"damping": math.nan}, "damping must be a positive number, got nan"),
        ({"workers": 3}, "workers must be True or False, got 3"),
        ({"workers": False, "memory": 0}, "leave nothing to make a matrix of"),
        ({"length": "long"}, "length must be one of unit, agreement, average, got 'long'"),
        ({"nonfinite": "hide"}, "nonfinite must be one of propagate, exclude, raise, got 'hide'"),
    ],
)
def test_wrong_arguments_of_curvature_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Curvature(**arguments)


def test_what_an_aggregator_needs_beyond_dots_and_squares():
    assert AdaCons().needs == NormalizedMean().needs == ""
    assert Curvature(0).needs == "the Gramian of all gradients"
    assert Curvature(workers=False).needs == "the mean gradients of earlier steps"
    assert Curvature().needs == "the Gramian of all gradients and the mean gradients of earlier steps"


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_are_computed_with_fractions(dtype):
    whole = torch.tensor([[1, 0], [1, 1]], dtype=dtype)
    assert torch.equal(AdaCons()(whole), AdaCons()(whole.float()))
    assert AdaCons()(torch.tensor([[3, 4], [3, 4]])).tolist() == pytest.approx([0.6, 0.8])


def test_complex_gradients_are_refused_in_words():
    with pytest.raises(TypeError, match="view_as_real"):
        AdaCons()(torch.ones(2, 3, dtype=torch.complex64))


def test_something_that_is_no_tensor_is_refused_in_words():
    with pytest.raises(TypeError, match="expected a PyTorch or TensorFlow tensor, got numpy"):
        AdaCons()(np.ones((2, 2)))


class Harmonic(Aggregator):
    """A user's aggregator in its simplest form."""

    def weights(self, statistics):
        inverse = 1 / statistics.norms
        return inverse / inverse.sum(-1, keepdim=True)


class Counting(Aggregator):
    """One with a memory."""

    needs_gramian = True

    def start(self, statistics):
        return {"seen": 0 * statistics.squares}

    def weigh(self, statistics, memory):
        assert statistics.gramian is not None
        decision = Mean().weigh(statistics, memory)
        decision.memory["seen"] = memory["seen"] + 1
        return decision


def test_an_aggregator_of_ones_own():
    g = gradients(0)
    inverse = 1 / g.norm(dim=1)
    assert torch.allclose(Harmonic()(g), (inverse / inverse.sum()) @ g)
    counting = Counting()
    for _ in range(3):
        counting(g)
    assert counting._memory["seen"].tolist() == [3.0] * 5
    counting(gradients(0, workers=2))  # no resize(): it starts afresh
    assert counting._memory["seen"].tolist() == [1.0] * 2


def test_weights_that_are_not_finite_fall_back():
    g = gradients(0)
    g[1] = 0  # one over its norm is infinite
    decision, rows = Harmonic().explain(g)
    assert decision.fallback.all()
    assert torch.allclose(decision.weights @ rows, g.mean(0))


class Stumbling(Counting):
    """Counts what it sees, and has no answer in its second step."""

    def weigh(self, statistics, memory):
        decision = super().weigh(statistics, dict(memory))
        return replace(decision, weights=decision.weights + torch.where(memory["seen"] == 1, torch.inf, 0.0))


def test_a_step_without_an_answer_leaves_no_memory():
    stumbling = Stumbling()
    for seen in (1.0, 1.0):
        decision, _ = stumbling.explain(gradients(0))
        assert decision.memory["seen"].tolist() == [seen] * 5
    assert decision.memory["fallbacks"].tolist() == [1.0]


def test_an_aggregator_without_weights_says_so():
    with pytest.raises(NotImplementedError, match=r"Empty must override weights\(\) or weigh\(\)"):
        type("Empty", (Aggregator,), {})()(gradients(0))


def test_a_thousand_simulated_workers():
    g = gradients(0, workers=1024, length=64)
    assert error([AdaCons()(g).numpy()], [Oracle()(list(g.numpy()))]) < 1e-10


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_one_worker_alone_fills_the_whole_curve(workers):
    """The others are excluded; nothing of theirs may enter the momentum."""
    g = torch.full((workers, 4), float("nan"), dtype=torch.float64)
    g[1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    aggregator = AdaCons(momentum=0.9, nonfinite="exclude")
    for _ in range(3):
        assert torch.allclose(aggregator(g), g[1] / g[1].norm())
        assert torch.allclose(aggregator.state_dict()["curve"], g[1].norm().expand(workers))


def test_a_memory_must_not_use_the_names_all_memories_have() -> None:
    class Forgetful(Mean):
        def start(self, statistics: Statistics) -> dict[str, torch.Tensor]:
            return {"steps": statistics.squares}

    with pytest.raises(ValueError, match=r"Forgetful.start\(\) returns \['steps'\]"):
        Forgetful()(torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.bool])
def test_every_bit_of_a_parameter_is_in_its_digest(dtype):
    from adacons_hvd.ops.torch import digest

    tensors = [torch.ones(3, dtype=dtype), torch.ones(2, 5, dtype=dtype)]
    before = int(digest(tensors))
    flat = tensors[1].view(-1).view(torch.uint8)
    for place in range(len(flat)):
        for bit in range(1 if dtype == torch.bool else 8):
            flat[place] ^= 1 << bit
            assert int(digest(tensors)) != before, (place, bit)
            flat[place] ^= 1 << bit
    assert int(digest(tensors)) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_rows_come_back_from_a_message_however_few_they_are(dtype):
    for count in (0, 1, 2):
        rows, values = 3 * torch.arange(count), torch.randn(count, 5).to(dtype)
        owners, found, carried = torch_ops.unpack_rows(torch_ops.pack_rows(rows, values, 1, 4), 4)
        assert owners.tolist() == [1] * count
        assert torch.equal(found, rows)
        assert torch.equal(carried, values)
