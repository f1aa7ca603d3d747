"""From a training loop's loss to the problem it solves, and the claims about it that are wrong."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp
from laplode._model.parameters import parameters
from laplode._solve.maps import flow
from laplode._solve.objective import value_and_gradient

L2 = 1e-3


@pytest.fixture(scope="module")
def data(growth):
    return growth.problem.data


def squares(model, data, transform=lambda y: y):
    """Σ (f − y)², as a training loop would write it."""
    predicted = jax.vmap(model)(jnp.asarray(data.ts), jnp.asarray(data.y0))
    return jnp.sum((transform(predicted) - transform(jnp.asarray(data.ys))) ** 2)


def penalty(model):
    return jnp.sum(model.rate**2) + model.gain**2


def gradient_of_problem(model, problem):
    """∇(−log p(Y | θ) − log p(θ))."""
    view = parameters(model)
    around = flow(view, problem.data.ts, problem.data.y0, problem.data.args)
    return value_and_gradient(around, problem)[1] + problem.prior.local(view).gradient


def gradient_of_loss(model, loss):
    return parameters(eqx.filter_grad(loss)(model)).vector


CASES = {
    "mean": (lambda m, d: squares(m, d) / d.ys.size + L2 * penalty(m), dict(squares="mean", l2=L2)),
    "sum": (lambda m, d: squares(m, d) + L2 * penalty(m), dict(squares="sum", l2=L2)),
    "half": (lambda m, d: 0.5 * squares(m, d) + 0.5 * L2 * penalty(m), dict(squares=0.5, l2=0.5 * L2)),
    "log": (
        lambda m, d: squares(m, d, jnp.log) / d.ys.size + L2 * penalty(m),
        dict(squares="mean", l2=L2, errors="log"),
    ),
    "part": (
        lambda m, d: squares(m, d) / d.ys.size + L2 * m.gain**2,
        dict(squares="mean", l2=L2, penalized=lambda m: m.gain, precision=1e-9),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_problem_has_the_gradient_of_the_loss(growth, data, name):
    loss, claim = CASES[name]
    problem, found = lp.problem_from_loss(growth.model, data, lambda m: loss(m, data), scale=0.2, **claim)
    assert found.difference < 1e-12 and found.scale == 0.2
    expected = found.nats_per_loss * gradient_of_loss(growth.model, lambda m: loss(m, data))
    # What "part" leaves without a penalty has the tiny precision instead.
    np.testing.assert_allclose(gradient_of_problem(growth.model, problem), expected, rtol=1e-7)


def weighted(model, data, weights):
    """Σ w (f − y)²."""
    predicted = jax.vmap(model)(jnp.asarray(data.ts), jnp.asarray(data.y0))
    return jnp.sum(weights * (predicted - jnp.asarray(data.ys)) ** 2)


@pytest.mark.parametrize("masked", [False, True])
def test_weights_make_scales_by_channel_and_a_mask(growth, data, masked):
    weights = np.broadcast_to([4.0, 0.25], data.ys.shape).copy()
    if masked:
        weights[:, ::3] = 0
    loss = lambda m: weighted(m, data, weights) + L2 * penalty(m)
    given = weights if masked else weights[0, 0]
    problem, found = lp.problem_from_loss(growth.model, data, loss, squares="sum", weights=given, l2=L2, scale=0.2)
    np.testing.assert_allclose(problem.likelihood.scale, [0.1, 0.4], rtol=1e-14)
    assert problem.num_observations == np.sum(weights > 0)
    expected = found.nats_per_loss * gradient_of_loss(growth.model, loss)
    np.testing.assert_allclose(gradient_of_problem(growth.model, problem), expected, rtol=1e-7)
    assert "weighted squares" in str(found)


def test_weights_give_the_noise_at_a_weight_of_one(growth, data):
    weights = np.array([4.0, 0.25])
    _, found = lp.problem_from_loss(growth.model, data, squares="sum", weights=weights, precision=1.0)
    num = data.ys.size
    np.testing.assert_allclose(found.scale**2, weighted(growth.model, data, weights) / num, rtol=1e-10)


@pytest.mark.parametrize("function", [jnp.sqrt, jnp.log])
def test_a_root_or_a_logarithm_of_the_squares_has_their_minimum(growth, data, function):
    loss = lambda m: function(squares(m, data) / data.ys.size)
    problem, found = lp.problem_from_loss(growth.model, data, loss, precision=1e-9, scale=0.2)
    assert "same minimum" in str(found)
    expected = found.nats_per_loss * gradient_of_loss(growth.model, loss)
    ours = gradient_of_problem(growth.model, problem)
    cosine = ours @ expected / (jnp.linalg.norm(ours) * jnp.linalg.norm(expected))
    np.testing.assert_allclose(cosine, 1, rtol=1e-10)
    with pytest.raises(lp.LaplodeError, match="no multiple"):  # with a penalty the minimum is another
        lp.problem_from_loss(growth.model, data, lambda m: loss(m) + L2 * penalty(m), l2=L2)


# A neural model, whose gradient has enough entries to tell trajectories and times apart.
@pytest.fixture(scope="module")
def wide(data):
    model = Wide(*(0.3 * jax.random.normal(key, (8, 2)) for key in jax.random.split(jax.random.key(0))))
    return model, data


class Wide(eqx.Module):
    weight: jax.Array
    bias: jax.Array

    def __call__(self, ts, y0):
        phase = jnp.arange(8) * ts[:, None] / 4
        return y0 + jnp.sin(phase) @ self.weight + jnp.cos(phase) @ self.bias * y0


def errors(model, data):
    return jax.vmap(model)(jnp.asarray(data.ts), jnp.asarray(data.y0)) - jnp.asarray(data.ys)


LATER = (np.arange(9) > 0)[:, None]
BY_TRAJECTORY = np.array([1.0, 0.25])[:, None, None]
BY_TIME = np.linspace(0.2, 1, 9)[:, None]


@pytest.mark.parametrize(
    ("weights", "scale"),
    [
        pytest.param(BY_TRAJECTORY, 0.2 / np.sqrt(BY_TRAJECTORY), id="by trajectory"),
        pytest.param(BY_TIME, 0.2 / np.sqrt(BY_TIME), id="by time"),
        pytest.param(LATER * [1.0, 4.0], [0.2, 0.1], id="by channel, without the first time"),
        pytest.param(LATER * BY_TRAJECTORY, 0.2 / np.sqrt(BY_TRAJECTORY), id="by trajectory, without the first time"),
    ],
)
def test_weights_of_any_shape(wide, weights, scale):
    model, data = wide
    loss = lambda m: jnp.sum(weights * errors(m, data) ** 2)
    problem, found = lp.problem_from_loss(model, data, loss, squares="sum", weights=weights, precision=1e-9, scale=0.2)
    assert problem.num_observations == np.sum(np.broadcast_to(weights, data.ys.shape) > 0)
    seen = ~np.isnan(problem.data.ys)
    known = np.broadcast_to(problem.likelihood.scale, data.ys.shape)[seen]
    np.testing.assert_allclose(known, np.broadcast_to(scale, data.ys.shape)[seen], rtol=1e-14)
    expected = found.nats_per_loss * gradient_of_loss(model, loss)
    np.testing.assert_allclose(gradient_of_problem(model, problem), expected, rtol=1e-6, atol=1e-7)


def over_channels_first(m, d):
    return jnp.mean(jnp.stack([jnp.mean(errors(m, d)[..., k] ** 2) for k in range(2)]))


def with_holes(data):
    holes = data.ys.copy()
    holes[0, 3:5, 0] = holes[1, 6, 1] = np.nan
    return lp.Trajectories(data.ts, holes, data.y0)


def filled(m, d):
    """Σ (f − y)² where y was observed, as `nansum` has it."""
    return jnp.where(d.observed, jax.vmap(m)(d.ts, d.y0) - np.nan_to_num(d.ys), 0) ** 2


FORMS = {
    "means over channels first": (over_channels_first, False, dict(), "the mean of squares"),
    "a mask": (lambda m, d: jnp.sum(filled(m, d)) / d.observed.sum(), True, dict(), "the mean of squares"),
    "where of mean": (lambda m, d: jnp.mean(filled(m, d), where=d.observed), True, dict(), "the mean of squares"),
    "nansum": (
        lambda m, d: jnp.nansum(jnp.where(d.observed, filled(m, d), jnp.nan)),
        True,
        dict(squares="sum"),
        "the sum of squares",
    ),
    "all cells": (
        lambda m, d: jnp.mean(filled(m, d)),
        True,
        dict(squares=1 / 36),
        "the mean over all cells, missing ones included",
    ),
    "half": (lambda m, d: 0.5 * jnp.mean(errors(m, d) ** 2), False, dict(squares=0.5 / 36), "half the mean"),
    "RMSE": (lambda m, d: jnp.sqrt(jnp.mean(errors(m, d) ** 2)), False, dict(), "same minimum"),
    "log": (lambda m, d: jnp.log(jnp.mean(errors(m, d) ** 2)), False, dict(), "same minimum"),
    "without the first time": (
        lambda m, d: jnp.mean(errors(m, d)[:, 1:] ** 2),
        False,
        dict(weights=LATER),
        "the mean of squares",
    ),
    "means of each channel with holes": (
        lambda m, d: sum(jnp.sum(filled(m, d)[..., k]) / d.observed[..., k].sum() for k in range(2)),
        True,
        dict(squares="sum", weights=1 / np.array([16.0, 17.0])),
        "the sum of weighted squares",
    ),
    "means of each trajectory with holes": (
        lambda m, d: jnp.mean(jnp.stack([jnp.sum(filled(m, d)[i]) / d.observed[i].sum() for i in range(2)])),
        True,
        dict(squares=0.5, weights=1 / np.array([16.0, 17.0])[:, None, None]),
        "weighted squares",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_a_loss_are_told_by_name(wide, name):
    form, holes, claim, said = FORMS[name]
    model, data = wide
    data = with_holes(data) if holes else data
    loss = lambda m: form(m, data)
    problem, found = lp.problem_from_loss(model, data, loss, precision=1e-9, scale=0.2, **claim)
    assert said in found.found
    expected = found.nats_per_loss * gradient_of_loss(model, loss)
    ours = gradient_of_problem(model, problem)
    if said == "same minimum":  # the factor is one near the model
        ours *= jnp.linalg.norm(expected) / jnp.linalg.norm(ours)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6 * np.abs(ours).max())


def one_batch(model, ts, y0, ys):
    return jnp.mean((jax.vmap(model)(ts, y0) - ys) ** 2)


def test_the_loss_of_minibatches_is_its_expectation(wide):
    model, data = wide
    batches = [(data.ts[i], data.y0[i], data.ys[i]) for i in ([0], [1])]
    problem, found = lp.problem_from_loss(model, data, one_batch, batches=batches, precision=1e-9, scale=0.2)
    assert found.difference < 1e-12 and found.found == "the mean of squares"
    all_of_it = lambda m: one_batch(m, data.ts, data.y0, data.ys)
    whole, _ = lp.problem_from_loss(model, data, all_of_it, precision=1e-9, scale=0.2)
    np.testing.assert_allclose(gradient_of_problem(model, problem), gradient_of_problem(model, whole), rtol=1e-12)
    uneven = [*batches, batches[0]]  # one trajectory comes up twice as often
    with pytest.raises(lp.LaplodeError, match=r"trajectory apart: pass weights=np.array\(\[1, 0.5\]\)\[:, None"):
        lp.problem_from_loss(model, data, one_batch, batches=uneven, precision=1.0)
    with pytest.raises(lp.LaplodeError, match=r"can't be differentiated.*TypeError"):
        lp.problem_from_loss(model, data, one_batch, batches=[(data.ts,)], precision=1.0)


def huber(delta):
    return lambda e: jnp.where(jnp.abs(e) < delta, e**2 / 2, delta * (jnp.abs(e) - delta / 2))


INSTEAD = {
    "channels of sizes far apart": (lambda e: e**2 * jnp.array([1.0, 1e2]), r"channel apart: .*\[0.01, 1\]"),
    "each channel": (lambda e: e**2 * jnp.array([4.0, 2.0]), r"channel apart: pass weights=\[1, 0.5\] and squares=4\."),
    "each trajectory": (
        lambda e: e**2 * BY_TRAJECTORY,
        r"trajectory apart: .*\[1, 0.25\]\)\[:, None, None\] and squares=1\.",
    ),
    "each time": (lambda e: e**2 * BY_TIME, r"time apart: .*\[0.2, 0.3, .* 1\]\)\[:, None\] and squares=1\."),
    "no first time": (lambda e: 3 * e[:, 1:] ** 2, r"leaves out the first time: pass weights=.* squares=3\."),
    "L1": (jnp.abs, r"absolute errors \(L1, a Laplace.*StudentT"),
    "log cosh": (lambda e: jnp.log(jnp.cosh(e)), "log cosh.*StudentT"),
    "fourth powers": (lambda e: e**4, "no multiple.*StudentT"),
}


@pytest.mark.parametrize("name", INSTEAD)
def test_what_a_loss_is_instead_is_named(wide, name):
    of_errors, match = INSTEAD[name]
    model, data = wide
    with pytest.raises(lp.LaplodeError, match=match):
        lp.problem_from_loss(model, data, lambda m: jnp.sum(of_errors(errors(m, data))), precision=1.0)


def test_huber_is_named(wide):
    model, data = wide
    far = lp.Trajectories(data.ts, data.ys + 2 * np.sin(5 * data.ts)[..., None], data.y0)
    assert 0 < np.sum(np.abs(errors(model, far)) < 1) < 36  # on both sides of the corner
    with pytest.raises(lp.LaplodeError, match=r"Huber's errors \(delta = 1\).*StudentT"):
        lp.problem_from_loss(model, far, lambda m: jnp.mean(huber(1.0)(errors(m, far))), precision=1.0)


def test_a_nan_in_a_square_is_named(wide):
    model, data = wide
    holes = with_holes(data)
    with pytest.raises(lp.LaplodeError, match="put 0 in its place before"):
        lp.problem_from_loss(model, holes, lambda m: jnp.nansum(errors(m, holes) ** 2), precision=1.0)


@pytest.mark.filterwarnings("ignore::laplode.LaplodeWarning")  # the model is at no minimum
def test_only_what_was_trained_is_compared(growth, data):
    loss = lambda m: squares(m, data) / data.ys.size + L2 * m.gain**2
    problem, found = lp.problem_from_loss(growth.model, data, loss, where="gain", l2=L2, scale=0.2)
    assert found.difference < 1e-12
    posterior = lp.laplace(growth.model, problem, where="gain", curvature="ggn", progress=False)
    assert posterior.size == 1


def test_weight_decay_is_half_a_penalty(growth, data):
    loss = lambda m: squares(m, data) / data.ys.size
    problem, by_decay = lp.problem_from_loss(growth.model, data, loss, weight_decay=2 * L2, scale=0.2)
    assert by_decay.difference < 1e-12
    np.testing.assert_allclose(problem.prior.precision, 2 * L2 * data.ys.size / (2 * 0.2**2), rtol=1e-14)


class Lines(eqx.Module):
    """Linear in its parameters, so that the minimum of its loss is an equation."""

    slope: jax.Array

    def __call__(self, ts, y0):
        return y0 + ts[:, None] * self.slope


def test_imbalance_is_zero_at_the_minimum_and_not_elsewhere(growth):
    data = growth.problem.data
    ts, rise = data.ts[..., None], data.ys - data.y0[:, None]
    minimum = np.sum(ts * rise, axis=(0, 1)) / (np.sum(ts**2, axis=(0, 1)) + 50.0)
    _, at = lp.problem_from_loss(Lines(jnp.asarray(minimum)), data, squares="sum", l2=50.0)
    assert at.difference is None and at.imbalance < 1e-12
    assert lp.problem_from_loss(Lines(jnp.asarray(1.2 * minimum)), data, squares="sum", l2=50.0)[1].imbalance > 0.1


def test_noise_from_the_residuals_and_without_the_initial_state(growth, data):
    ys = data.ys.copy()
    clean = np.asarray(jax.vmap(growth.model)(jnp.asarray(data.ts), jnp.asarray(data.y0)))
    ys[:, 0] = clean[:, 0]
    ys[1, 3, 0] = np.nan
    exact = lp.Trajectories(data.ts, ys, data.y0)
    problem, found = lp.problem_from_loss(growth.model, exact, precision=2.0)
    residuals = (ys - clean)[:, 1:]
    np.testing.assert_allclose(found.scale, np.sqrt(np.nanmean(residuals**2)), rtol=1e-12)
    assert problem.prior.precision == 2.0 and found.imbalance is None
    np.testing.assert_allclose(found.nats_per_loss, (ys.size - 1) / (2 * found.scale**2), rtol=1e-12)
    with pytest.raises(lp.LaplodeError, match="`scale` is needed"):
        lp.problem_from_loss(growth.model, lp.Trajectories(data.ts, clean, data.y0), precision=2.0)


NUM = 36  # observed values of `growth`


@pytest.mark.parametrize(
    "claim, match",
    [
        pytest.param(dict(squares="sum", l2=L2), "`squares`='sum'.*0.02778 times.*the mean. Pass", id="mean not sum"),
        pytest.param(dict(squares=0.5 / NUM, l2=L2), "2 times what was said, which is the mean", id="no half"),
        pytest.param(dict(l2=2 * L2), r"rate \(0.001 in place of 0.002\), gain \(0.001", id="half penalty"),
        pytest.param(dict(precision=1.0), r"rate \(0.001 in place of 0\)", id="forgotten penalty"),
        pytest.param(dict(l2=L2, penalized=lambda m: m.gain, precision=1.0), r"for rate \(0.001 in", id="mask"),
        pytest.param(dict(weight_decay=2 * L2), r"`l2`.*rate \(0.001 in place of 0\)", id="decay for l2"),
        pytest.param(dict(l2=L2, errors="log"), "is no multiple of.*neither", id="errors"),
    ],
)
def test_wrong_claims_are_caught(growth, data, claim, match):
    loss = CASES["mean"][0]
    with pytest.raises(lp.LaplodeError, match=match):
        lp.problem_from_loss(growth.model, data, lambda m: loss(m, data), **claim)


def test_a_small_penalty_on_too_many_parameters_is_caught_from_float32(growth, data):
    """Data kept in float32 disagree by their rounding, which must not hide a penalty or look like one."""
    rounded = eqx.tree_at(lambda d: (d.ts, d.ys), data, (data.ts.astype(np.float32), data.ys.astype(np.float32)))
    loss = lambda m: squares(m, rounded) / rounded.ys.size + 1e-4 * penalty(m)
    _, found = lp.problem_from_loss(growth.model, data, loss, l2=1e-4)
    assert 1e-9 < found.difference < 1e-5
    with pytest.raises(lp.LaplodeError, match=r"rate \(0.0001 in place of 0\)"):
        lp.problem_from_loss(growth.model, data, loss, l2=1e-4, penalized=lambda m: m.gain, precision=1.0)


def test_a_loss_in_float32_meets_a_model_in_float32(growth, data):
    """A model and data of single precision stay so, since a loss with a solve in it refuses a mixture."""
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), growth.model)
    dtypes = []

    def loss(m):
        dtypes.append(m.rate.dtype)
        ts, y0, ys = (jnp.asarray(x, dtype=jnp.float32) for x in (data.ts, data.y0, data.ys))
        return jnp.mean((jax.vmap(m)(ts, y0) - ys) ** 2) + L2 * penalty(m)

    _, found = lp.problem_from_loss(model, data, loss, l2=L2)
    assert set(dtypes) == {jnp.dtype("float32")}
    assert found.difference < 1e-5
    with pytest.raises(lp.LaplodeError, match="times what was said"):
        lp.problem_from_loss(model, data, loss, l2=L2, squares="sum")


@pytest.mark.parametrize(
    "arguments, match",
    [
        pytest.param(dict(), "`precision` is needed. The loss has no penalty on any parameter", id="no prior"),
        pytest.param(dict(weight_decay=0.1, decoupled=True), "optax.adamw.*gives no prior", id="decoupled"),
        pytest.param(dict(l2=1.0, penalized=lambda m: m.gain), "no penalty on rate", id="part"),
        pytest.param(dict(squares="average"), '`squares` must be one of "mean", "sum"', id="squares"),
        pytest.param(dict(squares=0), "`squares` must be", id="no squares"),
        pytest.param(dict(errors="relative"), "`errors` must be one of", id="errors"),
        pytest.param(dict(l2=-1.0), "`l2` must be a number of at least 0", id="negative"),
        pytest.param(dict(weights=[1.0, -1.0]), "`weights` must be finite", id="negative weights"),
        pytest.param(dict(weights=np.ones(7)), "`weights` must have shape", id="shape of weights"),
        pytest.param(dict(batches=3, precision=1.0, loss=lambda m: 0.0), "`batches` must be a list", id="batches"),
        pytest.param(dict(precision=0.0), "`precision` must be a positive", id="precision"),
        pytest.param(dict(loss=3, precision=1.0), "`loss` must be a function", id="no function"),
        pytest.param(dict(loss=lambda m: m.rate, precision=1.0), r"one number, got shape \(2,\)", id="vector"),
        pytest.param(
            dict(loss=lambda m: m.width, precision=1.0), "can't be differentiated.*AttributeError", id="fails"
        ),
    ],
)
def test_bad_arguments_are_refused(growth, data, arguments, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.problem_from_loss(growth.model, data, **arguments)


def test_refuses_other_data():
    with pytest.raises(lp.LaplodeError, match=r"`data` must be laplode\.Trajectories"):
        lp.problem_from_loss(None, np.ones(3))
