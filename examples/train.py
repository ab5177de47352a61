"""Train a byte-level Mamba, Mamba-2 or Mamba-3 language model on any text file and store it in Hugging Face format.

    python examples/train.py --data input.txt --model mamba --out runs/mamba      # train, and store in runs/mamba
    python examples/train.py --data input.txt --model mamba2 --out runs/mamba2    # or mamba3
    python examples/train.py --data input.txt --out runs/mamba --resume           # continue after an interruption
    python examples/train.py --data input.txt --evaluate runs/mamba               # only print the validation loss
    python mamba.py "ROMEO:" --model runs/mamba                                   # write text with it

The first 90% of the bytes are for training, the last 10% for validation. The validation loss is nanoGPT's: consecutive
windows of 256 bytes, each from a zero state, every position counted, in nats per byte and in float32. The weights that
are evaluated and stored are a moving average of the trained ones (--ema), kept from the best evaluation, in bfloat16.
Shapes: b batch, l sequence length, v vocabulary (the 256 byte values).
"""

import argparse
import copy
import json
import math
import os
import pickle
import struct
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where the model files are

from mamba import MambaConfig, MambaForCausalLM
from mamba2 import Mamba2Config, Mamba2ForCausalLM
from mamba3 import Mamba3Config, Mamba3ForCausalLM

LanguageModel = MambaForCausalLM | Mamba2ForCausalLM | Mamba3ForCausalLM
WINDOW = 256  # bytes in a validation window, as in nanoGPT
FRESH = ("data", "out", "resume", "evaluate", "device", "threads")  # options that a resumed run takes anew


def die(message: str) -> NoReturn:
    """Print one line and exit with status 2."""
    print("train.py: error:", *message.split(), file=sys.stderr)
    raise SystemExit(2)


def read_options() -> tuple[argparse.Namespace, dict]:
    """The options, and the state to resume from (empty for a new run)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die  # one line, without the usage text
    add = parser.add_argument
    add("--data", required=True, type=Path, help="text file to learn")
    add("--out", type=Path, help="directory for the model and, while training, for training_state.pt")
    add("--resume", action="store_true", help="continue the run in --out with its options")
    add("--evaluate", type=Path, metavar="DIR", help="only print the validation loss of the checkpoint in DIR")
    add("--model", choices=("mamba", "mamba2", "mamba3"), default="mamba")
    add("--d-model", type=int, default=256)
    add("--n-layer", type=int, default=6)
    add("--d-state", type=int, help="state size (default: mamba 16, others 64)")
    add("--headdim", type=int, default=64, help="mamba2, mamba3: width of a head")
    add("--rope-fraction", type=float, default=0.5, help="mamba3: how much of the state is rotated")
    add("--chunk-size", type=int, default=64, help="mamba2, mamba3: steps of a chunk")
    add("--steps", type=int, default=1500)
    add("--batch-size", type=int, default=32)
    add("--seq-len", type=int, default=256)
    add("--lr", type=float, default=2e-3)
    add("--min-lr", type=float, default=1e-4, help="learning rate at the end of the cosine")
    add("--warmup", type=int, default=100, help="steps of linear warmup")
    add("--weight-decay", type=float, default=0.1)
    add("--dropout", type=float, default=0.2, help="on the embedding and on each mixer's output")
    add("--grad-clip", type=float, default=1.0, help="largest norm of the gradient (0: no limit)")
    add("--ema", type=float, default=0.99, help="decay of the moving average of the weights (0: no averaging)")
    add("--eval-every", type=int, default=100, help="steps between evaluations")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--amp", action=argparse.BooleanOptionalAction, help="train in bfloat16 autocast (default: where it is fast)")
    add("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    args, state = parser.parse_args(), {}
    if not (args.out or args.evaluate):
        die("--out (or --evaluate) is required")
    if args.resume and not args.evaluate:
        state = load_state(args.out / "training_state.pt")
        vars(args).update(state["args"])
    for name in ("steps", "batch_size", "seq_len", "eval_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    for name in ("dropout", "ema"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(args, name)}")
    return args, state


def pick_device(args: argparse.Namespace) -> torch.device:
    """The device. Sets args.amp, unless chosen, to whether it multiplies bfloat16 matrices in hardware."""
    if args.threads:
        torch.set_num_threads(args.threads)
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.empty(0, device=best if args.device == "auto" else args.device).device
    if args.amp is None and device.type == "cpu":
        args.amp = getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # bool() is False
    elif args.amp is None:
        args.amp = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device


def read_bytes(path: Path, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The file's first 90% and last 10%, as uint8 tensors."""
    text = path.read_bytes()
    split = int(0.9 * len(text))
    if split <= seq_len or len(text) - split <= WINDOW:
        raise ValueError(f"{path} has {len(text)} bytes: 90% of them must exceed {seq_len}, and 10% {WINDOW}")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return data[:split], data[split:]


