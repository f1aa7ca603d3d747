"""Work that is killed at random moments and goes on from its checkpoint: a fit, and an exact Hessian. Run by hand:

    python tests/benchmarks/kills.py [kills] [seed]

Half of the kills fall on each. Counts how often what was begun again ended with other bits than without a break: 0 is
right.
"""

import glob
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import laplode as lp

ADAM = optax.adam(1e-2)


class Decay(eqx.Module):
    rate: jax.Array
    start: jax.Array

    def __call__(self, ts, y0):
        return self.start * y0 * jnp.exp(-self.rate * ts[:, None])


class Wave(eqx.Module):
    """Sums of sines at fixed frequencies, then bent: many parameters, no solve."""

    weights: jax.Array
    shift: jax.Array

    def __call__(self, ts, y0):
        phases = jnp.arange(1, self.weights.shape[1] + 1) * ts[:, None] + self.shift
        return y0 + jnp.tanh(jnp.sin(phases) @ self.weights.T)


def problem_of(noise: float, channels: int, learned: bool) -> lp.Problem:
    ts = np.linspace(0, 2, 20)
    ys = np.exp(-ts)[None, :, None] + noise * np.random.default_rng(0).normal(size=(1, 20, channels))
    return lp.Problem(lp.Trajectories(ts, ys, np.ones((1, channels))), lp.Gaussian(0.1, learned=learned), 1.0)


def job(checkpoint: str | None = None) -> lp.Fit:
    """A fit of several restarts and horizons: the same bits in every process."""
    model = Decay(jnp.array([0.2]), jnp.array([[1.5]]))
    options: dict[str, Any] = dict(steps=4000, key=jax.random.key(0), restarts=2, horizons=(0.5, 1.0), progress=False)
    return lp.fit(model, problem_of(0.1, 1, learned=True), ADAM, checkpoint=checkpoint, checkpoint_every=25, **options)


def hessian_job(checkpoint: str | None = None, structure: str = "full") -> lp.Posterior:
    """An exact Hessian of ten chunks of rows."""
    rng = np.random.default_rng(1)
    model = Wave(jnp.asarray(rng.normal(size=(2, 200)) / 15), jnp.asarray(rng.normal(size=200)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)  # the model is not fitted
        options = dict(curvature=lp.Hessian(batch_size=4), structure=structure, progress=False)
        return lp.laplace(model, problem_of(0.1, 2, learned=False), checkpoint=checkpoint, **options)


def bits(result: lp.Fit | lp.Posterior) -> list[bytes]:
    """All numbers of a result."""
    if isinstance(result, lp.Posterior):
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(result.form)]
    return [repr(x).encode() if isinstance(x, str) else np.asarray(x).tobytes() for x in jax.tree.leaves(result)]


JOBS = {"fit": job, "laplace": hessian_job}


def setup(cache: str) -> None:
    """The same compiler for all processes."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)


def _started(checkpoint: str, cache: str, name: str) -> subprocess.Popen:
    """A job in a process of its own, at its first checkpoint since then."""
    before = _stamp(checkpoint)
    process = subprocess.Popen([sys.executable, __file__, "--job", name, checkpoint, cache])
    while process.poll() is None and _stamp(checkpoint) == before:
        time.sleep(0.002)
    return process


def _stamp(path: str) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return None


def seconds_of_writing(checkpoint: str, cache: str, name: str) -> float:
    """From the first to the last checkpoint of a whole job."""
    process = _started(checkpoint, cache, name)
    first = _stamp(checkpoint)
    process.wait()
    last = _stamp(checkpoint)
    os.remove(checkpoint)
    return ((last or 0) - (first or 0)) * 1e-9


def killed(checkpoint: str, cache: str, seconds: float, name: str = "fit") -> bool:
    """Run a job in a process of its own and kill it so long after it got somewhere; False if it ended before."""
    process = _started(checkpoint, cache, name)
    time.sleep(seconds)
    if process.poll() is None:
        process.kill()  # SIGKILL
    code = process.wait()
    if code > 0:
        raise RuntimeError(f"the job failed with {code}")
    return code < 0


def main(kills: int, seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        cache = os.path.join(folder, "cache")
        setup(cache)
        for name, num in (("fit", kills // 2), ("laplace", kills - kills // 2)):
            checkpoint = os.path.join(folder, f"{name}.laplode")
            whole = bits(JOBS[name]())
            seconds = seconds_of_writing(checkpoint, cache, name)
            done = ended = different = left = 0
            while done < num:
                was_killed = killed(checkpoint, cache, rng.uniform(0, 0.7 * seconds), name)
                done += was_killed
                size = os.path.getsize(checkpoint)
                parts = len(glob.glob(checkpoint + ".*.tmp"))
                left += parts
                if not was_killed or done % 5 == 0 or rng.random() < 0.1:
                    ended += 1
                    different += bits(JOBS[name](checkpoint)) != whole
                    os.remove(checkpoint)
                    assert not glob.glob(checkpoint + ".*.tmp")
                said = f"{done} kills, {ended} ends, {different} different, {size} bytes, {left} in the act of writing"
                print(f"{name}: {said}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        setup(sys.argv[4])
        JOBS[sys.argv[2]](sys.argv[3])
    else:
        given = [int(argument) for argument in sys.argv[1:]]
        main(*given, *(50, 0)[len(given) :])
