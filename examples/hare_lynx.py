"""A Neural ODE with error bars for the hare and lynx pelts of the Hudson's Bay Company, 1900-1920.

Fits 1900-1915, forecasts to 1925, and compares with the five years held out.
Writes hare_lynx.png and hare_lynx.nc.
"""

import argparse
from pathlib import Path

import arviz_stats
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import laplode

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_compilation_cache_dir", ".jax_cache")  # what is compiled is kept for the next run
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
matplotlib.use("Agg")


class Field(eqx.Module):
    """The rate of change of both log-populations."""

    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(y)


def pelts(y, args):
    """Thousands of pelts. The state is their logarithm, centered so that the network sees numbers around zero."""
    return 20 * jnp.exp(y)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("."), help="folder for hare_lynx.png and hare_lynx.nc")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--quick", action="store_true", help="a poor fit in less time, to see that everything runs")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)
key_model, key_fit, key_predict, key_prior = jax.random.split(jax.random.key(options.seed), 4)

table = np.genfromtxt(Path(__file__).with_suffix(".csv"), delimiter=",", skip_header=4)
years, counts = table[:, 0], table[:, 1:]
fitted = laplode.Trajectories(years[:16], counts[:16])
held_out = laplode.Trajectories(years[16:], counts[16:])

model = laplode.NeuralODE(
    Field(eqx.nn.MLP(2, 2, width_size=8, depth=1, activation=jnp.tanh, key=key_model)),
    y0=np.log(counts[0] / 20),
    observe=pelts,
)
# 32 numbers can't teach 44 parameters and the noise: learned together, the noise shrinks to a few percent. It is set to
# 30%, a little above the 25% that Lotka-Volterra fits of these counts find.
problem = laplode.Problem(fitted, laplode.LogNormal(0.3), laplode.GaussianPrior(1.0))

fit = laplode.fit(
    model,
    problem,
    optax.adam(1e-2),
    steps=100 if options.quick else 2000,
    key=key_fit,
    horizons=(0.4, 1.0),
    restarts=2 if options.quick else 4,
)
# Adam hovers above the minimum, where a posterior means little; refine goes down to it.
fit = laplode.refine(fit.model, fit.problem)
print(f"refined: {fit.reason}, {fit.loss:.2f} nats")

# The likelihood's curvature is slightly negative in directions that the data leave open (down to about -1, where the
# prior adds 1); clipped at zero, these are left to the prior.
posterior = laplode.laplace(fit.model, fit.problem, curvature="hessian")
print(posterior.diagnostics)

observed = laplode.predict(posterior, fitted.ts, key=key_predict)
forecast = laplode.predict(posterior, np.arange(1900, 1925.01, 0.25), key=key_predict)
tree = laplode.to_datatree(posterior, observed, forecast, key=key_prior, coords={"channel": ["hare", "lynx"]})
tree.to_netcdf(options.out / "hare_lynx.nc")
print(
    arviz_stats.summary(tree, group="predictions", var_names="y", coords={"time": held_out.ts[0]}, kind="stats").assign(
        held_out=held_out.ys.ravel()
    )
)

picture = laplode.plot_trajectories(tree, held_out=held_out, labels={"time": "year", "y": "pelts (thousands)"})
for ax in picture.viz["plot"].values.flat:
    ax.set_yscale("log")
    ax.set_yticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
    ax.set_ylim(1, 500)
    ax.minorticks_off()
picture.savefig(options.out / "hare_lynx.png", dpi=110)
