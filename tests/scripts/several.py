"""Train several models in one process; each way says what it leaves."""

import copy
import gc
import sys
import weakref

import torch
from nets import batches, build
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.second(self.first(x).relu())


def build_critic():
    torch.manual_seed(1)
    return Critic().double()


def play(maker, critic):
    """A generator and its critic, each with an optimizer."""
    of_maker, of_critic = (torch.optim.SGD(model.parameters(), lr=0.1) for model in (maker, critic))
    maker.train()
    critic.train()
    for number, (x, labels) in enumerate(batches()):
        torch.manual_seed(100 + number)
        F.cross_entropy(critic(maker(x).detach()), labels % 2).backward()
        of_critic.step()
        of_critic.zero_grad()
        F.cross_entropy(critic(maker(x)), 1 - labels % 2).backward()
        of_maker.step()
        of_maker.zero_grad()
        of_critic.zero_grad()
    return {"maker": maker.state_dict(), "critic": critic.state_dict()}


def call_parts(model):
    """The model is never called, its modules are."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for number, (x, labels) in enumerate(batches()):
        torch.manual_seed(100 + number)
        F.cross_entropy(model.head(model.body(x)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model.state_dict()}


def learn(model, teacher):
    """A student that learns what its teacher says."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    teacher.eval()
    for number, (x, labels) in enumerate(batches()):
        with torch.no_grad():
            goal = teacher(x)
        torch.manual_seed(100 + number)
        logits = model(x)
        (F.cross_entropy(logits, labels) + (logits - goal).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model.state_dict(), "teacher": teacher.state_dict()}


def average(model):
    """An average of the weights, made before the optimizer, and a copy of the model, made amid the training."""
    ema = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    states = []
    for number, (x, labels) in enumerate(batches()):
        torch.manual_seed(100 + number)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        states.append(copy.deepcopy(model).state_dict())
    return {"model": model.state_dict(), "ema": ema.module.state_dict(), "copy": states[-1]}


def evaluate(model):
    """Beside models that are trained, one that is not."""
    for is_training in (False, True):
        model.train(is_training)
        with torch.no_grad():
            model(batches()[0][0])
    return {"model": model.state_dict()}


def sweep():
    """One model after another, each with an optimizer that is given up before."""
    left, alive = [], []
    for _ in range(5):
        given_up = build()
        torch.optim.SGD(given_up.parameters(), lr=1.0)
        del given_up
        gc.collect()
        model = build()
        left.append(average(model)["model"])
        alive.append(weakref.ref(model))
        del model
        gc.collect()
    return {"models": left, "alive": sum(one() is not None for one in alive)}


WAYS = {
    "play": lambda: play(build(), build_critic()),
    "call_parts": lambda: call_parts(build()),
    "learn": lambda: learn(build(), build()),
    "average": lambda: average(build()),
    "evaluate": lambda: evaluate(build()),
    "sweep": sweep,
}

if __name__ == "__main__":
    torch.save({way: WAYS[way]() for way in sys.argv[2:]}, sys.argv[1])
