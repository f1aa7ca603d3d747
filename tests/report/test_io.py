"""Results on disk and back: the same bits, or an error that says why not; and work that survives being killed."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions.transforms import AffineTransform, ExpTransform

import laplode as lp
from laplode._curvature.hessian import Work, hessian, over_rows
from laplode._files import Checkpoint, _first_line, fingerprint, text_of, write
from laplode._fit.fit import _advance
from laplode._model.parameters import parameters
from laplode._solve.flows import ReplayedFlow
from laplode._solve.replay import Steps

KEY = jax.random.key(0)
ADAM = optax.adam(0.01)


def fresh(model):
    """A model of the same structure at other parameters, as a new process has it."""
    return jax.tree.map(lambda x: jnp.ones_like(x) if eqx.is_inexact_array(x) else x, model)


def assert_same(one, other):
    """Structure, types and bits; NaN is NaN."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (one, other)), strict=True):
        name = jax.tree_util.keystr(path)
        assert type(a) is type(b), name
        if eqx.is_array(a):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            a, b = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name
        else:
            assert a == b, name


@contextlib.contextmanager
def full_disk(free: int):
    """No file may grow beyond `free` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def stored(growth_posterior, tmp_path_factory):
    path = tmp_path_factory.mktemp("io") / "posterior.laplode"
    lp.save(path, growth_posterior)
    return path


# ---- Round trips


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(), id="full"),
        pytest.param(dict(curvature="ggn", structure=lp.LowRank(rank=2)), id="low rank"),
        pytest.param(dict(structure="low_rank"), id="low rank of the Hessian"),
        pytest.param(dict(structure="block_diagonal"), id="block diagonal"),
        pytest.param(dict(curvature=lp.Hessian(num_probes=3, key=KEY), structure="diagonal"), id="diagonal"),
        pytest.param(dict(where=lambda m: m.rate), id="subnetwork"),
    ],
)
def test_a_posterior_comes_back_with_the_same_bits(growth, quiet, tmp_path, options):
    posterior = quiet(*growth, **options)
    lp.save(tmp_path / "p", posterior)
    loaded = lp.load(tmp_path / "p", like=fresh(growth.model))
    assert_same(loaded, posterior)
    np.testing.assert_array_equal(loaded.sample(KEY, 3), posterior.sample(KEY, 3))
    assert loaded.diagnostics == posterior.diagnostics
    assert os.listdir(tmp_path) == ["p"]


def fit_of(case):
    """A fit that nothing was computed for."""
    return lp.Fit(case.model, np.array([3.0, 2.0, np.nan]), case.problem, 2.0, "budget", 3)


def test_a_neural_ode_on_its_grid_of_steps(growth_posterior, neural, tmp_path):
    data, view = neural.problem.data, parameters(neural.model)
    steps = Steps(jnp.ones((2, 4)), jnp.ones((2, 4)), jnp.asarray(data.ts), jnp.asarray(data.y0), None)
    grid = ReplayedFlow(view, steps)
    replaced = dict(parameters=view, flow=grid, problem=neural.problem)
    posterior = dataclasses.replace(growth_posterior, **replaced)
    lp.save(tmp_path / "p", posterior)
    assert_same(lp.load(tmp_path / "p", like=fresh(neural.model)), posterior)
    assert_same(lp.load(tmp_path / "p", like=fit_of(neural)), posterior)


def test_named_priors_and_their_transformations(growth, growth_posterior, tmp_path):
    priors = {"gain": dist.HalfNormal(2.0), "rate": dist.TruncatedNormal(0.0, 1.0, low=-2.0, high=3.0)}
    problem = lp.Problem(growth.problem.data, lp.LogNormal(0.1), lp.NamedPriors(priors))
    view = parameters(growth.model, None, problem.prior)
    posterior = dataclasses.replace(growth_posterior, parameters=view, problem=problem)
    lp.save(tmp_path / "p", posterior)
    loaded = lp.load(tmp_path / "p", like=fresh(growth.model))
    # Transformations of NumPyro have no equality by value: compare their texts and what they do.
    assert text_of(jax.tree.structure(loaded)) == text_of(jax.tree.structure(posterior))
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(posterior))
    assert_same(loaded.unravel(posterior.mean + 0.1), posterior.unravel(posterior.mean + 0.1))
    for prior, same in zip(priors.values(), loaded.problem.prior.named.values(), strict=True):
        np.testing.assert_array_equal(same.log_prob(0.7), prior.log_prob(0.7))


PRIORS = [
    dist.Normal(0.5, 2.0), dist.LogNormal(-0.5, 0.5), dist.HalfNormal(2.0), dist.Gamma(2.0, 3.0), dist.Beta(2.1, 3.2),
    dist.Uniform(0.1, 2.0), dist.TruncatedNormal(0.2, 1.0, low=-1.0), dist.TruncatedCauchy(0.2, 1.0, high=3.0),
    dist.InverseGamma(2.0, 1.5), dist.LogUniform(0.1, 4.0), dist.StudentT(4.5, 0.3, 1.7), dist.Weibull(1.7, 2.3),
    dist.Kumaraswamy(2.1, 3.2), dist.HalfCauchy(1.5), dist.AsymmetricLaplace(0.3, 1.7, 1.4), dist.Chi2(4.5),
    dist.Pareto(0.3, 1.9), dist.TruncatedNormal(0.2, 1.0, low=0.1, high=4.0), dist.Gumbel(0.3, 1.7),
    dist.AsymmetricLaplaceQuantile(0.3, 1.5, 0.7), dist.BetaProportion(0.3, 4.0), dist.Cauchy(0.3, 2.0),
    dist.DoublyTruncatedPowerLaw(-1.5, 0.05, 2.0), dist.Exponential(0.7), dist.Gompertz(2.0, 0.5),
    dist.Laplace(0.3, 2.0), dist.Levy(0.01, 2.0), dist.Logistic(0.3, 2.0), dist.LowerTruncatedPowerLaw(-1.5, 0.05),
    dist.RelaxedBernoulliLogits(0.7, 0.3), dist.SoftLaplace(0.3, 2.0), dist.VonMises(0.3, 2.0),
    dist.TruncatedDistribution(dist.Laplace(0.3, 2.0), high=3.0),
    dist.FoldedDistribution(dist.Normal(0.3, 1.0)), dist.ImproperUniform(dist.constraints.positive, (), ()),
    dist.MixtureSameFamily(dist.Categorical(probs=jnp.array([0.3, 0.7])), dist.Normal(0.0, jnp.array([1.0, 0.5]))),
    dist.MixtureGeneral(dist.Categorical(probs=jnp.array([0.3, 0.7])), [dist.Normal(0.0, 1.0), dist.Cauchy(0.2, 2.0)]),
    dist.TruncatedDistribution(dist.Normal(0.3, 1.0), low=0.1), dist.Normal(0.3, 2.0).mask(True),
    dist.TransformedDistribution(dist.StudentT(3.0, 0.5, 2.0), [AffineTransform(0.2, 0.6), ExpTransform()]),
]  # fmt: skip
POINTS = [0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9]
IN_ANOTHER_PROCESS = f"""
POINTS = {POINTS}
import sys, jax
jax.config.update("jax_enable_x64", True)
import laplode as lp
from laplode._files import fingerprint
for path in sys.argv[1:]:
    prior = lp.load(path)
    print(fingerprint(prior), *(float(prior.named["k"].log_prob(x)).hex() for x in POINTS))
