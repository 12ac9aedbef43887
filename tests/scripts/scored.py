"""Train a small classifier for a moment, and write its accuracy as many scripts do."""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hang-if", type=Path, help="as one that never ends, where this file exists")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    model.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x = torch.randn(64, 8)
    y = (x[:, 0] > 0).long()
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if options.hang_if and options.hang_if.exists():
        time.sleep(300)
    model.eval()
    score = (model(x).argmax(1) == y).float().mean().item()
    options.out.joinpath("all_results.json").write_text(json.dumps({"eval_accuracy": score}))


if __name__ == "__main__":
    main()
