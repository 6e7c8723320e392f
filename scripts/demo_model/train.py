"""Trains the demo model from scratch on the demo text: `python -m scripts.demo_model.train --output runs/training`."""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calib.demo.draws import Draws
from calib.demo.pages import Split, drill, page
from calib.demo.tasks import TASKS
from calib.demo.trials import is_solved, trials
from kvgauge.terminal.console import run

VOCAB, TOKENIZER_PAGES = 2432, 8000

PEAK_RATE, WARM_UP_STEPS, DECAY_FRACTION = 3e-3, 100, 0.6

LOG_STEPS, REPORT_STEPS, TRIALS = 100, 400, 24


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer, trained on training pages; numbers are split into two digits at a time."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((page("training", i) for i in range(TOKENIZER_PAGES)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", model_max_length=1024)


def new_model(seed: int) -> LlamaForCausalLM:
    """Model with random weights, and a large bias on the slowest RoPE pairs of every key head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        _enlarge_slow_pairs(layer.self_attn.k_proj.bias, layer.self_attn.head_dim)
    return model


@torch.no_grad()
def _enlarge_slow_pairs(bias: Tensor, head_dim: int) -> None:
    """Adds a large bias to the slowest RoPE pairs, so that a few key channels are far from zero as in large models."""
    # A constant c on a pair that hardly rotates over the context adds q . c to all scores of a query alike, and softmax
    # ignores a common shift: attention is the same, the keys are not.
    half = head_dim // 2
    for head in bias.view(-1, head_dim):
        for pair, size in ((half - 1, 8.0), (half - 2, 4.0)):
            angle = float(torch.rand(())) * 2 * math.pi
            head[pair], head[pair + half] = size * math.cos(angle), size * math.sin(angle)


@dataclass(frozen=True)
class Phase:
    """Training on windows of one length.

    Parameters
    ----------
    window_tokens, rows, steps : int
        Length and number of the windows of a training step, and number of steps.
    longest_words : int
        Maximum number of words around a task, so that a page fits the window.
    drill_fraction : float
        Share of drills among the pages.
    """

    window_tokens: int
    rows: int
    steps: int
    longest_words: int
    drill_fraction: float


# Without drills the model learns far later to attend to earlier tokens: after 3 million tokens of pages it solved no
# retrieval task yet, after one million tokens of drills it copied. Without drills later on it forgets that again.
PHASES = (
    Phase(128, 32, 600, 20, 0.7),
    Phase(256, 16, 2000, 120, 0.5),
    Phase(512, 8, 900, 400, 0.4),
    Phase(1024, 4, 2500, 880, 0.3),
)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("train_demo_model", _main, argv)


class Windows:
    """Windows of consecutive pages; each begins at the start of a page."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, split: Split, next_page: int = 0) -> None:
        self._tokenizer, self._split, self.next_page = tokenizer, split, next_page

    def batch(self, phase: Phase, rows: int) -> Tensor:
        """Next windows."""
        return torch.tensor([self._row(phase) for _ in range(rows)])

    def _row(self, phase: Phase) -> list[int]:
        ids: list[int] = []
        while len(ids) < phase.window_tokens:
            ids += self._tokenizer(("\n\n" if ids else "") + self._page(phase)).input_ids
        return ids[: phase.window_tokens]

    def _page(self, phase: Phase) -> str:
        index, self.next_page = self.next_page, self.next_page + 1
        if self._split == "training" and Draws(f"kind {index}").chance(phase.drill_fraction):
            return drill(index)
        return page(self._split, index, phase.longest_words)


def learning_rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, constant, linear decay to zero."""
    left = (steps - step) / (DECAY_FRACTION * steps)
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS, left)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Optimizers: Muon for the matrices inside the layers, AdamW for embeddings, norms and biases."""
    # Muon orthogonalises updates of matrices; "match_rms_adamw" scales them to AdamW's size, for one learning rate.
    named = [(p.ndim == 2 and "layers" in name, p) for name, p in model.named_parameters()]
    matrices, others = ([p for inside, p in named if inside is wanted] for wanted in (True, False))
    return [
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]


@torch.no_grad()
def figures(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase) -> dict[str, float]:
    """Loss on held-out windows, and share of solved trials of each task."""
    x = Windows(tokenizer, "held-out").batch(phase, 16).to(model.device)
    found = {"held_out": float(model(input_ids=x, labels=x).loss)}
    for task in TASKS:
        solved = [is_solved(model, tokenizer, trial) for trial in trials(task, phase.longest_words, TRIALS)]
        found[task] = sum(solved) / TRIALS
    return found


class Training:
    """Training run with all its state.

    Parameters
    ----------
    output : Path
        Folder of the log, the state, the model and its tokenizer.
    device : str
        Device of the training.
    seed : int
        Seed of the initial weights; the text has its own.
    """

    def __init__(self, output: Path, device: str, seed: int) -> None:
        self.output, self.device, self.seed = output, device, seed
        self.tokenizer = train_tokenizer()
        self.model = new_model(seed)
        nn.Module.to(self.model, device)
        self.optimizers = optimizers(self.model)
        self.windows = Windows(self.tokenizer, "training")
        self.step, self.n_tokens, self.loss, self.seconds = 0, 0, math.nan, 0.0
        output.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Runs the remaining steps, phase by phase."""
        compiled: Any = torch.compile(self.model)
        planned = [phase for phase in PHASES for _ in range(phase.steps)]
        for phase in planned[self.step :]:
            started = time.monotonic()
            self._update(compiled, phase, learning_rate(self.step, len(planned)))
            self.step += 1
            last = self.step == len(planned)
            if self.step % REPORT_STEPS == 0 or last:
                self._log(phase, figures(self.model, self.tokenizer, phase))
                self._save()
            elif self.step % LOG_STEPS == 0:
                self._log(phase, {})
            self.seconds += time.monotonic() - started
        self.tokenizer.save_pretrained(self.output)
        self.model.half().save_pretrained(self.output)

    def resume(self) -> None:
        """Restores the state that was saved last."""
        state = torch.load(self.output / "state.pt", map_location=self.device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.windows.next_page = state["next_page"]
        self.step, self.n_tokens, self.loss, self.seconds = state["progress"]

    def _update(self, compiled: Any, phase: Phase, rate: float) -> None:
        x = self.windows.batch(phase, phase.rows).to(self.device)
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16):
            loss = compiled(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        self.n_tokens += x.numel()
        # Exponential mean over about 20 steps, for the log alone.
        self.loss = loss.item() if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss.item()

    def _log(self, phase: Phase, found: dict[str, float]) -> None:
        row = {"step": self.step, "tokens": self.n_tokens, "window": phase.window_tokens, "loss": self.loss}
        row |= {"seconds": self.seconds, **found}
        line = json.dumps({name: round(value, 4) for name, value in row.items()})
        with (self.output / "log.jsonl").open("a") as log:
            print(line, file=log)
        print(line, flush=True)

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "next_page": self.windows.next_page,
            "progress": (self.step, self.n_tokens, self.loss, self.seconds),
        }
        torch.save(state, self.output / "state.pt")


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("train_demo_model", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/training"), help="folder (default: runs/training)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights (default: 0)")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's state.pt")
    args = parser.parse_args(argv)
    training = Training(args.output, args.device, args.seed)
    if args.resume:
        training.resume()
    training.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
