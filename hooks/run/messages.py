"""The sentences in which a process tells of its models, and the rank that it bears in them."""

import torch

from surgery.errors import some

from .inside.models import Model
from .options import Options
from .ranks import launched_rank, launched_size

NO_OPTIMIZER = (
    "optimizer: expected one of torch.optim with the parameters of a model, got none: no model is known to be trained. "
    "Call patch_model in the script."
)

NO_OPTIMIZER_YET = (
    "expected an optimizer of torch.optim with the parameters of a model before the first backward pass, got none that "
    "has them: so far nothing is regularized. Call patch_model in the script."
)
BY_HAND = (
    "trained without an optimizer of torch.optim: found at its first backward pass, so that its first step is without "
    "regularization. Whether it is changed after each backward pass or after several is not known."
)
NEW_BESIDE = "{}: new, beside a pretrained {}: left as it is."
NEW_HEAD = "{}: new, beside a pretrained {} that is not trained: nothing acts on its weights."
WAITING = "its pretrained weights are frozen: no effect of {} until they are trained."
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
        lam = f"lam {options.noisytune:g}, seed {options.noise_seed}"
        noise = f"noise on {entry['perturbed']} of {entry['parameters']} parameters ({lam})"
        done.append("no noise again" if model.is_resumed else noise if entry["perturbed"] else "no noise")
    done += [one.announcement(entry) for one in options.methods if one.name in model.methods]
    new = f"; new: {some(entry['new'])}" if entry["new"] else ""
    return f"{entry['class']}: {', '.join(done) or 'left as it is'}{new}"


def find_rank() -> int:
    """Return the rank of this process, as torch or a launcher's environment has it; 0 where there is one process."""
    return torch.distributed.get_rank() if _is_initialized() else launched_rank()


def find_speaker() -> str:
    """Return how the lines of this process begin: with its rank, where there are several."""
    size = torch.distributed.get_world_size() if _is_initialized() else launched_size()
    return f"surgery: rank {find_rank()}: " if size > 1 else "surgery: "


def _is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
