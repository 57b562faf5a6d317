"""The peer's side of a PFN's forward pass: automl's transformer, of the same size, with random weights."""

import json
import sys
import time
from importlib.metadata import version

import torch
from pfns.model.encoders import get_linear_x_encoder, get_linear_y_encoder
from pfns.model.transformer import TableTransformer

settings = json.loads(sys.argv[1])
torch.set_num_threads(settings["threads"])
torch.random.default_generator.manual_seed(0)
network = TableTransformer(
    encoder=get_linear_x_encoder(settings["width"], settings["features"]),
    y_encoder=get_linear_y_encoder(settings["width"]),
    ninp=settings["width"],
    nhid=settings["expansion"] * settings["width"],
    nlayers=settings["layers"],
    nhead=settings["heads"],
    features_per_group=settings["features"],
    attention_between_features=False,
    decoder_dict={"standard": (None, settings["outputs"])},
).eval()
parameters = sum(parameter.numel() for parameter in network.parameters())
print(json.dumps({name: version(name) for name in ("pfns", "torch")} | {"parameters": str(parameters)}), flush=True)
case = None
for line in sys.stdin:
    if line.strip() == "run":
        start = time.perf_counter()
        with torch.no_grad():
            network(*case)
        print(json.dumps(time.perf_counter() - start), flush=True)
    else:
        tasks, n, q = json.loads(line)
        case = [torch.randn(tasks, n + q, settings["features"]), torch.randn(tasks, n, 1)]
        print(json.dumps(None), flush=True)
