"""What train.py reads and writes: text as tokens in a file, stored models, checkpoints, the loss curve.

`store` writes tokens.bin, the tokens of all documents one after the other, in 1, 2 or 4 bytes each, and documents.npy,
the places where documents begin. `read` maps them into memory, so that the text may be larger than it. A tokenizer is
one of Hugging Face's, or None for bytes: token 65 is then "A", and there are 256. Shapes: b batch, l sequence length.
"""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import hf_hub_download
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mamba import MambaConfig, MambaForCausalLM
from mamba2 import Mamba2Config, Mamba2ForCausalLM
from mamba3 import Mamba3Config, Mamba3ForCausalLM

LanguageModel = MambaForCausalLM | Mamba2ForCausalLM | Mamba3ForCausalLM
CONFIGS = {"mamba": MambaConfig, "mamba2": Mamba2Config, "mamba3": Mamba3Config}
MODELS = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM, "mamba3": Mamba3ForCausalLM}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
PART = 2**15  # characters of a document that a tokenizer gets at once, up to twice as many
LOG = "step,tokens,train_loss,val_loss,lr,seconds,tokens_per_second\n"


def load(name: str) -> LanguageModel:
    """The model stored in a directory or on the model hub, in float32."""
    try:
        path = Path(name, "config.json") if Path(name).is_dir() else Path(hf_hub_download(name, "config.json"))
    except OSError as error:
        raise OSError(f"can't load {name!r}, which is no directory: {error}") from None
    stored = json.loads(path.read_text())
    kind = stored.get("model_type") or stored.get("ssm_cfg", {}).get("layer", "").lower()
    return MODELS.get(kind, MambaForCausalLM).from_pretrained(name, dtype=torch.float32)


