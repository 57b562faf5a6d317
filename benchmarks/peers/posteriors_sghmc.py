"""The peer's side of the SG-MCMC benchmark: posteriors' SGHMC, eager, vmapped over chains if there are several."""

import json
import sys
import time
from importlib.metadata import version

import posteriors
import torch
from torch import nn

settings = json.loads(sys.argv[1])
torch.set_num_threads(settings["num_threads"])
torch.manual_seed(0)  # noqa: TID251 - the peer draws from the global generator
CONV = settings["network"] == "conv"
if CONV:
    X, Y = torch.randn(settings["num_rows"], 1, 8, 8), torch.randint(10, (settings["num_rows"],))
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
else:
    X = torch.randn(settings["num_rows"], 8)
    Y = torch.sin(X[:, :1])
    network = nn.Sequential(nn.Linear(8, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 1))
N, chains = settings["num_rows"], settings["num_chains"]


def log_posterior(params, batch):
    """As its documentation says: mean log-likelihood plus log prior / N, and temperature 1 / N."""
    x, y = batch
    f = torch.func.functional_call(network, params, (x,))
    log_likelihood = -nn.functional.cross_entropy(f, y) if CONV else -50.0 * (y - f).square().sum(-1).mean()
    return log_likelihood + posteriors.diag_normal_log_prob(params, sd_diag=1.0, normalize=False) / N, f


transform = posteriors.sgmcmc.sghmc.build(log_posterior, lr=settings["step_size"], alpha=0.1, temperature=1 / N)
params = {name: value.detach() for name, value in network.named_parameters()}
if chains > 1:
    params = {name: value + 0.1 * torch.randn(chains, *value.shape) for name, value in params.items()}
    state = torch.func.vmap(transform.init, randomness="different")(params)
    update = torch.func.vmap(transform.update, in_dims=(0, None), randomness="different")
else:
    state, update = transform.init(params), transform.update


def run():
    """All steps of a run; all chains share the minibatch, as ours do."""
    global state
    for _ in range(settings["num_steps"]):
        rows = torch.randint(N, (settings["batch_size"],))
        state, _ = update(state, (X[rows], Y[rows]))


settings["num_steps"], num_steps = 20, settings["num_steps"]
run()
settings["num_steps"] = num_steps
print(json.dumps({name: version(name) for name in ("posteriors", "torch")}), flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    run()
    print(time.perf_counter() - start, flush=True)