"""


def test_priors_are_the_same_in_every_process(tmp_path):
    """NumPyro lists the fields of a distribution in the order of a set of strings, which each process has its own."""
    priors, paths = [lp.NamedPriors({"k": prior}) for prior in PRIORS], []
    for i, prior in enumerate(priors):
        lp.save(tmp_path / str(i), prior)
        paths.append(str(tmp_path / str(i)))
    text = [
        " ".join([fingerprint(prior), *(float(prior.named["k"].log_prob(x)).hex() for x in POINTS)]) for prior in priors
    ]
    for seed in "123":
        start = [sys.executable, "-c", IN_ANOTHER_PROCESS, *paths]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"}
        found = subprocess.run(start, env=environment, capture_output=True, text=True, check=True).stdout
        assert found.splitlines() == text


def test_predictions_need_no_model(growth, growth_posterior, tmp_path):
    predictions = lp.predict(growth_posterior, growth.problem.data.ts, key=KEY, num_samples=4, progress=False)
    gain = lp.predict_function(growth_posterior, lambda m: m.gain, key=KEY, num_samples=4, progress=False)
    for name, value in (("a", predictions), ("b", gain)):
        lp.save(tmp_path / name, value)
        loaded = lp.load(tmp_path / name)
        without = lambda x: dataclasses.replace(x, _closed_form=None)
        assert_same(without(loaded), without(value))
        with pytest.raises(lp.LaplodeError, match=r"`covariance\(\)`.*predict again"):
            loaded.covariance()


@pytest.fixture(scope="module")
def whole(growth):
    return lp.fit(*growth, ADAM, steps=75, key=KEY, horizons=(0.5, 1.0), restarts=2, progress=False)


def test_a_fit(growth, whole, tmp_path):
    lp.save(tmp_path / "f", whole)
    loaded = lp.load(tmp_path / "f", like=fresh(growth.model))
    assert_same(loaded, whole)
    assert len(loaded.restarts) == 2


class Leak(eqx.Module):
    """A likelihood of the user's own, and a prior precision that is a model."""

    scale: jax.Array
    power: int = eqx.field(static=True)

    def __call__(self, prediction):
        return dist.Normal(prediction, self.scale * self.power)


