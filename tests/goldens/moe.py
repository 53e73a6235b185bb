"""Writes moe.json and moe.safetensors: GPT-2 with sparse mixtures of experts, as PyTorch computes it.

    python tests/goldens/moe.py

Hugging Face's GPT-2, random weights, with the feed-forward networks of some blocks replaced by the formulas below: four
gates, top-1 and top-2. All eight models share experts and everything else; only their gates differ.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

HERE = Path(__file__).parent
LAYERS, EXPERTS, TASKS = [0, 2], 4, ["image", "video", "music"]
GATES = ["token", "token_task", "per_task", "task"]
# The smallest lead of an expert over the next likely one: no rounding turns it.
LEAD = 2e-4


class TooClose(Exception):
    """Some row's experts are nearly as likely as each other."""


class Moe(nn.Module):
    """y = sum over the chosen e of p_e * FFN_e(h), with p = softmax(z) over the experts, in f32."""

    def __init__(self, config, kind, top_k, experts, weight, task_bias):
        super().__init__()
        self.kind, self.top_k, self.experts = kind, top_k, experts
        self.weight, self.bias = weight, task_bias
        self.task = None  # set before each pass: an index, or None

    def logits(self, h):
        t = self.task
        if self.kind == "token":
            return h @ self.weight.T
        if self.kind == "token_task":
            return h @ self.weight.T + (self.bias.mean(0) if t is None else self.bias[t])
        if self.kind == "per_task":
            each = torch.einsum("ted,rd->tre", self.weight, h)
            return each.mean(0) if t is None else each[t]
        return (self.bias.mean(0) if t is None else self.bias[t]).expand(len(h), -1)

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        p = torch.softmax(self.logits(h).float(), -1)
        ranked, order = torch.sort(p, descending=True, stable=True)
        if (ranked[:, :-1] - ranked[:, 1:]).min() < LEAD:
            raise TooClose
        chosen, best = ranked[:, : self.top_k], order[:, : self.top_k]
        if self.top_k == 1:
            weights = 1 + chosen - chosen.detach()
        else:
            weights = chosen / chosen.sum(-1, keepdim=True)
        self.chosen = best
        self.entropy = -(p * p.log()).sum(-1).detach()
        outputs = torch.stack([expert(h) for expert in self.experts], 1)
        picked = outputs.gather(1, best[..., None].expand(-1, -1, h.shape[-1]))
        return (weights[..., None] * picked).sum(1).reshape(x.shape)


def main():
    torch.manual_seed(11)
    config = GPT2Config(
        vocab_size=48, n_positions=16, n_embd=16, n_layer=3, n_head=2, n_inner=24, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2, attn_implementation="eager",
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    experts = {i: nn.ModuleList(GPT2MLP(config.n_inner, config) for _ in range(EXPERTS)) for i in LAYERS}
    tensors = {}
    for i in LAYERS:
        for p in experts[i].parameters():
            p.data = 0.2 * torch.randn_like(p)
        for e, expert in enumerate(experts[i]):
            for name, p in expert.named_parameters():
                tensors[f"transformer.h.{i}.moe.experts.{e}.{name}"] = p.data
    sequences = [
        {"ids": torch.randint(1, 48, (n,)).tolist(), "task": task} for n, task in [(9, 0), (6, 2), (11, None), (5, 1)]
    ]
    for kind in GATES:
        done = {}
        while not done:
            try:
                done = outcomes(kind, config, model, experts, sequences)
            except TooClose:
                pass
        tensors |= done
    for name, p in model.named_parameters():
        if ".mlp." not in name or name.split(".")[2] not in map(str, LAYERS):
            tensors[name] = p.data
    tensors.pop("lm_head.weight", None)
    save_file({name: t.contiguous() for name, t in tensors.items()}, HERE / "moe.safetensors")
    about = json.loads(config.to_json_string(use_diff=False))
    keys = ["model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon"]
    about = {key: about[key] for key in [*keys, "activation_function", "eos_token_id"]}
    about["shoal"] = {"tasks": TASKS, "moe": {"layers": LAYERS, "num_experts": EXPERTS}}
    lines = ",\n".join(f"    {json.dumps(s)}" for s in sequences)
    text = f'{{\n  "config": {json.dumps(about)},\n  "sequences": [\n{lines}\n  ]\n}}\n'
    (HERE / "moe.json").write_text(text)


def outcomes(kind, config, model, experts, sequences):
    """A random gate of this kind, and what the model does with it for each top-k."""
    tensors, gates = {}, {}
    for i in LAYERS:
        shape = [len(TASKS), EXPERTS, config.n_embd][0 if kind == "per_task" else 1 :]
        weight = None if kind == "task" else nn.Parameter(0.5 * torch.randn(shape))
        bias = nn.Parameter(torch.randn(len(TASKS), EXPERTS)) if kind in ("token_task", "task") else None
        gates[i] = {"weight": weight, "task_bias": bias}
        for name, p in gates[i].items():
            if p is not None:
                tensors[f"{kind}.transformer.h.{i}.moe.gate.{name}"] = p.data
    for top_k in (1, 2):
        moes = {i: Moe(config, kind, top_k, experts[i], **gates[i]) for i in LAYERS}
        for i in LAYERS:
            model.transformer.h[i].mlp = moes[i]
        record(tensors, f"{kind}.{top_k}", model, moes, gates, sequences)
    return tensors


def record(tensors, tag, model, moes, gates, sequences):
    """Logits, choices, entropies and the gates' gradients of the mean of the sequences' next-token losses."""
    loss, rows, chosen, entropy = 0.0, [], [], []
    for sequence in sequences:
        for moe in moes.values():
            moe.task = sequence["task"]
        ids = torch.tensor([sequence["ids"]])
        logits = model(ids).logits[0]
        loss = loss + nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
        rows.append(logits.detach())
        chosen.append(torch.stack([moe.chosen for moe in moes.values()]))
        entropy.append(torch.stack([moe.entropy for moe in moes.values()]))
    loss = loss / sum(len(s["ids"]) - 1 for s in sequences)
    named = [(f"transformer.h.{i}.moe.gate.{name}", p) for i in gates for name, p in gates[i].items()]
    parameters = {name: p for name, p in named if p is not None}
    expert = moes[LAYERS[-1]].experts[1].c_fc.weight
    parameters[f"transformer.h.{LAYERS[-1]}.moe.experts.1.c_fc.weight"] = expert
    grads = torch.autograd.grad(loss, list(parameters.values()))
    for name, grad in zip(parameters, grads):
        tensors[f"{tag}.grad.{name}"] = grad
    tensors[f"{tag}.logits"] = torch.cat(rows)
    tensors[f"{tag}.experts"] = torch.cat(chosen, 1).to(torch.uint8)
    tensors[f"{tag}.entropy"] = torch.cat(entropy, 1)


if __name__ == "__main__":
    main()
