"""A fit that is killed at random moments and goes on from its checkpoint. Run by hand:

    python tests/benchmarks/kills.py [kills] [seed]

Counts how often the fit that was begun again ended with other bits than one without a break: 0 is right.
"""

import glob
import os
import random
import subprocess
import sys
import tempfile
import time
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


def job(checkpoint: str | None = None) -> lp.Fit:
    """A fit of several restarts and horizons: the same bits in every process."""
    ts = np.linspace(0, 2, 20)
    ys = np.exp(-ts)[None, :, None] + 0.1 * np.random.default_rng(0).normal(size=(1, 20, 1))
    problem = lp.Problem(lp.Trajectories(ts, ys, [[1.0]]), lp.Gaussian(0.1, learned=True), 1.0)
    model = Decay(jnp.array([0.2]), jnp.array([[1.5]]))
    options: dict[str, Any] = dict(steps=4000, key=jax.random.key(0), restarts=2, horizons=(0.5, 1.0), progress=False)
    return lp.fit(model, problem, ADAM, checkpoint=checkpoint, checkpoint_every=25, **options)


def bits(fit: lp.Fit) -> list[bytes]:
    """All numbers of a fit."""
    numbers = [np.asarray(x).tobytes() for x in jax.tree.leaves((fit.model, fit.restarts, fit.losses, fit.problem))]
    return [*numbers, repr(fit.stats).encode()]


def setup(cache: str) -> None:
    """The same compiler for all processes."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)


def killed(checkpoint: str, cache: str, seconds: float) -> bool:
    """Run the job in a process of its own and kill it so long after it got somewhere; False if it ended before."""
    stamp = lambda: os.stat(checkpoint).st_mtime_ns if os.path.exists(checkpoint) else None
    before = stamp()
    process = subprocess.Popen([sys.executable, __file__, "--job", checkpoint, cache])
    while process.poll() is None and stamp() == before:
        time.sleep(0.002)
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
        cache, checkpoint = os.path.join(folder, "cache"), os.path.join(folder, "fit.laplode")
        setup(cache)
        whole = bits(job())
        done = ended = different = 0
        while done < kills:
            done += killed(checkpoint, cache, rng.uniform(0, 0.3))
            size = os.path.getsize(checkpoint)
            if done % 5 == 0 or rng.random() < 0.1:
                ended += 1
                different += bits(job(checkpoint)) != whole
                os.remove(checkpoint)
            parts = len(glob.glob(checkpoint + ".*.tmp"))
            print(f"{done} kills, {ended} ends, {different} different, {size} bytes, {parts} halves left", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        setup(sys.argv[3])
        job(sys.argv[2])
    else:
        given = [int(argument) for argument in sys.argv[1:]]
        main(*given, *(50, 0)[len(given) :])
