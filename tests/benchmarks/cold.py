# ruff: noqa: E402 (other processes are started before JAX is imported, and U is measured before laplode is)
"""What the first calls of a process cost, in units of U: the first jitted value and gradient of a plain `diffeqsolve`.

    python tests/benchmarks/cold.py            the path in one process; without, then twice with JAX's persistent cache
    python tests/benchmarks/cold.py step       a step of `fit` beside the same step on `diffeqsolve`, and memory
    python tests/benchmarks/cold.py checks     what the checks are of `laplace`, in the first call and in later ones

Each process measures its own U first. Run it with nothing else on the machine.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", nargs="?", default="path", choices=["path", "step", "checks", "one", "fit", "plain"])
parser.add_argument("--steps", type=int, default=100, help="of the optimizer")
parser.add_argument("--turns", type=float, default=1.0, help="how often the data of `step` go round")
options = parser.parse_args()


def again(*arguments, **environment):
    command = [sys.executable, __file__, *arguments, "--steps", str(options.steps), "--turns", str(options.turns)]
    subprocess.run(command, env=os.environ | environment, check=True)


if options.what == "path":
    print("without a cache", flush=True)
    again("one")
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        for state in ("an empty", "a filled"):
            print(f"with {state} cache", flush=True)
            again("one", **cache)
    sys.exit()
if options.what == "step":
    for kind in ("plain", "fit"):
        again(kind)
    sys.exit()

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

jax.config.update("jax_enable_x64", True)
counts: dict[str, float] = {}


def count(event, seconds=None, **_):
    for name, part in (("programs", "backend_compile"), ("XLA", "backend_compile"), ("tracing", "jaxpr_trace")):
        if part in event and seconds is not None:
            counts[name] = counts.get(name, 0) + (1 if name == "programs" else seconds)
    if "jaxpr_to_mlir" in event and seconds is not None:
        counts["lowering"] = counts.get("lowering", 0) + seconds
    for name in ("cache_hits", "cache_misses"):
        if event.endswith(name):
            counts[name] = counts.get(name, 0) + 1


jax.monitoring.register_event_duration_secs_listener(count)
jax.monitoring.register_event_listener(count)


class Field(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(y)


def truth(t, y, args):
    return jnp.stack([2 * y[1] - 0.1 * y[0], -2 * y[0] - 0.1 * y[1], 0.5 * y[0] * y[1] - 0.3 * y[2]])


TS = np.linspace(0, 6 * options.turns, 37)
Y0 = np.array([[1.0, 0.5, -0.5], [0.2, -1.0, 0.8]])
CONTROLLER = diffrax.PIDController(rtol=1e-6, atol=1e-8)


def solve(field, y0):
    saveat = diffrax.SaveAt(ts=TS)
    term = diffrax.ODETerm(field)
    return diffrax.diffeqsolve(
        term, diffrax.Tsit5(), TS[0], TS[-1], None, y0, saveat=saveat, stepsize_controller=CONTROLLER
    ).ys


field = Field(eqx.nn.MLP(3, 3, 14, 2, activation=jnp.tanh, key=jax.random.key(0)))
noise = 0.02 * np.random.default_rng(0).normal(size=(2, 37, 3))
YS = np.asarray(jax.vmap(lambda y0: solve(truth, y0))(jnp.asarray(Y0))) + noise


@eqx.filter_jit
@eqx.filter_value_and_grad
def plain_loss(field):
    return jnp.sum((jax.vmap(lambda y0: solve(field, y0))(jnp.asarray(Y0)) - YS) ** 2) / (2 * 0.02**2)


start = time.perf_counter()
jax.block_until_ready(plain_loss(field))
U = time.perf_counter() - start
print(f"U = {U:.1f} s", flush=True)

import laplode

model = laplode.NeuralODE(field, stepsize_controller=CONTROLLER)
problem = laplode.Problem(laplode.Trajectories(TS, YS, y0=Y0), laplode.Gaussian(0.02), laplode.GaussianPrior(1.0))


def timed(name, function):
    counts.clear()
    start = time.perf_counter()
    found = function()
    jax.block_until_ready([x for x in jax.tree.leaves(found) if isinstance(x, jax.Array)])
    seconds = time.perf_counter() - start
    parts = ", ".join(f"{key} {value:.3g}" for key, value in counts.items())
    print(f"{name:44s} {seconds:6.2f} s  {seconds / U:5.2f} U   {parts}", flush=True)
    return found


def trained(optimizer, **more):
    return laplode.fit(model, problem, optimizer, steps=options.steps, key=jax.random.key(1), progress=False, **more)


if options.what == "one":
    whole = time.perf_counter()
    fit = timed("fit, two horizons", lambda: trained(optax.adam(1e-2), horizons=(0.4, 1.0)))
    timed("fit again, another optimizer object", lambda: trained(optax.adam(5e-3), horizons=(1.0,)))
    fit = timed("refine, ggn", lambda: laplode.refine(fit.model, problem, curvature="ggn", progress=False))
    fit = timed("refine, hessian", lambda: laplode.refine(fit.model, problem, progress=False))
    posterior = timed("laplace, ggn", lambda: laplode.laplace(fit.model, problem, curvature="ggn", progress=False))
    timed("laplace, hessian", lambda: laplode.laplace(fit.model, problem, progress=False))
    for num in (37, 81, 100):
        grid = np.linspace(0, TS[-1], num)
        timed(f"predict, {num} times", lambda g=grid: laplode.predict(posterior, g, Y0, key=jax.random.key(2)))
    timed("maximize_evidence", lambda: laplode.maximize_evidence(posterior, progress=False))
    timed("laplace, ggn, again", lambda: laplode.laplace(fit.model, problem, curvature="ggn", progress=False))
    timed("laplace, hessian, again", lambda: laplode.laplace(fit.model, problem, progress=False))
    timed("predict, 37 times, again", lambda: laplode.predict(posterior, TS, Y0, key=jax.random.key(3)))
    print(f"in all {(time.perf_counter() - whole) / U:.1f} U")
elif options.what == "checks":
    from laplode._model import given
    from laplode._posterior import laplace

    spent = 0.0

    def clocked(function):
        def call(*arguments):
            global spent
            start = time.perf_counter()
            found = function(*arguments)
            spent += time.perf_counter() - start
            return found

        return call

    for module, name in (
        (given, "with_given"),
        (laplace, "check_finite"),
        (laplace, "unfrozen"),
        (laplace, "solver_problems"),
    ):
        setattr(module, name, clocked(getattr(module, name)))

    class Own(eqx.Module):
        field: Field

        def __call__(self, ts, y0):
            return solve(self.field, y0)

    fit = laplode.refine(trained(optax.adam(1e-2), horizons=(1.0,)).model, problem, curvature="ggn", progress=False)
    kinds = [("NeuralODE", fit.model, "ggn"), ("NeuralODE", fit.model, "hessian")]
    for name, fitted, curvature in [*kinds, ("a model of one's own", Own(fit.model.vector_field), "ggn")]:
        for call in ("the first call", *["again"] * 5):
            start, spent = time.perf_counter(), 0.0
            laplode.laplace(fitted, problem, curvature=curvature, progress=False)
            seconds = time.perf_counter() - start
            part = f"checks {spent:.3f} s, {spent / U:.3f} U, {spent / seconds:.1%}"
            print(f"{name}, {curvature}, {call}: {seconds:.3f} s, {part}", flush=True)
else:
    optimizer = optax.adam(1e-3)
    if options.what == "fit":

        def run():
            return trained(optimizer, horizons=(1.0,)).losses

    else:

        @eqx.filter_jit
        def step(state):
            field, inner = state
            loss, gradient = plain_loss(field)
            leaves = [x for x in jax.tree.leaves(field) if eqx.is_inexact_array(x)]
            prior = lambda x: jnp.sum(0.5 * x**2 + 0.5 * jnp.log(2 * jnp.pi))
            loss += sum(map(prior, leaves)) + YS.size * jnp.log(0.02 * jnp.sqrt(2 * jnp.pi))
            gradient = jax.tree.map(lambda g, x: g + x, gradient, eqx.filter(field, eqx.is_inexact_array))
            updates, inner = optimizer.update(gradient, inner)
            return (eqx.apply_updates(field, updates), inner), loss

        def run():
            state, losses = (field, optimizer.init(eqx.filter(field, eqx.is_inexact_array))), []
            for _ in range(options.steps):
                state, loss = step(state)
                losses.append(loss)
            return np.array(losses)

    timed("the first time", run)
    start = time.perf_counter()
    losses = run()
    per_step = 1e3 * (time.perf_counter() - start) / options.steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{options.what}: {per_step:.2f} ms a step, peak {peak:.0f} MiB, last loss {losses[-1]:.12g}")
