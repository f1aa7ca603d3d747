"""What the tests share: 64-bit JAX, a compilation cache, and a few small problems with their posteriors."""

import gc
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
from jaxtyping import install_import_hook

# CHECK_TYPES=types_at_run_time.checked has types and shapes checked in every call.
if checker := os.environ.get("CHECK_TYPES"):
    install_import_hook("laplode", checker)

import laplode as lp

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

TIGHT = diffrax.PIDController(rtol=1e-11, atol=1e-12)


# XLA's older code generator compiles in half the time of its newer one.
QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def pytest_configure(config):
    # Many models of the tests are not at a minimum, and laplode says so; tests of what it says use pytest.warns.
    config.addinivalue_line("filterwarnings", "default::laplode.LaplodeWarning")
    cache = getattr(config, "cache", None)
    directory = tempfile.mkdtemp() if cache is None else cache.mkdir("jax")
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # workers share small programs too
    # Tracing and compiling take most of the time of the tests.
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_traceback_in_locations_limit", 0)
    gc.freeze()
    gc.set_threshold(100_000)
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have the environment of the process that starts them
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # idle threads spin
        os.environ.update(JAX_DISABLE_MOST_OPTIMIZATIONS="1", JAX_TRACEBACK_IN_LOCATIONS_LIMIT="0")  # for subprocesses
        flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE}".strip()
        if _known_to_xla(flags):
            os.environ["XLA_FLAGS"] = flags


def _known_to_xla(flags):
    """Whether XLA has these flags. It aborts a process whose flags it doesn't know, so that is another one."""
    start = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
    return subprocess.run(start, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode == 0


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Every compiled program holds memory maps, of which Linux allows a process 65530 before it aborts."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    matplotlib.pyplot.close("all")


class Case(NamedTuple):
    model: Any
    problem: lp.Problem


class LotkaVolterra(eqx.Module):
    birth: jax.Array
    hunt: jax.Array
    death: jax.Array
    feed: jax.Array

    def __call__(self, t, y, args):
        hare, lynx = y
        return jnp.stack([self.birth * hare - self.hunt * hare * lynx, self.feed * hare * lynx - self.death * lynx])


class Neural(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key, width=5):
        mlp = eqx.nn.MLP(2, 2, width, 1, jnp.tanh, key=key)
        self.mlp = jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, mlp)

    def __call__(self, t, y, args):
        return self.mlp(y)


class Growth(eqx.Module):
    """Its trajectories are known in closed form, so that nothing is solved and little compiled."""

    rate: jax.Array
    gain: jax.Array

    def __call__(self, ts, y0):
        return self.gain * y0 * jnp.exp(self.rate * (ts - ts[0])[:, None])


class Basis(eqx.Module):
    """dy/dt = w φ(t): linear in its parameters, and so are its trajectories."""

    w: jax.Array

    def __call__(self, t, y, args):
        return self.w @ jnp.stack([jnp.ones_like(t), jnp.sin(t), jnp.cos(2 * t)])


class Linear(NamedTuple):
    """A linear problem with its conjugate answer. `design(ts)` has rows (time, channel) for y − y0."""

    model: lp.NeuralODE
    problem: lp.Problem
    design: Any
    target: np.ndarray
    mean: np.ndarray
    precision: np.ndarray


def _design(ts):
    columns = np.stack([ts, 1 - np.cos(ts), np.sin(2 * ts) / 2], axis=-1)
    rows = np.zeros((len(ts), 2, 6))
    rows[:, 0, :3] = columns
    rows[:, 1, 3:] = columns
    return rows.reshape(-1, 6)


def quiet_laplace(model, problem, **options):
    """`laplace` at points that are no minimum, where it rightly warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        return lp.laplace(model, problem, **{"progress": False} | options)


@pytest.fixture(scope="session")
def quiet():
    return quiet_laplace


@pytest.fixture(scope="session")
def linear() -> Linear:
    rng = np.random.default_rng(0)
    ts, y0, scale, precision = np.linspace(0, 3, 12), np.array([1.0, 2.0]), 0.1, 2.0
    design = _design(ts)
    target = design @ rng.normal(size=6) + scale * rng.normal(size=24)
    data = lp.Trajectories(ts, y0 + target.reshape(12, 2), y0)
    posterior_precision = design.T @ design / scale**2 + precision * np.eye(6)
    mean = np.linalg.solve(posterior_precision, design.T @ target / scale**2)
    model = lp.NeuralODE(Basis(jnp.asarray(mean.reshape(2, 3))), stepsize_controller=TIGHT)
    return Linear(model, lp.Problem(data, lp.Gaussian(scale), precision), _design, target, mean, posterior_precision)


@pytest.fixture(scope="session")
def linear_posterior(linear):
    return lp.laplace(linear.model, linear.problem, progress=False)


@pytest.fixture(scope="session")
def linear_ggn(linear):
    return lp.laplace(linear.model, linear.problem, curvature="ggn", progress=False)


@pytest.fixture(scope="session")
def predator_prey() -> Case:
    """Two Lotka-Volterra trajectories with 10% noise, at the parameters they were made with."""
    rng = np.random.default_rng(1)
    field = LotkaVolterra(*map(jnp.asarray, (1.0, 0.6, 0.9, 0.5)))
    model = lp.NeuralODE(field, stepsize_controller=TIGHT)
    ts, y0 = np.linspace(0, 5, 9), np.array([[1.5, 1.0], [2.0, 0.7]])
    clean = np.stack([np.asarray(model(ts, y)) for y in y0])
    ys = clean * np.exp(0.1 * rng.normal(size=clean.shape))
    return Case(model, lp.Problem(lp.Trajectories(ts, ys, y0), lp.LogNormal(0.1), 1.0))


@pytest.fixture(scope="session")
def growth() -> Case:
    """Two trajectories of `Growth` with 10% noise, at the parameters they were made with."""
    rng = np.random.default_rng(3)
    model = Growth(jnp.array([0.3, -0.4]), jnp.array(1.2))
    ts, y0 = np.linspace(0, 4, 9), np.array([[1.5, 1.0], [2.0, 0.7]])
    clean = np.stack([np.asarray(model(ts, y)) for y in y0])
    ys = clean * np.exp(0.1 * rng.normal(size=clean.shape))
    return Case(model, lp.Problem(lp.Trajectories(ts, ys, y0), lp.LogNormal(0.1), 1.0))


@pytest.fixture(scope="session")
def growth_posterior(growth):
    return quiet_laplace(*growth)


@pytest.fixture(scope="session")
def neural() -> Case:
    """A small neural field, far from a minimum: its Hessian is indefinite."""
    rng = np.random.default_rng(2)
    model = lp.NeuralODE(Neural(jax.random.key(0)), stepsize_controller=TIGHT)
    ts, y0 = np.linspace(0, 2, 8), np.array([[1.0, -0.5], [0.3, 0.8]])
    ys = rng.normal(size=(2, 8, 2))
    return Case(model, lp.Problem(lp.Trajectories(ts, ys, y0), lp.Gaussian(0.3), 1.0))


@pytest.fixture(scope="session")
def neural_posterior(neural):
    return quiet_laplace(*neural)


@pytest.fixture(scope="session")
def predator_prey_posterior(predator_prey):
    return quiet_laplace(*predator_prey)
