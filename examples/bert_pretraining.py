"""BERT learns to fill in masked words of plain text, with LAMB (section 4.5 of the paper), with PyTorch.

    horovodrun --gloo -np 2 python examples/bert_pretraining.py

The data is a text file, or a folder of them; a line is a sentence or a paragraph. The vocabulary is
a file as BERT's are, one token a line, or is made from the text. Unlike the paper's BERT, this one
is not also asked whether two sentences belong together.
"""

from __future__ import annotations

import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import (
    Run,
    add_data_argument,
    arrays_of,
    batches,
    decayed_apart,
    find_data,
    make_aggregator,
    make_parser,
    parse,
    pick_device,
    set_learning_rate,
    total,
)
from torch import nn
from torch.nn.functional import cross_entropy, gelu

import adacons_hvd.torch as hvd
from adacons_hvd.logging import log_reports

FULL = {
    "width": 1024,
    "depth": 24,
    "heads": 16,
    "length": 128,
    "dropout": 0.1,
    "vocabulary_size": 30522,
    "batch_size": 64,
    "accumulate": 32,
    "steps": 7037,
    "warmup": 0.2843,
    "learning_rate": 6e-3,
}

# --- text -----------------------------------------------------------------------------------------

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
#: What cross_entropy leaves out.
IGNORED = -100


def lines_of(data: Path) -> Iterator[str]:
    """The lines of a file, or of all .txt files below a folder, without those that are empty."""
    files = sorted(data.rglob("*.txt")) if data.is_dir() else [data]
    if not files:
        raise SystemExit(f"{data} has no .txt files")
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as lines:
            yield from filter(None, map(str.strip, lines))


def words_of(line: str) -> list[str]:
    """Words and marks, in small letters."""
    return re.findall(r"\w+|[^\w\s]", line.lower())


class Tokenizer:
    """WordPiece: a word is its longest beginning that is in the vocabulary, then the longest next piece, and so on.

    Pieces that do not begin a word are written with ## before them.
    """

    def __init__(self, vocabulary: Iterable[str]) -> None:
        self.tokens = list(vocabulary)
        self.numbers = {token: number for number, token in enumerate(self.tokens)}
        missing = [token for token in SPECIAL if token not in self.numbers]
        if missing:
            raise SystemExit(f"the vocabulary has no {', '.join(missing)}")
        self.unknown, self.first, self.last, self.mask = (self.numbers[token] for token in SPECIAL[1:])
        self.special = torch.tensor([self.numbers[token] for token in SPECIAL])
        self._known: dict[str, list[int]] = {}

    @classmethod
    def of_file(cls, path: Path) -> Tokenizer:
        return cls(path.read_text(encoding="utf-8").splitlines())

    @classmethod
    def of_text(cls, lines: Iterable[str], size: int) -> Tokenizer:
        """The most frequent words, after all characters, from which any other word can be put together."""
        counts: Counter[str] = Counter()
        for line in lines:
            counts.update(words_of(line))
        characters = sorted({character for word in counts for character in word})
        pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
        frequent = (word for word, _ in counts.most_common() if len(word) > 1)
        return cls([*pieces, *(word for word, _ in zip(frequent, range(size - len(pieces)), strict=False))])

    def word(self, word: str) -> list[int]:
        """The numbers of a word's pieces; of [UNK] where it cannot be put together."""
        if word not in self._known:
            self._known[word] = self._split(word)
        return self._known[word]

    def _split(self, word: str) -> list[int]:
        pieces = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.numbers:
                    pieces.append(self.numbers[piece])
                    start = end
                    break
            else:
                return [self.unknown]
        return pieces


def sequences_of(lines: Iterable[str], tokenizer: Tokenizer, length: int) -> torch.Tensor:
    """The text cut into pieces of equal length, between [CLS] and [SEP]. What remains at the end is left out."""
    text = array("i")
    for line in lines:
        for word in words_of(line):
            text.extend(tokenizer.word(word))
    inner = length - 2
    count = len(text) // inner
    body = torch.tensor(text[: count * inner], dtype=torch.int32).view(count, inner)
    ends = [torch.full((count, 1), number, dtype=torch.int32) for number in (tokenizer.first, tokenizer.last)]
    return torch.cat([ends[0], body, ends[1]], 1)