def test_code_outside_of_the_model_comes_from_the_problem(growth, quiet, tmp_path):
    precision = jax.tree.map(lambda x: jnp.array(2.0), growth.model)

    def problem(scale, power=1):
        return lp.Problem(growth.problem.data, Leak(jnp.array(scale), power), lp.GaussianPrior(precision))

    posterior = quiet(growth.model, problem(0.2))
    lp.save(tmp_path / "p", posterior)
    assert_same(lp.load(tmp_path / "p", like=(fresh(growth.model), problem(0.7))), posterior)
    with pytest.raises(lp.LaplodeError, match=r"likelihood.function is Leak, which is code.*like=\(model, problem\)"):
        lp.load(tmp_path / "p", like=growth.model)
    with pytest.raises(lp.LaplodeError, match=r"likelihood.function.power is 3, and was 1"):
        lp.load(tmp_path / "p", like=(growth.model, problem(0.2, power=3)))


def test_values_of_every_kind(growth, tmp_path):
    stats = {
        "nan": float("nan"), "small": 5e-324, "int": 2**80, "none": None, "text": "θ", "scalar": np.float32(0.1),
        "list": [True, (1, -0.0)], "key": jax.random.key(3), "half": jnp.ones(2, jnp.bfloat16),
        "empty": np.zeros((0, 3)),
        "bits": np.array([True]), "complex": np.array(1j), "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }  # fmt: skip
    lp.save(tmp_path / "f", dataclasses.replace(fit_of(growth), loss=stats))
    found = lp.load(tmp_path / "f", like=growth.model).loss
    assert repr(found) == repr(stats)
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in stats.items()}
    with pytest.raises(lp.LaplodeError, match="`save` does not write: make it numbers"):
        lp.save(tmp_path / "f", dataclasses.replace(fit_of(growth), losses=np.array(["a", None], object)))


# ---- What differs is named before any array is read


