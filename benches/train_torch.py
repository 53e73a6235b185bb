"""PyTorch's training speed on the shape of the shipped model, to compare with `cargo bench --bench train_ops`.

Usage: pip install torch transformers && python benches/train_torch.py [--dtype f32|bf16] [--steps 20]
Prints tokens per second of wall time and of CPU time; run it in turn with Shoal's, nothing else running.
"""

import argparse
import os
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

parser = argparse.ArgumentParser()
parser.add_argument("--dtype", choices=["f32", "bf16"], default="bf16")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--width", type=int, default=256)
args = parser.parse_args()

torch.manual_seed(0)
torch.set_num_threads(len(os.sched_getaffinity(0)))
config = GPT2Config(
    vocab_size=8192, n_positions=256, n_embd=args.width, n_layer=args.layers, n_head=args.width // 64,
    bos_token_id=0, eos_token_id=0,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)
model = GPT2LMHeadModel(config).train()
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
ids = torch.randint(0, 8192, (args.batch, args.length))


def step():
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
        loss = model(ids, labels=ids).loss
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


for _ in range(3):
    step()
times, cpu = [], time.process_time()
for _ in range(args.steps):
    start = time.perf_counter()
    step()
    times.append(time.perf_counter() - start)
cpu = time.process_time() - cpu
tokens = args.batch * args.length
print(f"torch {args.dtype}: {tokens / statistics.median(times):.0f} tokens/s (median step), "
      f"{2 * tokens * args.steps / cpu:.0f} tokens/s by CPU time of two cores")