def mask(tokens: torch.Tensor, tokenizer: Tokenizer, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network sees, and what it is to say, IGNORED where it is not asked.

    It is asked for 15% of the tokens, of which it sees 80% as [MASK], 10% as random ones and 10% as they are.
    """

    def chance() -> torch.Tensor:
        return torch.rand(tokens.shape, generator=draw)

    asked = (chance() < 0.15) & ~torch.isin(tokens, tokenizer.special)
    how = chance()
    anything = torch.randint(len(tokenizer.tokens), tokens.shape, generator=draw)
    seen = torch.where(asked & (how < 0.8), tokenizer.mask, tokens)
    seen = torch.where(asked & (how >= 0.8) & (how < 0.9), anything, seen)
    return seen, torch.where(asked, tokens, IGNORED)


def make_text(folder: Path) -> None:
    """Sentences in which some words tell others: an animal's colour, sound and home."""
    rng = random.Random(0)
    animals = {
        "fox": ("red", "barks", "den"),
        "crow": ("black", "caws", "nest"),
        "frog": ("green", "croaks", "pond"),
        "bear": ("brown", "growls", "cave"),
        "swan": ("white", "hisses", "lake"),
        "duck": ("yellow", "quacks", "reeds"),
        "wolf": ("grey", "howls", "forest"),
        "goat": ("spotted", "bleats", "stable"),
    }
    folder.mkdir(parents=True)
    for number in range(4):
        with (folder / f"{number}.txt").open("w", encoding="utf-8") as file:
            for _ in range(2000):
                animal, (colour, sound, home) = rng.choice([*animals.items()])
                time = rng.choice(["morning", "noon", "evening", "night"])
                print(f"The {colour} {animal} {sound} in its {home} at {time}.", file=file)


# --- network and optimizer ------------------------------------------------------------------------


class Bert(nn.Module):
    """An encoder of text; its output layer shares the embedding's weights. The defaults are BERT-Large."""

    def __init__(
        self,
        vocabulary: int = 30522,
        length: int = 512,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.empty(length, width).normal_(std=0.02))
        self.before = nn.Sequential(nn.LayerNorm(width, eps=1e-12), nn.Dropout(dropout))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_weight, std=0.02)

    def forward(self, tokens: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Logits for those places where `asked` is true, one row each."""
        x = self.layers(self.before(self.words(tokens) + self.places[: tokens.shape[1]]))
        x = self.norm(gelu(self.transform(x[asked])))
        output: torch.Tensor = x @ self.words.weight.T + self.bias
        return output


class Lamb(torch.optim.Optimizer):
    """Adam's step for each tensor, made as long as the tensor is, times the learning rate (arXiv 1904.00962).

    Groups without weight decay, which is to say biases and normalizations, take Adam's step as it is.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
                state["step"] += 1
                state["mean"].lerp_(p.grad, 1 - beta1)
                state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                mean = state["mean"] / (1 - beta1 ** state["step"])
                square = state["square"] / (1 - beta2 ** state["step"])
                update = mean / (square.sqrt() + group["eps"])
                if group["weight_decay"]:
                    update += group["weight_decay"] * p
                    # Tensors, so that no step waits for an accelerator.
                    size, length = p.norm(), update.norm()
                    update *= torch.where((size > 0) & (length > 0), size / length, 1.0)
                p -= group["lr"] * update
        return loss


def warmup_then_linear(step: int, steps: int, warmup: int) -> float:
    """The part of the learning rate to use: rising for `warmup` steps, then falling to zero, both linearly."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


# --- training -------------------------------------------------------------------------------------


def main() -> None:
    parser = make_parser(__doc__, "bert_pretraining")
    add_data_argument(parser, "text file, or folder with .txt files")
    parser.set_defaults(learning_rate=1e-2)
    parser.add_argument("--vocabulary", type=Path, help="file with a token on each line; made from the text without it")
    parser.add_argument("--vocabulary-size", type=int, default=1000, help="of one made from the text")
    parser.add_argument("--length", type=int, default=64, help="tokens in a sequence")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--warmup", type=float, default=0.1, help="part of the steps")
    parser.add_argument("--accumulate", type=int, default=1, help="batches to a step")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    args = parse(parser, **FULL)

    hvd.init()
    device = pick_device(hvd)
    data = find_data(args, hvd, make_text)
    if args.vocabulary:
        tokenizer = Tokenizer.of_file(args.vocabulary)
    else:
        # Counted once, and not by every rank.
        made = Tokenizer.of_text(lines_of(data), args.vocabulary_size).tokens if hvd.rank() == 0 else None
        tokenizer = Tokenizer(hvd.broadcast_object(made, root_rank=0, name="vocabulary"))
    own = (line for number, line in enumerate(lines_of(data)) if number % hvd.size() == hvd.rank())
    sequences = sequences_of(own, tokenizer, args.length)
    # Shares of the text differ by a few sequences, but all ranks must take the same number of batches.
    sequences = sequences[: min(hvd.allgather_object(len(sequences)))]
    held_out, sequences = sequences.tensor_split([max(len(sequences) // 20, 1)])

    torch.manual_seed(args.seed)
    model = Bert(len(tokenizer.tokens), args.length, args.width, args.depth, args.heads, args.dropout).to(device)
    optimizer: Any = Lamb(decayed_apart(model, args.weight_decay), lr=args.learning_rate)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        model.named_parameters(),
        backward_passes_per_step=args.accumulate,
        aggregator=make_aggregator(args),
    )

    run = Run(args, hvd, args.steps)
    if args.aggregator == "adacons":
        log_reports(optimizer, run.reports)
    own_seed = 1_000_000 * (args.seed + 1) + hvd.rank()
    torch.manual_seed(own_seed)
    draw = torch.Generator().manual_seed(own_seed)

    def loss_of(tokens: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        seen, answers = mask(tokens.long(), tokenizer, draw)
        asked = answers != IGNORED
        return cross_entropy(model(seen.to(device), asked.to(device)), answers[asked].to(device))

    def endless() -> Iterator[torch.Tensor]:
        epoch = 0
        while True:
            for batch in batches(len(sequences), args.batch_size, 0, 1, own_seed, epoch):
                yield sequences[batch]
            epoch += 1

    texts = endless()
    for step in range(args.steps):
        part = warmup_then_linear(step, args.steps, round(args.warmup * args.steps))
        set_learning_rate(optimizer, args.learning_rate * part)
        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        for _ in range(args.accumulate):
            share = loss_of(next(texts), draw) / args.accumulate
            share.backward()
            loss += share.detach()
        optimizer.step()
        run.step(loss)
        if (step + 1) % max(args.steps // 10, 1) == 0:
            model.eval()
            with torch.no_grad():
                # The same words are masked every time.
                losses = [loss_of(part, torch.Generator().manual_seed(0)) for part in held_out.split(args.batch_size)]
            model.train()
            loss_sum, count = total(hvd, sum(map(float, losses)), len(losses))
            run.record(held_out_loss=loss_sum / count)
    run.finish(arrays_of(model))


if __name__ == "__main__":
    main()
