"""The sentences in which a process tells of its models, and the rank that it bears in them."""

import os

import torch

from surgery.errors import some

from .inside.models import Model
from .options import Options

_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "LOCAL_RANK")

NO_OPTIMIZER = (
    "optimizer: expected one of torch.optim with the parameters of a model, got none: no model is known to be trained. "
    "Call patch_model in the script."
)

NOISE_OFF = (
    "expected weights with noise, got those from before it, written back after training had begun. Build the model "
    "anew for each fold."
)
FROM_SCRATCH = (
    "no load of pretrained weights was seen: by {} it is held near its random start, which hurts training from scratch."
)
RESUMED_WITHOUT = (
    "expected an optimizer of a run that began with noise, got one of a run without. Start from the pretrained "
    "weights, or leave noisytune out."
)
LOADED_OVER = (
    "expected pretrained weights, or an optimizer's state of a run that began with noise, got weights that "
    "load_state_dict has put over the pretrained ones, without such a state: whether they have noise is not known. "
    "Load the optimizer's state too, or leave noisytune out and run `surgery perturb` on what is loaded."
)
UNSEEN = (
    "expected a call of the model in training mode before the optimizer's step, got none: regularized from the next "
    "step on, if at all. Call model.train(), for from_pretrained leaves a model in eval mode, and model(...), not its "
    "forward."
)


def describe_model(options: Options, model: Model) -> str:
    """Return the line that says what was done to a model."""
    entry, done = model.entry(is_last=False), []
    if options.noisytune is not None:
        lam = f"lam {options.noisytune:g}, seed {options.seed or 0}"
        noise = f"noise on {entry['perturbed']} of {entry['parameters']} parameters ({lam})"
        done.append("no noise again" if model.is_resumed else noise)
    if model.is_patched:
        done += [one.announcement(entry) for one in options.methods]
    new = f"; new: {some(entry['new'])}" if entry["new"] else ""
    return f"{entry['class']}: {', '.join(done)}{new}"


def find_rank() -> int:
    """Return the rank of this process, as torch or a launcher's environment has it; 0 where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(next((os.environ[name] for name in _RANKS if os.environ.get(name, "").isdigit()), 0))
