"""Train a Mamba, Mamba-2 or Mamba-3 language model on text, on one processor or many, and store it for others to load.

    python examples/train.py                                                     # a small model of Python's own source
    python examples/train.py --data input.txt --model mamba2 --out runs/mamba2   # your text; --resume goes on with it
    python examples/train.py --data input.txt --evaluate runs/mamba2             # only print the validation loss
    python mamba2.py "ROMEO:" --model runs/mamba2                                # write text with it

docs/training.md has more: published checkpoints, tokenizers, several GPUs and machines. The first 90% of the tokens are
for training, the last 10% for validation. The validation loss is nanoGPT's: consecutive windows of 256 tokens, each
from a zero state, every position counted, in nats per token and float32. A document begins from a zero state too, and
nothing predicts its first token. The weights that are evaluated and stored are a moving average of the trained ones
(--ema), kept from the best evaluation, in bfloat16. Shapes: b batch, l sequence length.
"""

import argparse
import copy
import dataclasses
import io
import json
import math
import os
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where train_files.py is
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where the model files are

import train_files as files
from train_files import CONFIGS, MODELS, RANK, WORLD, Corpus, LanguageModel, total

WINDOW = 256  # tokens in a validation window, as in nanoGPT
OWN = [path for name in ("email", "json", "pydoc_data") for path in Path(os.__file__).parent.glob(f"{name}/*.py")]
FRESH = ("data", "out", "resume", "evaluate", "device", "threads", "fsdp")  # options that a resumed run takes anew
NEW = {"d_model": 256, "n_layer": 6, "headdim": 64, "rope_fraction": 0.5}  # a new model's, where not given
RANGES = dict.fromkeys(("steps", "batch_size", "accumulate", "eval_every", "log_every"), (1, math.inf))
RANGES |= dict.fromkeys(("lr", "min_lr", "warmup", "weight_decay", "grad_clip", "threads"), (0, math.inf))
RANGES |= {"dropout": (0, 1), "ema": (0, 1), "seq_len": (2, math.inf)}