class Growth(eqx.Module):
    """Of the same name as the model of the tests, and another one."""

    rate: jax.Array
    gain: jax.Array
    shift: jax.Array


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param(lambda m: None, "`like` is missing: model is Growth, which is code", id="missing"),
        pytest.param(lambda m: eqx.tree_at(lambda m: m.rate, m, jnp.ones(3)),
                     r"model.rate is an array float64\[3\], and was an array float64\[2\]", id="shape"),
        pytest.param(lambda m: eqx.tree_at(lambda m: m.gain, m, jnp.array(1)),
                     r"model.gain is an array int64\[\], and was an array float64\[\]", id="dtype"),
        pytest.param(lambda m: eqx.tree_at(lambda m: m.gain, m, 1.0), "model.gain is 1.0, and was an array", id="leaf"),
        pytest.param(lambda m: eqx.nn.Lambda(jnp.tanh), "model is Lambda, and was Growth", id="class"),
        pytest.param(lambda m: Growth(m.rate, m.gain, m.gain), "model.shift is an array", id="more"),
        pytest.param(lambda m: lp.Trajectories, "`like` differs from what was saved: model is", id="no model"),
    ],
)  # fmt: skip
def test_the_first_leaf_that_differs_is_named(growth, stored, change, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.load(stored, like=change(growth.model))


def test_a_model_in_single_precision_does_as_like(growth, growth_posterior, stored):
    single = jax.tree.map(lambda x: x.astype(jnp.float32), growth.model)
    assert_same(lp.load(stored, like=single), growth_posterior)


def test_another_activation_or_setting_is_refused(neural, tmp_path):
    lp.save(tmp_path / "f", fit_of(neural))
    activation = lambda m: m.vector_field.mlp.activation
    other = eqx.tree_at(activation, neural.model, jax.nn.softplus)
    with pytest.raises(lp.LaplodeError, match=r"model.vector_field.mlp.activation is softplus, and was tanh"):
        lp.load(tmp_path / "f", like=other)
    other = dataclasses.replace(neural.model, max_steps=7)
    with pytest.raises(lp.LaplodeError, match=r"model.max_steps is 7, and was 4096"):
        lp.load(tmp_path / "f", like=other)


def test_64_bits_are_asked_for(growth, stored):
    with jax.enable_x64(False), pytest.raises(lp.LaplodeError, match="jax_enable_x64"):
        lp.load(stored, like=growth.model)


def test_bad_arguments(growth, growth_posterior, tmp_path):
    with pytest.raises(lp.LaplodeError, match=r"`value` must be a result of laplode, .*; got Growth"):
        lp.save(tmp_path / "p", growth.model)
    with pytest.raises(lp.LaplodeError, match="`path` must be a path, got int"):
        lp.save(3, growth_posterior)
    with pytest.raises(lp.LaplodeError, match="is a folder"):
        lp.save(tmp_path, growth_posterior)
    with pytest.raises(lp.LaplodeError, match="a folder that does not exist"):
        lp.save(tmp_path / "a" / "b", growth_posterior)
    with pytest.raises(lp.LaplodeError, match="No such file"):
        lp.load(tmp_path / "nothing")
    with pytest.raises(lp.LaplodeError, match="`like` must be a model"):
        lp.load(tmp_path / "nothing", like=growth.problem)


# ---- Damaged, foreign and malicious files


def damaged(good: bytes, rng: np.random.Generator):
    """300 files that are not what was saved, and a few from elsewhere."""
    line = good.index(b"\n") + 1
    for _ in range(100):
        yield good[: rng.integers(len(good))]
    for i in range(150):  # a third of them in the first line, a third in the header
        stop = (line, good.index(b"\x93NUMPY"), len(good))[i % 3]
        place = rng.integers(stop)
        yield good[:place] + bytes([good[place] ^ (1 << rng.integers(8))]) + good[place + 1 :]
    for _ in range(20):
        start, stop = np.sort(rng.integers(len(good), size=2))
        yield good[:start] + rng.bytes(stop - start) + good[stop:] if stop > start else good[:-1]
    for version in (1, *range(3, 12)):
        yield good.replace(b"laplode file 0002", f"laplode file {version:04d}".encode())
    for _ in range(14):
        yield good + rng.bytes(rng.integers(1, 50))
    array = io.BytesIO()
    np.savez(array, np.ones(3))
    yield from (b"", b"\0" * 500, b"laplode file ", b"CDF\x01", b"\x89HDF\r\n", array.getvalue())


def test_300_damaged_files(growth, stored, tmp_path):
    good, path, refused = stored.read_bytes(), tmp_path / "p", 0
    for content in damaged(good, np.random.default_rng(0)):
        path.write_bytes(content)
        with pytest.raises(lp.LaplodeError, match=f"`path`: {path}"):
            lp.load(path, like=growth.model)
        refused += 1
    assert refused == 300


@pytest.mark.parametrize(
    ("content", "match"),
    [
        pytest.param(lambda good: good[:-1], "cut short or damaged", id="truncated"),
        pytest.param(lambda good: good[:-1] + b"\xff", "does not have the checksum", id="flipped"),
        pytest.param(lambda good: good.replace(b"0002", b"0001", 1), "has format 1, .* Install the", id="older"),
        pytest.param(lambda good: b"PK" + good, "is no file of laplode.save", id="foreign"),
    ],
)
def test_what_is_wrong_is_said(growth, stored, tmp_path, content, match):
    (tmp_path / "p").write_bytes(content(stored.read_bytes()))
    with pytest.raises(lp.LaplodeError, match=match):
        lp.load(tmp_path / "p", like=growth.model)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def forged(header: bytes, body: bytes) -> bytes:
    """A file with a right checksum."""
    content = header + b"\n" + body
    return _first_line(hashlib.sha256(content).hexdigest()) + content


def test_no_pickle_is_executed(tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "p"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists()  # the bomb works
    mark.unlink()
    objects = io.BytesIO()
    np.save(objects, np.array([Bomb(mark)]), allow_pickle=True)
    header = b'{"holds": "Fit", "value": ["array", 0], "arrays": [["%s", "float64", [1]]]}'
    for content in (
        bomb,
        *(forged(header % k, body) for k in (b"numpy", b"jax") for body in (bomb, objects.getvalue())),
    ):
        path.write_bytes(content)
        with pytest.raises(lp.LaplodeError):
            lp.load(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "header",
    [
        b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"holds": "Problem", "value": 0, "arrays": []}',
        b'{"holds": "Fit", "value": ["object", "os", "system", {}], "arrays": []}',
        b'{"holds": "Fit", "value": ["object", "laplode", "Fit", {}], "arrays": []}',
        b'{"holds": "Fit", "value": ["array", 0], "arrays": [["numpy", "float64", [1000000000]]]}',
        b'{"holds": "Fit", "value": ["array", 0], "arrays": [["numpy", "O", []]]}',
        b'{"holds": "Fit", "value": ["array", 0], "arrays": [["numpy", "float64", [-1]]]}',
        b'{"holds": "Fit", "value": ["object", "laplode", "Problem.__init__", {}], "arrays": []}',
        b'{"holds": "Fit", "value": ["object", "numpyro.distributions.util", "partial", {}], "arrays": []}',
        b'{"holds": "Fit", "value": ["code", "system"], "arrays": []}', b'{"holds": "Fit", "value": [], "arrays": []}',
        b'{"holds": ["Fit"], "value": null, "arrays": []}', b'{"holds": "Fit", "value": ["?"], "arrays": []}',
        b'{"holds": "Fit", "value": null, "arrays": []}',
    ],
)  # fmt: skip
def test_headers_made_by_hand(tmp_path, header):
    (tmp_path / "p").write_bytes(forged(header, b""))
    with pytest.raises(lp.LaplodeError):
        lp.load(tmp_path / "p")


def test_a_full_disk_leaves_the_file_before(growth, growth_posterior, stored, tmp_path):
    path = tmp_path / "p"
    path.write_bytes(stored.read_bytes())
    for free in (0, 100, 3000, len(stored.read_bytes()) - 1):
        with full_disk(free), pytest.raises(lp.LaplodeError, match=r"can't be written: .*File too large"):
            lp.save(path, growth_posterior)
        assert path.read_bytes() == stored.read_bytes()
        assert os.listdir(tmp_path) == ["p"]
    assert_same(lp.load(path, like=growth.model), growth_posterior)


# ---- Checkpoints of fits


def fit(growth, checkpoint, **options):
    defaults = dict(steps=75, key=KEY, horizons=(0.5, 1.0), restarts=2, progress=False, optimizer=ADAM)
    given = {"model": growth.model, "problem": growth.problem, **defaults, **options}
    return lp.fit(**given, checkpoint=checkpoint, checkpoint_every=1)


@pytest.fixture(scope="module")
def kills():
    path = Path(__file__).parents[1] / "benchmarks" / "kills.py"
    spec = importlib.util.spec_from_file_location("kills", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_fit_goes_on_after_every_chunk(growth, whole, kills, tmp_path, monkeypatch):
    """Stopped after each chunk of steps, and again begun: in the first stage, between the stages, in the second."""
    calls = []

    def crashing(*arguments):
        if len(calls) % 2:
            calls.append("crash")
            raise MemoryError
        calls.append("step")
        return _advance(*arguments)

    monkeypatch.setattr("laplode._fit.fit._advance", crashing)
    found = None
    while found is None:
        with contextlib.suppress(MemoryError):
            found = fit(growth, tmp_path / "c")
    assert calls.count("crash") == 3 and calls.count("step") == 4
    assert kills.bits(found) == kills.bits(whole)
    # Finished, it is returned at once.
    assert kills.bits(fit(growth, tmp_path / "c")) == kills.bits(whole)
    assert len(calls) == 7


def test_a_checkpoint_is_of_its_arguments(growth, tmp_path):
    path = tmp_path / "c"
    fit(growth, path)
    before = path.read_bytes()
    other = eqx.tree_at(lambda p: p.likelihood.scale, growth.problem, np.array(0.2))
    for change, match in (
        (dict(steps=100), "other arguments: `steps` or `horizons`\\. "),
        (dict(horizons=(1.0,)), "`steps` or `horizons`"),
        (dict(restarts=1), "`restarts`"),
        (dict(model=fresh(growth.model)), "other arguments: `model`"),
        (dict(where=lambda m: m.gain), "`where`"),
        (dict(problem=other), "other arguments: `problem`\\. "),
        (dict(optimizer=optax.adam(0.02)), "other arguments: `optimizer` .*\\. "),
        (dict(optimizer=optax.sgd(0.01)), "`optimizer`"),
    ):
        with pytest.raises(lp.LaplodeError, match=match):
            fit(growth, path, **change)
    assert path.read_bytes() == before
    with pytest.raises(lp.LaplodeError, match=r"`path`: .* holds a checkpoint of fit, which laplode.load"):
        lp.load(path)


def test_a_damaged_checkpoint_is_refused(growth, stored, tmp_path):
    path = tmp_path / "c"
    path.write_bytes(stored.read_bytes()[:-3])
    with pytest.raises(lp.LaplodeError, match="cut short or damaged"):
        fit(growth, path)
    with pytest.raises(lp.LaplodeError, match=r"holds Posterior. Take another path"):
        fit(growth, stored)
    with pytest.raises(lp.LaplodeError, match="`checkpoint` must be a path"):
        fit(growth, 3)
    with pytest.raises(lp.LaplodeError, match="`checkpoint_every` must be a positive integer"):
        lp.fit(*growth, ADAM, steps=3, key=KEY, checkpoint=path, checkpoint_every=0)


def test_a_full_disk_does_not_end_a_fit(growth, whole, kills, tmp_path):
    with full_disk(200), pytest.warns(lp.LaplodeWarning, match="goes on without a new checkpoint.*File too large"):
        found = fit(growth, tmp_path / "c")
    assert kills.bits(found) == kills.bits(whole)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["fit", "laplace"])
def test_a_killed_process_goes_on_to_the_same_bits(kills, tmp_path, name):
    checkpoint, rng, job = str(tmp_path / "c"), np.random.default_rng(os.getpid()), kills.JOBS[name]
    cache = jax.config.jax_compilation_cache_dir
    killed = [kills.killed(checkpoint, cache, rng.uniform(0, 0.1), name) for _ in range(2)]
    assert any(killed)
    assert kills.bits(job(checkpoint)) == kills.bits(job())


# ---- Checkpoints of exact Hessians


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "diagonal"])
def test_a_hessian_goes_on_after_every_few_chunks(kills, tmp_path, monkeypatch, structure):
    """Stopped by Ctrl-C again and again: what was computed is saved, and no row is computed twice."""
    whole = kills.bits(kills.hessian_job(structure=structure))
    calls = []

    def interrupted(*arguments):
        calls.append("stop" if len(calls) % 4 == 3 else "chunk")
        if calls[-1] == "stop":
            raise KeyboardInterrupt
        return over_rows(*arguments)

    monkeypatch.setattr("laplode._curvature.hessian.over_rows", interrupted)
    found, notes = None, []
    while found is None:
        try:
            found = kills.hessian_job(str(tmp_path / "c"), structure)
        except KeyboardInterrupt as interrupt:
            notes += interrupt.__notes__
    assert kills.bits(found) == whole
    assert calls.count("chunk") == 10 and calls.count("stop") == 3
    assert notes[0] == "192 of 600 rows are saved: the same call goes on from there."
    # Finished, no row is computed again.
    assert kills.bits(kills.hessian_job(str(tmp_path / "c"), structure)) == whole
    assert len(calls) == 13


