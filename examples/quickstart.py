"""All files at a glance: the device, parameters, shapes, the time of a forward pass and the speed of generation.

    python examples/quickstart.py                                    # random weights, and the embedded checkpoints
    python examples/quickstart.py --device cuda --d-model 768 --n-layer 24 --vocab-size 50277       # mamba-130m's sizes

Times are medians of five, after one that does not count. Generation is greedy, batch 1, with the state as its memory.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where the model files are

from mamba import MambaConfig, MambaForCausalLM
from mamba2 import Mamba2Config, Mamba2ForCausalLM
from mamba3 import Mamba3Config, Mamba3ForCausalLM

LanguageModel = MambaForCausalLM | Mamba2ForCausalLM | Mamba3ForCausalLM
PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
FILES = {"mamba": (MambaConfig, MambaForCausalLM), "mamba2": (Mamba2Config, Mamba2ForCausalLM)}
FILES |= {"mamba3": (Mamba3Config, Mamba3ForCausalLM)}


def die(message: str) -> NoReturn:
    """Print one line and exit with status 2."""
    print("quickstart.py: error:", *message.split(), file=sys.stderr)
    raise SystemExit(2)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die  # one line, without the usage text
    add = parser.add_argument
    add("--model", choices=(*FILES, "all"), default="all")
    add("--d-model", type=int, default=512, help="of the model with random weights, like the next two")
    add("--n-layer", type=int, default=6)
    add("--vocab-size", type=int, default=10000)
    add("--batch-size", type=int, default=2)
    add("--seq-len", type=int, default=128)
    add("--new-tokens", type=int, default=64)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    args = parser.parse_args()
    if args.model != "mamba" and args.d_model % 32:
        die(f"--d-model must be a multiple of 32 for mamba2 and mamba3 (heads of 64 channels), got {args.d_model}")
    for name, least in (("batch_size", 1), ("seq_len", 1), ("new_tokens", 2)):
        if getattr(args, name) < least:
            die(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    return args


def pick_device(name: str) -> torch.device:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.empty(0, device=best if name == "auto" else name).device


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of five runs, until the device has finished."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@torch.inference_mode()
def report(title: str, model: LanguageModel, args: argparse.Namespace, device: torch.device) -> None:
    """Print a model's size and shapes, the time of a forward pass and the speed of generation."""
    b, l, config = args.batch_size, args.seq_len, model.config
    input_ids = torch.randint(config.vocab_size, (b, l), device=device)  # (b, l)
    forward = seconds(lambda: model(input_ids), device)
    tokens = model.stream(input_ids[:1, :1], args.new_tokens, temperature=0)
    next(tokens)  # the prompt is read
    start = time.perf_counter()
    rest = len(list(tokens))
    speed = rest / (time.perf_counter() - start)
    size = f"d_model {config.d_model}, {config.n_layer} layers, vocabulary {config.vocab_size}"
    print(f"\n{title}: {size}")
    print(f"  parameters    {sum(p.numel() for p in model.parameters()):,}")
    print(f"  input         {tuple(input_ids.shape)} ids")
    print(f"  output        {tuple(model(input_ids).shape)} logits")
    print(f"  forward pass  {1000 * forward:.1f} ms, {b * l / forward:,.0f} tokens/s")
    print(f"  generation    {speed:,.0f} tokens/s", flush=True)


def main() -> None:
    args = read_options()
    try:
        device = pick_device(args.device)
        threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        print(f"device: {device}{threads}, float32, torch {torch.__version__}")
        for name in FILES if args.model == "all" else [args.model]:
            torch.manual_seed(0)
            make_config, make_model = FILES[name]
            config = make_config(d_model=args.d_model, n_layer=args.n_layer, vocab_size=args.vocab_size)
            report(f"{name}.py, random weights", make_model(config).eval().to(device), args, device)
            checkpoint = PRETRAINED / f"shakespeare-{name}"
            model = make_model.from_pretrained(checkpoint, device=device, dtype=torch.float32)
            report(f"{name}.py, pretrained/{checkpoint.name}", model, args, device)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last from a torch without CUDA
        die(str(error))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
