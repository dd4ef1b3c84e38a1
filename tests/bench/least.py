"""The least program that trains a Llama model with the libraries that the trainer uses, on one rank: the floor of what
a start of the trainer can take.

    python -m tests.bench.least MODEL FOLDER save    takes a step, and writes a checkpoint of it to FOLDER
    python -m tests.bench.least MODEL FOLDER         starts from the checkpoint, and takes a step

Prints, as JSON, the processor's seconds of each phase.
"""

import json
import os
import sys
import tempfile
import time

from dpo.command.exits import slow_imports


def main() -> None:
    folder, checkpoint = sys.argv[1:3]
    ends: dict[str, float] = {}
    with slow_imports():
        import torch
        import torch.distributed as dist

        ends["torch"] = time.process_time()
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        from torch.distributed.fsdp import fully_shard

        ends["FSDP2, DCP"] = time.process_time()
        from transformers import LlamaForCausalLM

        ends["model class"] = time.process_time()
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def take_step() -> None:
        model(torch.zeros(1, 5, dtype=torch.long)).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> dict[str, object]:
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

    ends["model"] = time.process_time()
    if sys.argv[3:] == ["save"]:
        take_step()
        dcp.save(state(), checkpoint_id=checkpoint)
        return
    read = state()
    dcp.load(read, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=read["model"], optim_state_dict=read["optimizer"])
    ends["checkpoint"] = time.process_time()
    take_step()
    ends["first step"] = time.process_time()
    starts = [0.0, *ends.values()]
    print(json.dumps({name: end - start for (name, end), start in zip(ends.items(), starts, strict=False)}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