def build(args: argparse.Namespace) -> LanguageModel:
    """A new model over the 256 byte values."""
    d_state = (16 if args.model == "mamba" else 64) if args.d_state is None else args.d_state
    sizes = {"d_model": args.d_model, "n_layer": args.n_layer, "vocab_size": 256, "d_state": d_state}
    if args.model == "mamba":
        return MambaForCausalLM(MambaConfig(**sizes))
    heads = {"headdim": args.headdim, "chunk_size": args.chunk_size}
    if args.model == "mamba2":
        return Mamba2ForCausalLM(Mamba2Config(**sizes, **heads))
    return Mamba3ForCausalLM(Mamba3Config(**sizes, **heads, rope_fraction=args.rope_fraction))


def load(directory: Path, device: torch.device) -> LanguageModel:
    """The stored byte-level model of any kind, in float32."""
    stored = json.loads((directory / "config.json").read_text())
    kind = stored.get("model_type") or stored.get("ssm_cfg", {}).get("layer", "").lower()
    model_class = {"mamba2": Mamba2ForCausalLM, "mamba3": Mamba3ForCausalLM}.get(kind, MambaForCausalLM)
    model = model_class.from_pretrained(str(directory), device=device, dtype=torch.float32)
    if model.config.vocab_size != 256:
        raise ValueError(f"{directory} is no byte-level model: vocab_size is {model.config.vocab_size}, not 256")
    return model


