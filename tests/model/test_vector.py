"""Parameters as a vector: which leaves, in what order, under which names, and the prior that goes with them."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp
from laplode._model.parameters import parameters


class Mixed(eqx.Module):
    weight: jax.Array
    bias: jax.Array
    count: jax.Array
    table: np.ndarray
    constant: float
    activation: Callable
    name: str = eqx.field(static=True)
    missing: Any = None


def mixed():
    return Mixed(
        weight=jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 7,
        bias=jnp.array(3.0),
        count=jnp.array([1, 2]),
        table=np.array([5.0, 6.0]),
        constant=0.5,
        activation=jnp.tanh,
        name="mixed",
    )


class Stack(eqx.Module):
    layers: list[eqx.nn.Linear]
    gain: jax.Array

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 2)
        self.layers = [eqx.nn.Linear(2, 2, key=key) for key in keys]
        self.gain = jnp.ones(3)

    def __call__(self, t, y, args):
        return self.layers[1](self.layers[0](y))


# Leaves in order: layers[0].weight (4), layers[0].bias (2), layers[1].weight (4), layers[1].bias (2), gain (3).
SLICES = {"layers[0]": slice(0, 6), "layers[1]": slice(6, 12), "gain": slice(12, 15)}


def test_collects_the_inexact_arrays_in_float64():
    model = mixed()
    view = parameters(model)
    assert view.size == 9
    assert view.vector.dtype == jnp.float64
    expected = np.concatenate([np.asarray(model.weight, np.float64).ravel(), [3.0, 5.0, 6.0]])
    np.testing.assert_array_equal(view.vector, expected)
    assert [(name, shape) for name, shape, _, _ in view.leaves] == [("weight", (2, 3)), ("bias", ()), ("table", (2,))]


def test_unravel_returns_the_model_with_all_else_untouched():
    theta = jnp.arange(9.0) + 100
    model = parameters(mixed()).unravel(theta)
    np.testing.assert_array_equal(model.weight, theta[:6].reshape(2, 3))
    assert model.bias == 106 and model.bias.shape == ()
    np.testing.assert_array_equal(model.table, theta[7:])
    np.testing.assert_array_equal(model.count, [1, 2])
    assert jnp.issubdtype(model.count.dtype, jnp.integer)
    assert (model.constant, model.activation, model.name) == (0.5, jnp.tanh, "mixed")


def test_unravel_is_differentiable_where_combine_in_the_wrong_order_is_not():
    template = mixed()
    view = parameters(template)
    gradient = jax.grad(lambda theta: jnp.sum(view.unravel(theta).weight ** 2))(view.vector)
    np.testing.assert_allclose(gradient[:6], 2 * view.vector[:6], rtol=1e-15)
    wrong = lambda theta: eqx.combine(template, view.unravel(theta))
    trapped = jax.grad(lambda theta: jnp.sum(wrong(theta).weight ** 2).astype(float))(view.vector)
    np.testing.assert_array_equal(trapped, 0)


def test_float32_leaves_outside_where_are_cast_too():
    view = parameters(mixed(), where=lambda m: m.bias)
    assert view.size == 1
    assert view.unravel(view.vector).weight.dtype == jnp.float64


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (lambda m: m.weight, ["weight"]),
        (lambda m: (m.table, m.weight), ["weight", "table"]),
        (lambda m: (m.count, m.bias), ["bias"]),
        (True, ["weight", "bias", "table"]),
    ],
)
def test_where_selects_leaves(where, names):
    assert [leaf[0] for leaf in parameters(mixed(), where).leaves] == names


def test_where_selects_whole_nodes_by_function_and_by_pytree():
    model = Stack()
    nothing = jax.tree.map(lambda _: False, model)
    prefix = eqx.tree_at(lambda m: m.layers, nothing, [False, True])
    for where in (lambda m: m.layers[1], prefix):
        view = parameters(model, where)
        assert [leaf[0] for leaf in view.leaves] == ["layers[1].weight", "layers[1].bias"]
        np.testing.assert_array_equal(view.vector, parameters(model).vector[SLICES["layers[1]"]])


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(lambda m: m.nonexistent, id="no such attribute"),
        pytest.param("layers", id="string"),
        pytest.param(3, id="number"),
        pytest.param([True, False], id="not a prefix"),
        pytest.param(lambda m: m.count, id="integers only"),
        pytest.param(False, id="nothing"),
    ],
)
def test_bad_where_is_named(where):
    with pytest.raises(lp.LaplodeError, match="`where`"):
        parameters(mixed(), where)


def test_no_parameters():
    class Constant(eqx.Module):
        rate: float = 1.0
        order: Any = eqx.field(default_factory=lambda: jnp.array(2))

    with pytest.raises(lp.LaplodeError, match=r"`model` \(Constant\) has no parameters"):
        parameters(Constant())


def test_empty_arrays_are_no_parameters():
    class Empty(eqx.Module):
        weight: jax.Array

    with pytest.raises(lp.LaplodeError, match="has no parameters"):
        parameters(Empty(jnp.zeros((0, 3))))


@pytest.mark.parametrize(("value", "match"), [(jnp.nan, "not finite: bias"), (1j, "complex parameter, bias")])
def test_bad_parameter_is_named(value, match):
    with pytest.raises(lp.LaplodeError, match=match):
        parameters(eqx.tree_at(lambda m: m.bias, mixed(), jnp.asarray(value)))


def test_complex_leaf_outside_where_is_left_alone():
    model = eqx.tree_at(lambda m: m.bias, mixed(), jnp.asarray(1j))
    view = parameters(model, where=lambda m: m.weight)
    assert view.unravel(view.vector).bias == 1j


def test_solver_settings_hold_no_parameters():
    controller = diffrax.PIDController(rtol=jnp.array(1e-6), atol=jnp.array(1e-8))
    model = lp.NeuralODE(Stack(), stepsize_controller=controller, dt0=None)
    assert parameters(model).size == parameters(Stack()).size
    with pytest.raises(lp.LaplodeError, match="`where`"):
        parameters(model, where=lambda m: m.stepsize_controller)


def test_shared_leaves_count_once_and_gather_both_gradients():
    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self):
            layers = [eqx.nn.Linear(2, 2, key=key) for key in jax.random.split(jax.random.key(1), 2)]
            self.shared = eqx.nn.Shared(layers, where=lambda l: l[1].weight, get=lambda l: l[0].weight)

        def __call__(self, y):
            first, second = self.shared()
            return second(jnp.tanh(first(y)))

    model = Tied()
    view = parameters(model)
    assert view.size == 4 + 2 + 2
    y = jnp.array([0.3, -0.7])

    def untied(w, b0, b1):
        return jnp.sum(w @ jnp.tanh(w @ y + b0) + b1)

    w, b0, b1 = view.vector[:4].reshape(2, 2), view.vector[4:6], view.vector[6:]
    expected = jnp.concatenate([g.ravel() for g in jax.grad(untied, (0, 1, 2))(w, b0, b1)])
    gradient = jax.grad(lambda theta: jnp.sum(view.unravel(theta)(y)))(view.vector)
    np.testing.assert_allclose(gradient, expected, rtol=1e-14)


def test_names():
    view = parameters(mixed())
    assert [view.name(i) for i in (0, 5, 6, 8)] == ["weight[0, 0]", "weight[1, 2]", "bias", "table[1]"]
    assert view.names(np.array([1, 6, 7, 8])) == ("weight[0, 1]", "bias", "table")
    with pytest.raises(IndexError):
        view.name(9)


# ---- The prior, one value for each entry of θ


def precision_of(precision, model=None, where=None):
    view = parameters(Stack() if model is None else model, where)
    return np.asarray(lp.GaussianPrior(precision).local(view).precision)


def test_prior_scalar_and_mean():
    prior, view = lp.GaussianPrior(2.0, mean=0.5), parameters(Stack())
    mean, precision = prior.spread(view)
    np.testing.assert_array_equal(precision, np.full(15, 2.0))
    np.testing.assert_array_equal(mean, np.full(15, 0.5))
    np.testing.assert_array_equal(prior.local(view).gradient, 2 * (view.vector - 0.5))


PER_LAYER = np.repeat([3.0, 5.0, 7.0], [6, 6, 3])


def per_layer():
    return eqx.tree_at(lambda m: (m.layers, m.gain), Stack(), ([3.0, 5.0], 7.0))


def per_leaf():
    values = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    return jax.tree.map(lambda _: next(values), Stack())


def test_prior_per_layer_and_per_leaf():
    np.testing.assert_array_equal(precision_of(per_layer()), PER_LAYER)
    np.testing.assert_array_equal(precision_of(per_leaf()), np.repeat([1.0, 2.0, 3.0, 4.0, 5.0], [4, 2, 4, 2, 3]))


def test_prior_prefix_may_hold_arrays_of_the_leaf_shape():
    values = jnp.arange(1.0, 4.0)
    prefix = eqx.tree_at(lambda m: m.gain, per_layer(), values)
    np.testing.assert_array_equal(precision_of(prefix)[12:], values)


def test_prior_per_parameter():
    values = np.arange(1.0, 16.0)
    np.testing.assert_array_equal(precision_of(values), values)


@pytest.mark.parametrize("name", ["layers[0]", "layers[1]", "gain"])
def test_prior_with_where(name):
    where = {"layers[0]": lambda m: m.layers[0], "layers[1]": lambda m: m.layers[1], "gain": lambda m: m.gain}[name]
    part = SLICES[name]
    size = part.stop - part.start
    values = np.arange(1.0, 16.0)
    np.testing.assert_array_equal(precision_of(per_layer(), where=where), PER_LAYER[part])
    np.testing.assert_array_equal(precision_of(values, where=where), values[part])
    np.testing.assert_array_equal(precision_of(values[:size], where=where), values[:size])
    np.testing.assert_array_equal(precision_of(4.0, where=where), np.full(size, 4.0))


def test_prior_per_parameter_with_scattered_where():
    where = lambda m: (m.layers[0].bias, m.gain)
    values = np.arange(1.0, 16.0)
    np.testing.assert_array_equal(precision_of(values, where=where), [5, 6, 13, 14, 15])


def test_prior_prefix_for_a_model_with_functions_in_it():
    mlp = eqx.nn.MLP(2, 2, 3, 1, jnp.tanh, key=jax.random.key(0))
    prefix = jax.tree.map(lambda _: 2.0, eqx.filter(mlp, eqx.is_inexact_array))
    np.testing.assert_array_equal(precision_of(prefix, mlp), np.full(17, 2.0))
    np.testing.assert_array_equal(precision_of(jax.tree.map(lambda _: 2.0, mlp), mlp), np.full(17, 2.0))


@pytest.mark.parametrize(
    ("precision", "match"),
    [
        pytest.param(np.ones(7), r"shape \(7,\).*P = 15", id="length"),
        pytest.param({"layers": 1.0}, "prefix", id="other tree"),
        pytest.param(eqx.tree_at(lambda m: m.gain, per_layer(), np.ones(2)), "prefix", id="leaf shape"),
        pytest.param(eqx.tree_at(lambda m: m.gain, per_layer(), None), "prefix", id="missing"),
    ],
)
def test_prior_that_does_not_fit(precision, match):
    with pytest.raises(lp.LaplodeError, match=f"`precision`.*{match}"):
        precision_of(precision)


# ---- Selection by name


def test_where_takes_names():
    for where in ("layers[1]", ["layers[1].bias", "layers[1].weight"], ("layers[1]",)):
        assert [leaf[0] for leaf in parameters(Stack(), where).leaves] == ["layers[1].weight", "layers[1].bias"]
    with pytest.raises(lp.LaplodeError, match=r"`where` must be.*KeyError: 'layer'.*layers\[0\].weight"):
        parameters(Stack(), ["gain", "layer"])


def test_without_some_leaves():
    view = parameters(mixed()).without(["bias"])
    assert [leaf[0] for leaf in view.leaves] == ["weight", "table"]
    model = view.unravel(view.vector + 1)
    assert model.bias == 3.0 and model.activation is jnp.tanh
    np.testing.assert_array_equal(model.table, [6.0, 7.0])
    assert [leaf[0] for leaf in parameters(mixed(), view.where).leaves] == ["weight", "table"]


# ---- What is no parameter


def test_one_array_in_two_places_is_two_parameters():
    class Pair(eqx.Module):
        a: jax.Array
        b: jax.Array

    shared = jnp.ones(2)
    with pytest.warns(lp.LaplodeWarning, match="several places of `model`, a, b: these are different parameters"):
        assert parameters(Pair(shared, shared)).size == 4
    parameters(Pair(shared, jnp.ones(2)))


def test_running_statistics_are_no_parameters():
    class Normed(eqx.Module):
        norm: eqx.nn.BatchNorm
        state: eqx.nn.State

    model = Normed(*eqx.nn.make_with_state(eqx.nn.BatchNorm)(2, axis_name="batch", mode="ema"))
    assert [leaf[0] for leaf in parameters(model).leaves] == ["norm.weight", "norm.bias"]
