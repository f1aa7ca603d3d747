"""How long curvature takes, next to what one would write by hand and to laplax. Run by hand, on a quiet machine:

    python tests/benchmarks/curvature.py ggn|hessian|scaling|wide|share

Times are of compiled calls, the fastest of a few taken in turn with their rivals; the first call, which compiles, is
listed beside them. `ggn` compares with laplax where it is installed (pip install laplax). Peak memory is that of the
process, so run one command a time.
"""

import resource
import sys
import time
import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import laplode
from laplode._curvature.hessian import hessian
from laplode._curvature.strategies import At
from laplode._model.parameters import parameters
from laplode._solve.maps import flow, linearize

jax.config.update("jax_enable_x64", True)


class Field(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return 2 * self.mlp(y)


def case(width=32, depth=4, trajectories=16, times=50, end=10.0, scale=0.1, dim=2):
    """MLP field dim → width^depth → dim, on data near its own trajectories."""
    field = Field(eqx.nn.MLP(dim, dim, width, depth, jnp.tanh, key=jax.random.key(0)))
    model = laplode.NeuralODE(field)
    ts = np.linspace(0, end, times)
    y0 = np.asarray(jax.random.normal(jax.random.key(1), (trajectories, dim)))
    exact = jax.jit(jax.vmap(lambda y0: model(jnp.asarray(ts), y0)))(jnp.asarray(y0))
    ys = np.asarray(exact + scale * jax.random.normal(jax.random.key(2), exact.shape))
    return model, laplode.Problem(laplode.Trajectories(ts, ys, y0), laplode.Gaussian(scale), 1.0)


def flow_of(model, problem):
    data = problem.data
    return flow(parameters(model), data.ts, data.y0, data.args)


def plain(view, data, adjoint):
    """θ ↦ predictions, as one would write it with Diffrax."""
    ts, y0 = jnp.asarray(data.ts), jnp.asarray(data.y0)

    def one(theta, ts, y0):
        model = view.unravel(theta)
        return model.solve(ts, y0, None, saveat=diffrax.SaveAt(ts=ts), adjoint=adjoint, throw=False).ys

    return lambda theta: jax.vmap(lambda ts, y0: one(theta, ts, y0))(ts, y0)


def clock(function, repeats):
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    first = time.perf_counter() - start
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return result, first, min(times, default=first)


def report(name, first, seconds, reference=None, agrees=None):
    ratio = "" if reference is None else f"   {seconds / reference:8.1f} ×"
    error = "" if agrees is None else f"   differs by {agrees:.1e}"
    print(f"{name:44s} first {first:7.2f} s   then {seconds:9.4f} s{ratio}{error}", flush=True)


def difference(a, b):
    return float(jnp.linalg.norm(jnp.asarray(a) - jnp.asarray(b)) / jnp.linalg.norm(jnp.asarray(b)))


def run_ggn():
    model, problem = case()
    around = flow_of(model, problem)
    view = around.parameters
    theta = view.vector
    print(f"P = {theta.size}, M = {problem.data.ys.size}, {around.num_steps} steps (padded)")

    (_, jacobian), first, seconds = clock(lambda: linearize(around), 7)
    report("laplode: J", first, seconds)
    matrix, first_ggn, seconds_ggn = clock(lambda: laplode.GaussNewton().dense(At(around, problem)).matrix, 5)
    report("laplode: dense GGN", first_ggn, seconds_ggn)

    forward = plain(view, problem.data, diffrax.ForwardMode())
    tangents = lambda i: jnp.zeros_like(theta).at[i].set(1)
    push = jax.jit(
        lambda theta: jnp.moveaxis(
            jax.lax.map(lambda i: jax.jvp(forward, (theta,), (tangents(i),))[1], jnp.arange(theta.size), batch_size=64),
            0,
            -1,
        )
    )
    by_jvp, first, seconds_jvp = clock(lambda: push(theta), 2)
    by_jvp = by_jvp.reshape(-1, theta.size)
    report("chunked jvp: J", first, seconds_jvp, seconds, difference(jacobian, by_jvp))
    factor = by_jvp / 0.1
    gram = jax.jit(lambda f: f.T @ f)
    by_hand, first_gram, seconds_gram = clock(lambda: gram(factor), 5)
    report("    and its GGN", first + first_gram, seconds_jvp + seconds_gram, seconds_ggn, difference(matrix, by_hand))

    reverse = plain(view, problem.data, diffrax.RecursiveCheckpointAdjoint())
    unit = lambda i: jnp.zeros(problem.data.ys.size).at[i].set(1).reshape(problem.data.ys.shape)

    @jax.jit
    def pull(theta):
        _, back = jax.vjp(reverse, theta)
        return jax.lax.map(lambda i: back(unit(i))[0], jnp.arange(problem.data.ys.size), batch_size=64)

    by_vjp, first, seconds_vjp = clock(lambda: pull(theta), 1)
    report("chunked vjp: J", first, seconds_vjp, seconds, difference(jacobian, by_vjp))

    try:
        from laplax.curv.full import create_full_curvature
        from laplax.curv.ggn import create_ggn_mv
    except ImportError:
        print("laplax is not installed")
        return
    direct = diffrax.DirectAdjoint()
    selected = view.selected

    def model_fn(input, params):
        fitted = eqx.combine(params, view.rest)
        saveat = diffrax.SaveAt(ts=input[2:])
        return fitted.solve(input[2:], input[:2], None, saveat=saveat, adjoint=direct, throw=False).ys

    inputs = jnp.concatenate([jnp.asarray(problem.data.y0), jnp.asarray(problem.data.ts)], axis=1)
    data = {"input": inputs, "target": jnp.asarray(problem.data.ys)}
    product = create_ggn_mv(model_fn, selected, data, loss_hessian_mv=lambda jv, **_: jv / 0.1**2)
    theirs, first, seconds_laplax = clock(jax.jit(lambda: create_full_curvature(product, selected)), 1)
    report("laplax: dense GGN", first, seconds_laplax, seconds_ggn, difference(matrix, theirs))
    print(f"laplax's GGN against laplode's J: {seconds_laplax / seconds:.0f} ×")


def run_hessian():
    model, problem = case()
    around = flow_of(model, problem)
    view = around.parameters
    theta = view.vector
    result, first, seconds = clock(lambda: hessian(around, problem, batch_size=None).matrix, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = hessian(around, problem, batch_size=None)
    report("laplode: exact Hessian", first, seconds)
    print(f"peak memory {peak:.2f} GiB, symmetry defect {found.symmetry_defect:.1e}", flush=True)

    direct = plain(view, problem.data, diffrax.DirectAdjoint())
    gradient = jax.grad(lambda theta: -problem.log_likelihood(direct(theta)))
    chunk = int(sys.argv[2]) if len(sys.argv) > 2 else 16
    rows = jax.jit(
        lambda theta, start: jax.vmap(lambda i: jax.jvp(gradient, (theta,), (jnp.zeros_like(theta).at[i].set(1),))[1])(
            start + jnp.arange(chunk)
        )
    )
    theirs, first, seconds_chunk = clock(lambda: rows(theta, 0), 1)
    estimated = seconds_chunk * theta.size / chunk
    report(f"HVPs through DirectAdjoint, {chunk} of {theta.size}", first, seconds_chunk)
    report("    all of them, extrapolated", first, estimated, seconds, difference(result[:chunk], theirs))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def run_scaling():
    def row(name, **arguments):
        around = flow_of(*case(**arguments))
        _, first, seconds = clock(lambda: linearize(around), 5)
        size = around.parameters.size
        steps = around.num_steps
        each = 1e9 * seconds / size / steps / around.num_trajectories
        print(f"{name:10s} P = {size:7d}  steps {steps:4d}   first {first:6.2f} s   then {seconds:8.4f} s   "
              f"{each:8.1f} ns per parameter, step and trajectory", flush=True)  # fmt: skip

    print("The Jacobian J against the number of parameters,")
    for width in (5, 16, 32, 64, 128, 256, 512):
        row(f"width {width}", width=width, depth=2)
    print("of steps,")
    for end in (10.0, 40.0, 160.0, 640.0):
        row(f"to {end:g}", width=32, depth=2, end=end)
    print("of times,")
    for times in (25, 50, 100, 200, 400):
        row(f"T = {times}", width=32, depth=2, times=times)
    print("of trajectories,")
    for trajectories in (1, 4, 16, 64):
        row(f"N = {trajectories}", width=32, depth=2, trajectories=trajectories)
    print("of states")
    for dim in (2, 4, 8, 16):
        row(f"D = {dim}", width=32, depth=2, dim=dim)


def run_share():
    """The whole Laplace step, from the first call, next to the fit that came before it."""
    model, problem = case(width=16, depth=2, trajectories=4)
    start = time.perf_counter()
    fit = laplode.fit(
        model, problem, optax.adam(1e-2), steps=3000, key=jax.random.key(0), horizons=(1.0,), progress=False
    )
    fitted = time.perf_counter() - start
    print(
        f"P = {parameters(model).size}, M = {problem.data.ys.size}; 3000 steps of Adam: {fitted:.1f} s with compilation"
    )
    warnings.simplefilter("ignore", laplode.LaplodeWarning)
    for curvature in ("ggn", "hessian"):
        for call in ("first", "again"):
            start = time.perf_counter()
            posterior = laplode.laplace(fit.model, problem, curvature=curvature, progress=False)
            jax.block_until_ready(laplode.predict(posterior, problem.data.ts, key=jax.random.key(0)).y)
            seconds = time.perf_counter() - start
            print(f"laplace and predict, {curvature:8s} {call}: {seconds:6.2f} s, {seconds / fitted:.3f} of the fit")


def run_wide():
    model, problem = case(width=998, depth=2, trajectories=4, times=50)
    size = parameters(model).size
    print(f"P = {size}, M = {problem.data.ys.size}")
    start = time.perf_counter()
    posterior = laplode.laplace(model, problem, curvature="ggn", structure="low_rank")
    print(posterior.diagnostics)
    print(f"posterior {time.perf_counter() - start:.1f} s, compilation included", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB", flush=True)
    start = time.perf_counter()
    ts = np.linspace(0, 15, 16)
    predictions = laplode.predict(posterior, ts, num_samples=100, key=jax.random.key(0))
    jax.block_until_ready(predictions.y)
    print(f"100 linearized trajectories {time.perf_counter() - start:.1f} s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    {"ggn": run_ggn, "hessian": run_hessian, "scaling": run_scaling, "wide": run_wide, "share": run_share}[
        sys.argv[1]
    ]()
