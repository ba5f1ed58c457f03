"""Run by the Python that has vLLM, which may be another than ours: many models' greedy answers.

`python worker.py JOB ANSWERS`: JOB is JSON as `neft_utils.evaluate.vllm.engine` writes it, ANSWERS
gets {"version": vLLM's, "tokens": the new token ids of each request}. Needs vLLM alone, nothing of
this package.
"""

import json
import os
import sys
import threading
import time

# Before vLLM is imported. One process, so that the class below needs no name to be imported by;
# the runner whose interface for it is documented.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"  # all that it needs is here

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


class RepetitionPenalty(LogitsProcessor):
    """As `evaluate.generate.RepetitionPenalty`: vLLM's own penalty can exempt no token."""

    def __init__(self, vllm_config, device, is_pin_memory):
        size = vllm_config.model_config.get_vocab_size()
        # One more than rows: a row is replaced after the state of the new one has been made.
        slots = vllm_config.scheduler_config.max_num_seqs + 1
        self.seen = torch.zeros(slots, size, dtype=torch.bool, device=device)
        self.rows = {}  # row of the batch: [slot, penalty, exempt ids, new tokens, how many marked]

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        process_dict_updates(self.rows, batch_update, self._begin)

    def _begin(self, params, prompt, new):
        penalty, exempt = params.extra_args["penalty"], set(params.extra_args["exempt"])
        if penalty == 1:
            return None
        used = {row[0] for row in self.rows.values()}
        slot = next(i for i in range(len(self.seen)) if i not in used)
        self.seen[slot] = False
        self._mark([slot] * len(prompt), prompt, exempt)
        return [slot, penalty, exempt, new, 0]

    def _mark(self, slots, tokens, exempt):
        pairs = [(s, t) for s, t in zip(slots, tokens, strict=True) if t not in exempt]
        if pairs:
            slots, tokens = torch.tensor(pairs, device=self.seen.device).unbind(1)
            self.seen[slots, tokens] = True

    def apply(self, logits):
        if not self.rows:
            return logits
        slots, tokens = [], []
        for row in self.rows.values():
            slot, _, exempt, new, marked = row
            fresh = [t for t in new[marked:] if t not in exempt]
            slots += [slot] * len(fresh)
            tokens += fresh
            row[4] = len(new)
        self._mark(slots, tokens, ())
        rows = torch.tensor(list(self.rows), device=logits.device)
        values = list(self.rows.values())
        seen = self.seen[torch.tensor([row[0] for row in values], device=logits.device)]
        penalty = torch.tensor([[row[1]] for row in values], device=logits.device)
        own = logits[rows]
        size = own.shape[1]  # may be padded behind the vocabulary
        pushed = torch.where(own > 0, own / penalty, own * penalty)
        logits[rows] = torch.where(seen[:, :size], pushed, own)
        return logits


def end_with(parent):
    """No orphan shall hold a GPU when the step that asked has been killed."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def main(job, answers):
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    with open(job, encoding="utf-8") as file:
        job = json.load(file)
    adapters = job["adapters"]
    lora = {
        "enable_lora": True,
        "max_loras": min(len(adapters), 8),  # at a time; the others wait in memory
        "max_cpu_loras": len(adapters),
        "max_lora_rank": job["max_lora_rank"],
    }
    engine = LLM(
        job["model"],
        tokenizer=job["tokenizer"],
        dtype=job["dtype"],
        max_model_len=job["max_model_len"],
        max_num_seqs=job["max_num_seqs"],
        logits_processors=[RepetitionPenalty],
        async_scheduling=False,  # the penalty has to know the last token
        generation_config="vllm",  # no defaults from the model's folder: greedy is what we ask
        seed=0,
        **(lora if adapters else {}),
    )
    loras = {name: LoRARequest(name, n, path) for n, (name, path) in enumerate(adapters.items(), 1)}
    requests = job["requests"]
    params = [
        SamplingParams(
            temperature=0,
            min_tokens=one["min_new_tokens"],
            max_tokens=one["max_new_tokens"],
            stop_token_ids=job["stops"],
            detokenize=False,
            extra_args={"penalty": one["repetition_penalty"], "exempt": job["exempt"]},
        )
        for one in requests
    ]
    prompts = [{"prompt_token_ids": one["prompt_ids"]} for one in requests]
    wanted = [loras[one["adapter"]] if one["adapter"] else None for one in requests]
    done = engine.generate(prompts, params, lora_request=wanted if adapters else None)
    tokens = [list(one.outputs[0].token_ids) for one in done]
    with open(answers, "w", encoding="utf-8") as file:
        json.dump({"version": vllm.__version__, "tokens": tokens}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