def total(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if WORLD > 1:
        dist.all_reduce(value)
    return value


class Corpus(NamedTuple):
    tokens: np.ndarray  # of all documents, one after the other
    begins: Tensor  # where documents begin, ascending

    def rows(self, starts: Tensor, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """From each start (b, 1) on, the tokens and the number of each one's document: (b, length) both."""
        index = starts + torch.arange(length)
        ids = torch.from_numpy(self.tokens[index.numpy()].astype(np.int64))
        return ids.to(device), torch.searchsorted(self.begins, index, right=True).to(device)


def vocabulary_size(tokenizer: Any) -> int:
    """How many rows an embedding needs for its tokens; 256 for bytes."""
    return max(tokenizer.get_vocab().values()) + 1 if tokenizer else 256


def smallest_type(tokenizer: Any) -> type:
    """The type of tokens.bin."""
    size = vocabulary_size(tokenizer)
    return np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.int32


def store(paths: Iterable[Path], separator: str, tokenizer: Any, directory: Path) -> None:
    """Write tokens.bin and documents.npy. A document is a file, or what stands between separators in one.

    paths: files, and directories, of which all *.txt files are read.
    separator: with escapes such as "\\n"; "" for none. It is left out.
    tokenizer: its end of text, where it has one, ends each document.

    Documents of one token are left out: nothing predicts it.
    """
    dtype, cut = smallest_type(tokenizer), separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
    end = [] if getattr(tokenizer, "eos_token_id", None) is None else [tokenizer.eos_token_id]
    begins, n, parts = [], 0, documents_in_parts(paths, cut.encode(), tokenizer is not None)
    with open(directory / "tokens.tmp", "wb") as output:
        while batch := list(itertools.islice(parts, 32)):
            pieces, first, last = zip(*batch, strict=True)
            if tokenizer:
                pieces = tokenizer(list(pieces), add_special_tokens=False, verbose=False).input_ids
            for piece, is_first, is_last in zip(pieces, first, last, strict=True):
                piece = piece + end if tokenizer and is_last else piece
                ids = np.array(piece, dtype) if tokenizer else np.frombuffer(piece, dtype)
                if is_first and is_last and len(ids) < 2:
                    continue
                if is_first:
                    begins.append(n)
                n += output.write(ids) // ids.itemsize
    np.save(directory / "documents.npy", np.array(begins, np.int64))
    os.replace(directory / "tokens.tmp", directory / "tokens.bin")


def documents_in_parts(paths: Iterable[Path], cut: bytes, as_text: bool) -> Iterator[tuple[Any, bool, bool]]:
    """(part, is_first, is_last) of the documents that aren't empty: each whole, as bytes, or its text in parts.

    A tokenizer takes 200 times the memory of what it is given. Parts end with a line, where one ends in time; beside
    their borders the tokens may be others than of the whole."""
    files = (file for path in paths for file in (sorted(path.rglob("*.txt")) if path.is_dir() else [path]))
    for file in files:
        whole = file.read_bytes()
        for document in filter(None, whole.split(cut) if cut else [whole]):
            if not as_text:
                yield document, True, True
                continue
            try:
                text, start = document.decode(), 0
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} must be UTF-8 to be read with a tokenizer: {error}") from None
            while start < len(text):
                line = re.compile(r"\n(?=\S)").search(text, start + PART, start + 2 * PART)
                end = line.end() if line else min(start + 2 * PART, len(text))
                yield text[start:end], start == 0, end == len(text)
                start = end


def read(directory: Path, tokenizer: Any, seq_len: int, window: int) -> tuple[Corpus, Corpus]:
    """The first 90% and the last 10% of the tokens. ValueError unless they exceed seq_len and window."""
    dtype = smallest_type(tokenizer)
    n = (directory / "tokens.bin").stat().st_size // np.dtype(dtype).itemsize
    split = int(0.9 * n)
    if split <= seq_len or n - split <= window:
        raise ValueError(f"the text has {n} tokens: 90% of them must exceed {seq_len}, and 10% {window}")
    tokens = np.memmap(directory / "tokens.bin", dtype, "r")
    begins = torch.from_numpy(np.load(directory / "documents.npy"))
    return Corpus(tokens[:split], begins), Corpus(tokens[split:], begins - split)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer, from a directory or the model hub. ValueError where there is none."""
    try:
        tokenizer, why = AutoTokenizer.from_pretrained(name), "it has none"
    except (OSError, ValueError, ImportError) as error:
        tokenizer, why = None, str(error).strip().partition("\n")[0]
    if not tokenizer or len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):  # made of nothing, by model_type
        raise ValueError(f"no tokenizer in {name} ({why}): name one, such as --tokenizer EleutherAI/gpt-neox-20b")
    if vocabulary_size(tokenizer) == 256:
        raise ValueError(f"the tokenizer in {name} must not have 256 tokens: a model of 256 reads bytes")
    return tokenizer


def save_model(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """Store the model in bfloat16, gathered from all processes, and its tokenizer."""
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = states.get_model_state_dict(model, options=whole)
    if RANK == 0:
        model.save_pretrained(str(out), state_dict={name: weight.bfloat16() for name, weight in weights.items()})
        tokenizer.save_pretrained(str(out)) if tokenizer else save_byte_tokenizer(out)


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


def state_of(model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, progress: dict) -> dict:
    """What a checkpoint holds. Its tensors are those in use; the generator of batches is the same in each process."""
    weights, moments = states.get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "progress": progress, "rng": torch.get_rng_state()}
    state |= {} if average is model else {"average": states.get_model_state_dict(average)}
    return state | ({f"cuda_rng_{RANK}": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def save_checkpoint(state: dict, out: Path) -> None:
    """Write a checkpoint beside the old one, then name it, then remove the old: one is whole at any moment."""
    dcp.save(state, checkpoint_id=out / "checkpoint.tmp")
    if RANK == 0:
        os.replace(out / "checkpoint.tmp", out / f"checkpoint-{state['progress']['step']:09}")
        for old in sorted(out.glob("checkpoint-*"))[:-1]:
            shutil.rmtree(old)


def load_checkpoint(model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, out: Path) -> dict:
    """Fill all from the last checkpoint, if there is one, and make log.csv what it was then; how far training is."""
    progress = {"step": 0, "seconds": 0.0, "best": float("inf"), "log": LOG}
    if found := sorted(out.glob("checkpoint-*")):
        state = state_of(model, average, optimizer, progress)  # gives the optimizer moments, and counts that as a step
        partly = dcp.DefaultLoadPlanner(allow_partial_load=True)  # there may be more processes
        dcp.load(state, checkpoint_id=found[-1], planner=partly)
        moments = state["optimizer"]
        states.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=moments)
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_initialized():
            torch.cuda.set_rng_state(state[f"cuda_rng_{RANK}"])
        progress = state["progress"]
    if RANK == 0:
        (out / "log.csv").write_text(progress["log"])
    return progress


def clean(out: Path) -> None:
    """Remove what a finished run needs no more; first the file without which --resume takes it for finished."""
    for path in (out / "tokens.bin", out / "documents.npy", *out.glob("checkpoint-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write(path: Path, text: str) -> None:
    """Replace a file, whole or not at all."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def plot(out: Path) -> None:
    """Draw the losses in log.csv as loss.png."""
    log = np.genfromtxt(out / "log.csv", delimiter=",", names=True, ndmin=1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("train_loss", "training", "-"), ("val_loss", "validation", "o-")):
        seen = np.isfinite(log[name])
        axes.plot(log["tokens"][seen] / 1e6, log[name][seen], style, label=label)
    axes.set(xlabel="million tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=150)
