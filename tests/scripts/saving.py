"""Train a model, and save it whole; load it where there is no surgery."""

import copy
import io
import json
import pickle
import sys
import types
from pathlib import Path

import torch
from nets import Net, batches
from torch.nn import functional as F


class Saved(Net):
    def __init__(self):
        super().__init__()
        self.dropout = 0.3  # a rate that is no module, as in BART

    def forward(self, x):
        return super().forward(F.dropout(x, self.dropout, self.training))


def build():
    torch.manual_seed(0)
    model = Saved().double()
    model.load_state_dict({name: w.clone() for name, w in model.state_dict().items()})
    return model


def train(model, optimizer, numbers):
    model.train()
    for number in numbers:
        x, labels = batches()[number]
        torch.manual_seed(100 + number)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def as_bytes(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file, **options)
    return file.getvalue()


def untrained():
    """What nothing was done to, of all kinds."""
    model = build()
    optimizer = torch.optim.AdamW(torch.nn.Linear(3, 4).parameters())
    kept = {"shared": [model.head, model], "of": Saved, "call": F.dropout, "more": (torch.ones(3), {1: "a"})}
    return kept | {"optimizer": optimizer, "state": model.state_dict()}


def other_pickle():
    """A pickle module of the script's own, which knows when it was used."""
    other = types.ModuleType("other")
    other.__dict__.update(pickle.__dict__, used=[])

    class Pickler(pickle.Pickler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            other.used.append(1)

    other.Pickler = Pickler
    return other


def write(folder):
    plain = as_bytes(untrained())
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    nested = {"epoch": 2, "of": [model, {"copy": copy.deepcopy(model)}], "optimizer": optimizer.state_dict()}
    for name, things in {"model": model, "nested": nested, "state": model.state_dict()}.items():
        torch.save(things, folder / f"{name}.pt")
    torch.save(model, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    with (folder / "file.pt").open("wb") as file:
        torch.save(model, file, pickle_protocol=4)
    other = other_pickle()
    torch.save(model, folder / "other.pt", other)
    again = torch.load(folder / "other.pt", weights_only=False)
    in_bytes = as_bytes(model)
    train(model, optimizer, range(2, 5))
    torch.save(model.state_dict(), folder / "final.pt")
    (folder / "model.bin").write_bytes(in_bytes)
    (folder / "untrained.bin").write_bytes(plain)
    found = {"used": len(other.used), "other": [kind(again), kind(model)]}
    (folder / "written.json").write_text(json.dumps(found))


def kind(model):
    """Everything of a loaded model but its weights."""
    return {
        "rates": [model.dropout, model.body[2].p],
        "hooks": sum(
            len(value) for one in model.modules() for name, value in vars(one).items() if name.endswith("_hooks")
        ),
        "marks": sorted({name for one in [*model.modules(), *model.parameters()] for name in vars(one)} & OURS),
    }


OURS = {"_surgery_patch", "_surgery_part", "_surgery_mixed", "_surgery_rates", "_is_surgery_loaded"}


def read(folder):
    state = torch.load(folder / "state.pt", weights_only=True)
    nested = torch.load(folder / "nested.pt", weights_only=False)
    models = {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in ("model", "legacy", "file")}
    models |= {"nested": nested["of"][0], "copy": nested["of"][1]["copy"]}
    far = {
        name: max((w - state[key]).abs().max().item() for key, w in model.state_dict().items())
        for name, model in models.items()
    }
    found = {name: kind(model) | {"far": far[name]} for name, model in models.items()}
    (folder / "read.json").write_text(json.dumps(found))
    (folder / "untrained-without.bin").write_bytes(as_bytes(untrained()))
    model = build().train()
    model.load_state_dict(state)
    (folder / "model-without.bin").write_bytes(as_bytes(model))


class Nothing:
    """Finds all but surgery."""

    @staticmethod
    def find_spec(name, path, target=None):
        if name.split(".")[0] == "surgery":
            raise ImportError(name)


if __name__ == "__main__":
    if sys.argv[1] == "read":
        sys.meta_path.insert(0, Nothing)
        read(Path(sys.argv[2]))
    else:
        write(Path(sys.argv[2]))