def save_byte_tokenizer(directory: Path) -> None:
    """A tokenizer for AutoTokenizer whose 256 tokens are the byte values: token 65 is "A", and no text is unknown."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())  # one a byte: the byte's own character where printable,
    vocab = {symbol: ord(symbol) for symbol in symbols if ord(symbol) < 256}
    others = [byte for byte in range(256) if chr(byte) not in vocab]  # else, in order, a character from 256 on
    vocab |= dict(zip(symbols[-len(others) :], others, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"model_input_names": ["input_ids", "attention_mask"]}  # the names that every transformers release reads
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.inference_mode()
def evaluate(model: torch.nn.Module, val: torch.Tensor) -> float:
    """Mean loss in nats per byte over the consecutive full windows of val (uint8), each from a zero state."""
    model.eval()
    windows = val.unfold(0, WINDOW + 1, WINDOW)  # (windows, 257): the last byte of one is the first of the next
    total, device = 0.0, next(model.parameters()).device
    for batch in windows.split(32):
        batch = batch.to(device).long()  # (b, 257)
        logits = model(batch[:, :-1])  # (b, 256, v)
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (len(windows) * WINDOW)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warmup, then a cosine from lr to min_lr."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def add_dropout(model: LanguageModel, p: float) -> None:
    """Dropout on the embedding and on what each mixer adds to the residual stream, by hooks: the model has none.

    The first block's input stands for the embedding, which as a module is called a second time, to make the logits.
    """
    first, *_ = model.backbone.layers
    first.register_forward_pre_hook(lambda module, inputs: (F.dropout(inputs[0], p, module.training), *inputs[1:]))
    for layer in model.backbone.layers:
        layer.mixer.register_forward_hook(lambda module, inputs, output: F.dropout(output, p, module.training))


def make_optimizer(model: LanguageModel, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, but neither vectors nor what the model's no_weight_decay() names."""
    spared = model.no_weight_decay()
    decayed = [p for name, p in model.named_parameters() if p.dim() >= 2 and name not in spared]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or name in spared]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def load_state(path: Path) -> dict:
    """What `save_state` wrote. Raises ValueError for a file that is cut off or something else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, struct.error, pickle.UnpicklingError, RuntimeError):
        raise ValueError(f"{path} is not a whole training state: remove it to start anew") from None


def save_state(state: dict, args: argparse.Namespace) -> None:
    """Write what --resume needs, beside the old file and then in its place, so that one whole file is always there."""
    kept = {name: value for name, value in vars(args).items() if name not in FRESH}
    generators = {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}  # the latter [] on CPUs
    torch.save(state | generators | {"args": kept}, args.out / "training_state.tmp")
    os.replace(args.out / "training_state.tmp", args.out / "training_state.pt")


def train(model: LanguageModel, data: torch.Tensor, val: torch.Tensor, args: argparse.Namespace, state: dict) -> dict:
    """Train on data (uint8), from state unless it is empty; return the averaged weights that were best on val."""
    device, n_parameters = next(model.parameters()).device, sum(p.numel() for p in model.parameters())
    print(f"{args.model}, {n_parameters:,} parameters, {device}, {'bfloat16 autocast' if args.amp else 'float32'}")
    average = copy.deepcopy(model).requires_grad_(False)
    add_dropout(model, args.dropout)
    optimizer = make_optimizer(model, args.weight_decay)
    parts = {"model": model, "average": average, "optimizer": optimizer}
    if state:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"])
        print(*state["log"], sep="\n")
    else:
        state = {"step": 0, "log": [], "seconds": 0.0, "best_loss": math.inf}

    start, losses = time.time() - state["seconds"], []
    options = {"unit": "byte", "unit_scale": args.batch_size * args.seq_len, "disable": None}
    bar = tqdm(range(state["step"], args.steps), initial=state["step"], total=args.steps, **options)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        starts = torch.randint(len(data) - args.seq_len, (args.batch_size, 1))  # (b, 1)
        ids = data[starts + torch.arange(args.seq_len + 1)].to(device).long()  # (b, l + 1)
        model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            logits = model(ids[:, :-1])  # (b, l, v)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(args.ema, step / (step + 10))  # the weights of the first steps are forgotten sooner
        with torch.no_grad():
            for averaged, parameter in zip(average.parameters(), model.parameters(), strict=True):
                averaged.lerp_(parameter, 1 - decay)
        losses.append(loss.detach())
        if step % 10 == 0:
            bar.set_postfix(step=step, loss=f"{loss.item():.3f}", lr=f"{learning_rate(step, args):.1e}", refresh=False)
        if (step + 1) % args.eval_every and step + 1 < args.steps:
            continue

        train_loss, val_loss = torch.stack(losses).mean().item(), evaluate(average, val)
        losses.clear()
        if not math.isfinite(train_loss + val_loss):
            die(f"the loss is not finite at step {step + 1}: try a lower --lr")
        state |= {"step": step + 1, "seconds": time.time() - start}
        state["log"].append(f"step {step + 1}: train {train_loss:.4f}, val {val_loss:.4f}, {state['seconds']:.0f} s")
        tqdm.write(state["log"][-1])
        if val_loss < state["best_loss"]:
            state |= {"best_loss": val_loss, "best": copy.deepcopy(average.state_dict())}
        save_state(state | {name: part.state_dict() for name, part in parts.items()}, args)
    return state["best"]


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # a log in a file can be read at once too
    try:
        args, state = read_options()
        device = pick_device(args)
        data, val = read_bytes(args.data, args.seq_len)
        torch.manual_seed(args.seed)
        model = load(args.evaluate, device) if args.evaluate else build(args).to(device)
        if not args.evaluate:
            args.out.mkdir(parents=True, exist_ok=True)
            if not state and (args.out / "training_state.pt").exists():
                raise ValueError(f"{args.out} holds an unfinished run: add --resume, or remove its training_state.pt")
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last from a torch without CUDA
        die(str(error))
    if args.evaluate:
        print(f"validation loss {evaluate(model, val):.4f} nats per byte")
        return
    model.load_state_dict(train(model, data, val, args, state))
    model.to(torch.bfloat16).save_pretrained(str(args.out))
    save_byte_tokenizer(args.out)
    print(f"stored in {args.out}: validation loss {evaluate(load(args.out, device), val):.4f} nats per byte")
    (args.out / "training_state.pt").unlink()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("train.py: stopped; --resume continues from the last evaluation, if there was one", file=sys.stderr)
        raise SystemExit(130) from None