def die(message: str) -> NoReturn:
    """Print one line and exit with status 2."""
    print("train.py: error:", *message.split(), file=sys.stderr)
    raise SystemExit(2)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = die, parser.add_argument  # one line, without the usage text
    add("--data", nargs="+", type=Path, default=sorted(OWN), help="files, directories of *.txt (default: Python's own)")
    add("--separator", default="", help=r"cut files into documents here: '\n\n' or other (default: nowhere)")
    add("--tokenizer", help="a Hugging Face tokenizer, by name or directory (default: --init's, else bytes)")
    add("--out", type=Path, help="directory for the model, log.csv and loss.png (default: one in runs/)")
    add("--evaluate", metavar="DIR", help="only print the validation loss of the checkpoint in DIR")
    add("--init", metavar="DIR", help="start from this checkpoint, a directory or a name on the model hub")
    add("--model", choices=MODELS, help="kind of a new model, as the next six (default: mamba)")
    texts = {"headdim": "mamba2, mamba3: width of a head ", "rope_fraction": "mamba3: how much of a state is rotated "}
    for name, value in NEW.items():
        add(f"--{name.replace('_', '-')}", type=type(value), help=f"{texts.get(name, '')}(default: {value})")
    add("--d-state", type=int, help="state size (default: mamba 16, others 64)")
    add("--chunk-size", type=int, help="mamba2, mamba3 (default: 64 on a CPU, else 256; changes no result)")
    add("--amp", action=argparse.BooleanOptionalAction, help="train in bfloat16 autocast (default: where it is fast)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    numbers = {"steps": (1500, ""), "batch-size": (32, "rows of a step, over all processes and passes")}
    numbers |= {"accumulate": (1, "passes through a step's rows"), "seq-len": (256, "tokens that a row predicts")}
    numbers |= {"lr": (2e-3, "largest"), "min-lr": (1e-4, "at the end of the cosine"), "warmup": (100, "steps")}
    numbers |= {"weight-decay": (0.1, ""), "grad-clip": (1.0, "largest norm of the gradient; 0: no limit")}
    numbers |= {"dropout": (0.2, "on the embedding and on each mixer's output"), "threads": (0, "on a CPU; 0: torch's")}
    numbers |= {"ema": (0.99, "decay of the moving average of the weights; 0: no averaging"), "seed": (0, "")}
    numbers |= {"eval-every": (100, "steps between evaluations"), "log-every": (5, "steps between rows of log.csv")}
    for name, (value, text) in numbers.items():
        add(f"--{name}", type=type(value), default=value, help=f"{text} (default: %(default)s)")
    switches = {"resume": "go on from the last checkpoint in --out, with its options; without one, start"}
    switches |= {"compile": "compile the blocks", "gradient-checkpointing": "compute blocks again in the backward pass"}
    switches |= {"fsdp": "shard weights and optimizer over the processes (default: all have all)"}
    for name, text in switches.items():
        add(f"--{name}", action="store_true", help=text)
    args = parser.parse_args()
    sizes = [name for name in (*NEW, "model", "d_state", "chunk_size") if getattr(args, name) is not None]
    if args.init and sizes:
        raise ValueError(f"--init brings a model as it is: leave out {', '.join(sizes)}")
    args.out = args.out or Path("runs", args.model or Path(args.init or "mamba").name)
    if args.resume and (args.out / "options.json").exists():
        if not (args.out / "tokens.bin").exists():
            raise ValueError(f"the run in {args.out} is finished")
        vars(args).update(json.loads((args.out / "options.json").read_text()))
    for name, (low, high) in RANGES.items():
        if not low <= getattr(args, name) < high:
            raise ValueError(f"{name} must be in [{low}, {high}), got {getattr(args, name)}")
    if args.batch_size % (WORLD * args.accumulate):
        parts = f"{WORLD} (processes) x {args.accumulate} (accumulate)"
        raise ValueError(f"batch_size must be a multiple of {parts}, got {args.batch_size}")
    return args


def pick_device(args: argparse.Namespace) -> torch.device:
    """This process's device. Sets args.amp, unless chosen, to whether it multiplies bfloat16 matrices in hardware."""
    if args.threads:
        torch.set_num_threads(args.threads)
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    name = str(best) if args.device == "auto" else args.device
    device = torch.empty(0, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.amp is None and device.type == "cpu":
        args.amp = getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # bool() is False
    elif args.amp is None:
        args.amp = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device


def build(args: argparse.Namespace, tokenizer: Any) -> LanguageModel:
    """A new model with the options' sizes, of a tokenizer's tokens or of the 256 byte values."""
    kind = args.model or "mamba"
    fields = NEW | {"d_state": 16 if kind == "mamba" else 64, "vocab_size": files.vocabulary_size(tokenizer)}
    fields |= {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields |= {name: value for name, value in vars(args).items() if value is not None}
    known = {field.name for field in dataclasses.fields(CONFIGS[kind])} - {"dropout"}  # that of classifiers
    return MODELS[kind](CONFIGS[kind](**{name: value for name, value in fields.items() if name in known}))


@torch.no_grad()
def evaluate(model: LanguageModel, val: Corpus) -> float:
    """Mean loss in nats per token over the consecutive full windows of val, each from a zero state."""
    model.eval()
    device, n = next(model.parameters()).device, (len(val.tokens) - 1) // WINDOW
    result = torch.zeros(2, device=device)  # the sum of the losses, and how many they are
    for window in torch.arange(RANK, -(-n // WORLD) * WORLD, WORLD).split(32):  # equally many in each process
        ids, seq_idx = val.rows(window[:, None] % n * WINDOW, WINDOW + 1, device)
        labels = ids.masked_fill((window >= n).to(device)[:, None], -100)  # these are there for their number alone
        count = ((seq_idx[:, 1:] == seq_idx[:, :-1]) & (labels[:, 1:] != -100)).sum()
        loss = model(ids, labels=labels, seq_idx=seq_idx, loss_only=True)["loss"]
        result += torch.stack([torch.where(count > 0, loss * count, 0), count])
    return (total(result)[0] / result[1]).item()


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

    def drop(x: Tensor, module: torch.nn.Module) -> Tensor:  # but for a row's last position, which predicts nothing
        return torch.cat([F.dropout(x[:, :-1], p), x[:, -1:]], dim=1) if module.training else x

    model.backbone.layers[0].register_forward_pre_hook(lambda module, inputs: (drop(inputs[0], module), *inputs[1:]))
    for layer in model.backbone.layers:
        layer.mixer.register_forward_hook(lambda module, inputs, output: drop(output, module))


def distribute(model: LanguageModel, args: argparse.Namespace, device: torch.device) -> LanguageModel:
    """The model on the device; with --fsdp a share of each weight, which are brought together while a block runs."""
    if args.fsdp and WORLD > 1:
        mesh = dist.init_device_mesh(device.type, (WORLD,))
        for part in (*model.backbone.layers, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return model.to(device)


def make_optimizer(model: LanguageModel, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, but neither vectors nor what the model's no_weight_decay() names."""
    groups, spared = ([], []), model.no_weight_decay()
    for name, parameter in model.named_parameters():
        groups[parameter.dim() < 2 or name in spared].append(parameter)
    groups = [{"params": p, "weight_decay": decay} for p, decay in zip(groups, (weight_decay, 0.0), strict=True)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def products_rate(device: torch.device, amp: bool) -> float:
    """Floating-point operations a second of a large matrix product: what no step exceeds."""
    n, seconds = 1024 if device.type == "cpu" else 8192, []
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16 if amp else None)
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for it
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def step_on(model: torch.nn.Module, optimizer: torch.optim.Optimizer, text: Corpus, args: argparse.Namespace) -> Tensor:
    """Train on a batch; the part of its mean loss that comes from this process's rows. All draw the same batch."""
    starts = torch.randint(len(text.tokens) - args.seq_len, (args.batch_size, 1))  # (b, 1)
    ids, seq_idx = text.rows(starts, args.seq_len + 1, next(model.parameters()).device)  # (b, l + 1)
    counts = (seq_idx[:, 1:] == seq_idx[:, :-1]).sum(1)  # (b,): how many tokens a row predicts
    passes, loss = torch.arange(RANK, args.batch_size, WORLD).chunk(args.accumulate), 0
    for rows in passes:
        is_early = isinstance(model, DistributedDataParallel) and rows is not passes[-1]
        with model.no_sync() if is_early else nullcontext():
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=args.amp):
                mean = model(ids[rows], labels=ids[rows], seq_idx=seq_idx[rows], loss_only=True)["loss"]
            part = mean * counts[rows].sum() / counts.sum()
            (part * WORLD).backward()  # gradients become the processes' mean
        loss += part.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def sample(model: LanguageModel, val: Corpus, tokenizer: Any) -> str:
    """What the model writes after the first 32 tokens of val."""
    device = next(model.parameters()).device
    prompt, generator = val.rows(torch.zeros(1, 1, dtype=int), 32, device)[0], torch.Generator(device).manual_seed(0)
    ids = model.generate(prompt, 100, temperature=0.8, eos_token_id=(), generator=generator)[0].tolist()
    return tokenizer.decode(ids) if tokenizer else bytes(ids).decode(errors="replace")


def train(
    model: LanguageModel, average: LanguageModel, text: Corpus, val: Corpus, tokenizer: Any, args: argparse.Namespace
) -> None:
    """Train the model; at each evaluation store the average, if it is the best on val, and a checkpoint."""
    device, per_step = next(model.parameters()).device, args.batch_size * args.seq_len
    size, limit = sum(p.numel() for p in model.parameters()), WORLD * products_rate(device, args.amp)
    kind, precision = type(model.config).__name__.removesuffix("Config"), "bfloat16 autocast" if args.amp else "float32"
    print(f"{kind}, {size:,} parameters, {WORLD} x {device}, {precision}, products at {limit / 1e12:.2f} TFLOP/s")
    optimizer = make_optimizer(model, args.weight_decay)
    progress = files.load_checkpoint(model, average, optimizer, args.out)
    if progress["step"]:
        print(f"from step {progress['step']}, with the options in {args.out / 'options.json'}")
    replica = DistributedDataParallel(model) if WORLD > 1 and not args.fsdp else model
    start, losses = time.time() - progress["seconds"], []
    clock = drawn = time.time()
    options = {"unit": "token", "unit_scale": per_step, "disable": True if RANK else None}
    bar = tqdm(range(progress["step"], args.steps), initial=progress["step"], total=args.steps, **options)
    for done in bar:  # steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, args)
        model.train()
        losses.append(step_on(replica, optimizer, text, args))
        decay = min(args.ema, done / (done + 10))  # the weights of the first steps are forgotten sooner
        with torch.no_grad():
            for averaged, parameter in zip(average.parameters(), model.parameters(), strict=True):
                averaged.lerp_(parameter, 1 - decay)
        step, is_evaluated = done + 1, (done + 1) % args.eval_every == 0 or done + 1 == args.steps
        if step % args.log_every and not is_evaluated:
            continue

        recent = losses[-(step % args.log_every or args.log_every) :]
        train_loss, speed = total(torch.stack(recent).mean()).item(), len(recent) * per_step / (time.time() - clock)
        bar.set_postfix_str(f"loss {train_loss:.3f}, {6 * size * speed / limit:.0%} of the products' rate")
        val_loss = evaluate(average, val) if is_evaluated else math.nan
        if not math.isfinite(train_loss) or (is_evaluated and not math.isfinite(val_loss)):
            die(f"the loss is not finite at step {step}: try a lower --lr")
        lr, seconds = learning_rate(done, args), time.time() - start
        numbers = f"{train_loss:.6f},{val_loss:.6f},{lr:.3e},{seconds:.1f},{speed:.0f}"
        progress["log"] += f"{step},{step * per_step},{numbers}\n".replace("nan", "")
        if is_evaluated:
            mean = total(torch.stack(losses).mean()).item()
            tqdm.write(f"{sample(average, val, tokenizer)}\n")
            tqdm.write(f"step {step}: train {mean:.4f}, val {val_loss:.4f}, {seconds:.0f} s")
            if val_loss < progress["best"]:
                files.save_model(average, tokenizer, args.out)
            progress |= {"step": step, "seconds": seconds, "best": min(val_loss, progress["best"])}
            files.save_checkpoint(files.state_of(model, average, optimizer, progress), args.out)
            losses.clear()
        if RANK == 0:
            (args.out / "log.csv").write_text(progress["log"])
            if is_evaluated or time.time() > drawn + 20:
                files.plot(args.out)
                drawn = time.time()
        clock = time.time()
    print(f"stored in {args.out}: validation loss {progress['best']:.4f} nats per token")


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # a log in a file can be read at once too
    sys.stdout = io.StringIO() if RANK else sys.stdout  # the first process speaks for all
    warnings.filterwarnings("ignore", "torch.distributed is")  # checkpoints of one process
    try:
        args = read_options()
        device, source, options = pick_device(args), args.evaluate or args.init, args.out / "options.json"
        if WORLD > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # while the first one reads the text
        torch.manual_seed(args.seed)
        model = files.load(source) if source else None
        name = args.tokenizer or (source if source and model.config.vocab_size != 256 else None)
        tokenizer = files.load_tokenizer(name) if name else None
        model = model or build(args, tokenizer)
        if (size := files.vocabulary_size(tokenizer)) > model.config.padded_vocab_size:
            raise ValueError(f"{name} has {size} tokens, the model {model.config.padded_vocab_size}")
        if args.evaluate:
            with tempfile.TemporaryDirectory() as directory:
                files.store(args.data, args.separator, tokenizer, Path(directory))
                _, val = files.read(Path(directory), tokenizer, 0, WINDOW)
                print(f"validation loss {evaluate(model.to(device), val):.4f} nats per token")
            return
        if RANK == 0 and not (args.resume and options.exists()):
            kinds = ("checkpoint-*", "*model*.safetensors", "*model*.bin")
            if there := [path for kind in kinds for path in args.out.glob(kind)]:
                raise ValueError(f"{there[0]} is there: choose another --out, or --resume if the run was interrupted")
            _ = [path.stat() for path in args.data]  # an OSError, if one isn't there
            args.out.mkdir(parents=True, exist_ok=True)
            options.unlink(missing_ok=True)
            files.store(args.data, args.separator, tokenizer, args.out)
        if WORLD > 1:
            dist.barrier(patient)
        text, val = files.read(args.out, tokenizer, args.seq_len, WINDOW)
        if RANK == 0:
            files.write(options, json.dumps({k: v for k, v in vars(args).items() if k not in FRESH}, indent=2))
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last from a torch without CUDA
        die(str(error))
    average = copy.deepcopy(model).requires_grad_(False) if args.ema else model
    if device.type == "cuda":
        torch.cuda.manual_seed(args.seed + RANK)  # of dropout: other rows, other noise
    model.config.gradient_checkpointing = args.gradient_checkpointing
    add_dropout(model, args.dropout)
    for layer in model.backbone.layers if args.compile else ():
        layer.compile()
    model = distribute(model, args, device)
    average = distribute(average, args, device) if args.ema else model
    train(model, average, text, val, tokenizer, args)
    if RANK == 0:
        files.clean(args.out)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("train.py: stopped; --resume continues from the last evaluation, if there was one", file=sys.stderr)
        raise SystemExit(130) from None