def test_a_hessian_by_local_pieces_goes_on(neural, tmp_path, monkeypatch):
    monkeypatch.setattr("laplode._curvature.hessian._FEW_PARAMETERS", 0)
    monkeypatch.setattr("laplode._curvature.hessian._CHUNK", 8)
    around = lp.curvature_products(*neural).flow
    checkpoint = Checkpoint(tmp_path / "c", "laplace", {})
    work = Work(progress=False, checkpoint=checkpoint)
    whole = hessian(around, neural.problem, batch_size=8)
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return over_rows(*arguments)

    monkeypatch.setattr("laplode._curvature.hessian.over_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hessian(around, neural.problem, batch_size=8, work=work)
    checkpoint = Checkpoint(tmp_path / "c", "laplace", {})
    # As it was begun, whatever memory is free now.
    monkeypatch.setattr("laplode._curvature.hessian._FEW_PARAMETERS", 10**9)
    found = hessian(around, neural.problem, batch_size=None, work=work._replace(checkpoint=checkpoint))
    assert np.asarray(found.matrix).tobytes() == np.asarray(whole.matrix).tobytes()
    assert len(calls) == 5


def test_a_checkpoint_of_a_hessian_is_of_its_arguments(growth, quiet, kills, stored, tmp_path):
    path = tmp_path / "c"
    first = quiet(*growth, checkpoint=path)
    before = path.read_bytes()
    assert_same(quiet(*growth, checkpoint=path).form, first.form)
    # What is made of the curvature may change.
    assert_same(quiet(*growth, checkpoint=path, regularization="abs").form, first.form)
    other = eqx.tree_at(lambda p: p.likelihood.scale, growth.problem, np.array(0.2))
    for change, match in (
        (dict(model=eqx.tree_at(lambda m: m.gain, growth.model, jnp.array(1.3))), "other arguments: `model` or"),
        (dict(where=lambda m: m.gain), "`where`"),
        (dict(problem=other), "other arguments: code of the model or the likelihood, or `problem`\\. "),
        (dict(structure="diagonal"), "`structure`, `curvature` or `mesh`\\. "),
        (dict(curvature=lp.Hessian(batch_size=2)), "`curvature` or"),
        (dict(checkpoint=stored), r"holds Posterior. Take another path"),
        (dict(checkpoint=3), "`checkpoint` must be a path"),
        (dict(curvature="ggn"), '`checkpoint` goes with curvature="hessian"'),
        (dict(structure="low_rank"), '`checkpoint` goes with curvature="hessian"'),
        (
            dict(curvature=lp.Hessian(num_probes=2, key=KEY), structure="diagonal"),
            '`checkpoint` goes with curvature="hessian"',
        ),
    ):
        with pytest.raises(lp.LaplodeError, match=match):
            lp.laplace(**dict(model=growth.model, problem=growth.problem, checkpoint=path, progress=False) | change)
    with pytest.raises(lp.LaplodeError, match=r"`checkpoint`: .* holds a checkpoint of laplace. Take"):
        fit(growth, path)
    # Functions without a name differ in what they give.
    by_function = [
        lp.Problem(growth.problem.data, lambda f, c=c: dist.LogNormal(jnp.log(f), c), 1.0) for c in (0.1, 0.2)
    ]
    quiet(growth.model, by_function[0], checkpoint=tmp_path / "d")
    with pytest.raises(lp.LaplodeError, match="code of the model or the likelihood"):
        lp.laplace(growth.model, by_function[1], checkpoint=tmp_path / "d", progress=False)
    assert path.read_bytes() == before
    path.write_bytes(before[:-3])
    with pytest.raises(lp.LaplodeError, match="cut short or damaged"):
        quiet(*growth, checkpoint=path)


def test_a_full_disk_does_not_end_a_hessian(growth, growth_posterior, tmp_path):
    with full_disk(200), pytest.warns(lp.LaplodeWarning) as caught:
        found = lp.laplace(*growth, checkpoint=tmp_path / "c", progress=False)
    assert any("`laplace` goes on without a new checkpoint" in str(each.message) for each in caught)
    assert_same(found.form, growth_posterior.form)
    assert os.listdir(tmp_path) == []


def test_what_a_kill_left_is_removed(growth, quiet, tmp_path):
    for name in ("c.0123abcd.tmp", "c.0123abcd.tmp.mine", "c.notes.tmp", "cc.0123abcd.tmp"):
        (tmp_path / name).touch()
    quiet(*growth, checkpoint=tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["c", "c.0123abcd.tmp.mine", "c.notes.tmp", "cc.0123abcd.tmp"]


def test_fingerprints_are_of_contents():
    tree = {"a": jnp.ones(2), "b": (KEY, 1.0, jnp.tanh)}
    assert fingerprint(tree) == fingerprint({"a": np.ones(2), "b": (jax.random.key(0), 1.0, jnp.tanh)})
    changes = [
        {**tree, "a": jnp.ones(2, jnp.float32)},
        {**tree, "b": (KEY, 1.0, jnp.sin)},
        {**tree, "b": (KEY, 1, jnp.tanh)},
    ]
    assert len({fingerprint(each) for each in (tree, *changes)}) == 4


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write(tmp_path / "link", {"holds": "nothing"}, [])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").exists()
