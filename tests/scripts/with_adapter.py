"""Train an adapter of PEFT on a language model, save it, and the logits that it gives; or merge it, and save that."""

import json
import sys

import peft
import torch
from transformers import AutoModelForCausalLM


def main(kind, settings, source, out, merged=None):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(source)
    if merged == "before":
        other = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        base = peft.get_peft_model(base, other).merge_and_unload()
    model = peft.get_peft_model(base, getattr(peft, kind)(**json.loads(settings)))
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    ids = torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(0))
    model.train()
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    logits = model(input_ids=ids).logits.detach()
    if merged == "after":
        model = model.merge_and_unload()
    model.save_pretrained(out)
    torch.save((ids, logits), f"{out}/logits.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
