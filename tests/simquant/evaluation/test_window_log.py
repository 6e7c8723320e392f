"""Interrupted evaluations: what was finished is kept, what was cut off is not, and nothing else is taken for it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sites import everywhere, identity, per_token
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from artifacts.artifact import Artifact
from calib import calibrate
from simquant import CachePolicy, Chunking, EvalResult, evaluate
from simquant.evaluate import evaluate_each
from simquant.evaluation.scored_targets import strided_windows
from simquant.evaluation.window_log import WindowLog, WindowLogError

WINDOWS = torch.randint(0, 64, (5, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def log(tmp_path: Path) -> WindowLog:
    return WindowLog(tmp_path / "windows.jsonl")


class Stopped(Exception):
    """What the tests interrupt with."""


def stop_after(n_batches: int) -> Any:
    def progress(batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for index, batch in enumerate(batches):
            if index == n_batches:
                raise Stopped
            yield batch

    return progress


def interrupt(model: nn.Module, log: WindowLog, n_batches: int, **settings: Any) -> None:
    with pytest.raises(Stopped):
        evaluate(model, WINDOWS, everywhere(per_token), log=log, progress=stop_after(n_batches), **settings)


def timeless(result: EvalResult) -> EvalResult:
    return replace(result, seconds=0.0)


def n_passes(model: nn.Module) -> list[int]:
    """Grows by one with each pass over windows."""
    passes: list[int] = []

    def note(module: nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
        passes.extend([1] if kwargs["input_ids"].shape[1] == WINDOWS.shape[1] else [])

    model.register_forward_pre_hook(note, with_kwargs=True)
    return passes


@pytest.mark.shapes
@pytest.mark.parametrize("n_batches", [0, 1, 4])
def test_going_on_gives_what_an_uninterrupted_run_gives(
    n_batches: int, log: WindowLog, tiny_llama: LlamaForCausalLM
) -> None:
    whole = evaluate(tiny_llama, WINDOWS, everywhere(per_token))
    interrupt(tiny_llama, log, n_batches)
    passes = n_passes(tiny_llama)
    again = evaluate(tiny_llama, WINDOWS, everywhere(per_token), log=log)
    assert timeless(again) == timeless(whole)
    assert again.seconds > 0
    assert len(passes) == 2 * (5 - n_batches)
    assert timeless(evaluate(tiny_llama, WINDOWS, everywhere(per_token), log=log)) == timeless(whole)
    assert len(passes) == 2 * (5 - n_batches)


def test_batches_strides_candidates_and_artifacts_go_on_too(log: WindowLog, tiny_llama: LlamaForCausalLM) -> None:
    artifact = calibrate(tiny_llama, torch.randint(0, 64, (2, 32)), "kvquant-3-1pct")
    windows, scored = strided_windows([WINDOWS.flatten()], seqlen=24, stride=10)
    candidates = [artifact, everywhere(per_token)]
    settings = {"scored": scored, "batch_size": 2, "protocol": "decode", "chunking": Chunking(prefill_tokens=4)}
    whole = evaluate_each(tiny_llama, windows, candidates, **settings)
    with pytest.raises(Stopped):
        evaluate_each(tiny_llama, windows, candidates, log=log, progress=stop_after(2), **settings)
    again = evaluate_each(tiny_llama, windows, candidates, log=log, **settings)
    assert [*map(timeless, again)] == [*map(timeless, whole)]


def test_infinite_losses_survive(log: WindowLog, tiny_llama: LlamaForCausalLM) -> None:
    def spoil(module: nn.Module, args: object, output: Any) -> Any:
        output.logits[..., 1:] -= math.inf
        return output

    tiny_llama.register_forward_hook(spoil)
    first, again = (evaluate(tiny_llama, WINDOWS, everywhere(per_token), log=log) for _ in range(2))
    assert math.isinf(first.perplexity)
    assert first.to_json() == again.to_json()


@pytest.mark.parametrize("tail", [b'{"half', b"\x00\x00\x00", b"{}garbage\n", b"\n", b'{"whole": 1}'])
def test_a_half_written_end_is_cut_off(tail: bytes, log: WindowLog, tiny_llama: LlamaForCausalLM) -> None:
    interrupt(tiny_llama, log, 3)
    sound = log.path.read_bytes()
    log.path.write_bytes(sound + tail)
    passes = n_passes(tiny_llama)
    found = evaluate(tiny_llama, WINDOWS, everywhere(per_token), log=log)
    assert len(passes) == 2 * 2
    assert log.path.read_bytes().startswith(sound)
    assert len(log.path.read_bytes().splitlines()) == 1 + 5
    assert timeless(found) == timeless(evaluate(tiny_llama, WINDOWS, everywhere(per_token)))


@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_a_line_that_lost_its_end_is_run_again(cut: int, log: WindowLog, tiny_llama: LlamaForCausalLM) -> None:
    interrupt(tiny_llama, log, 3)
    os.truncate(log.path, log.path.stat().st_size - cut)
    passes = n_passes(tiny_llama)
    evaluate(tiny_llama, WINDOWS, everywhere(per_token), log=log)
    assert len(passes) == 2 * 3


def test_damage_in_the_middle_is_named(log: WindowLog, tiny_llama: LlamaForCausalLM) -> None:
    interrupt(tiny_llama, log, 3)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join([*lines[:2], lines[2][:40] + b"\n", *lines[3:]]))
    with pytest.raises(WindowLogError, match=r"windows.jsonl: line 3: expected a complete line; got a damaged one"):
        evaluate(tiny_llama, WINDOWS, everywhere(per_token), log=log)
    entry = json.loads(lines[2])
    scores = entry["found"][0]["scores"][0]
    scores["nll"] = scores["nll"][:64]
    log.path.write_bytes(b"".join([*lines[:2], json.dumps(entry).encode() + b"\n", *lines[3:]]))
    with pytest.raises(WindowLogError, match="another form"):
        evaluate(tiny_llama, WINDOWS, everywhere(per_token), log=log)


@pytest.mark.parametrize("order", [[0, 1, 1, 2, 2], [0, 1, 2, 1, 2], [0, 2, 1], [0, 2]])
def test_lines_of_two_runs_are_refused(order: list[int], log: WindowLog, tiny_llama: LlamaForCausalLM) -> None:
    """Two runs at a time have written the same batches, or batches are missing."""
    interrupt(tiny_llama, log, 2)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[index] for index in order))
    with pytest.raises(WindowLogError, match=r"line \d: expected batch \d; got \d, as if two runs had written"):
        evaluate(tiny_llama, WINDOWS, everywhere(per_token), log=log)


def test_batches_beyond_the_last_are_refused(log: WindowLog, tiny_llama: LlamaForCausalLM) -> None:
    evaluate(tiny_llama, WINDOWS, everywhere(per_token), log=log)
    entry = json.loads(log.path.read_bytes().splitlines()[-1])
    log.append(len(WINDOWS), entry["found"])
    with pytest.raises(WindowLogError, match="expected at most 5 batches; got 6"):
        evaluate(tiny_llama, WINDOWS, everywhere(per_token), log=log)


@pytest.mark.parametrize(
    "content", [b"hello\n", b"{}\n", b"[1, 2]\n", b'{"format": "kvgauge.windows", "version": 9}\n']
)
def test_another_file_is_left_alone(content: bytes, log: WindowLog, tiny_llama: LlamaForCausalLM) -> None:
    log.path.write_bytes(content)
    with pytest.raises(WindowLogError, match="expected a log of evaluated windows"):
        evaluate(tiny_llama, WINDOWS, everywhere(per_token), log=log)
    assert log.path.read_bytes() == content


def changed_weight(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1e-3
    return model


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("windows", {"windows": WINDOWS.flip(0)}),
        ("quantizers", {"quantizers": everywhere(lambda: per_token(3))}),
        ("quantizers", {"quantizers": everywhere(identity)}),
        ("protocols", {"policy": CachePolicy(sink_tokens=2)}),
        ("protocols", {"protocol": "decode"}),
        ("batch_sizes", {"batch_size": 2}),
        ("weights", {"model": changed_weight}),
        ("dtype", {"model": lambda model: model.bfloat16()}),
        ("stride", {"scored": strided_windows([torch.arange(64)], seqlen=24, stride=10)[1]}),
    ],
)
def test_another_evaluation_is_refused_by_name(
    name: str, changes: dict[str, Any], log: WindowLog, tiny_llama: LlamaForCausalLM
) -> None:
    interrupt(tiny_llama, log, 1)
    before = log.path.read_bytes()
    settings: dict[str, Any] = {"windows": WINDOWS, "quantizers": everywhere(per_token), **changes}
    model = settings.pop("model", lambda model: model)(tiny_llama)
    with pytest.raises(WindowLogError, match=rf"of this evaluation; got one of another:\n(.*\n)* *{name}: the log has"):
        evaluate(model, log=log, **settings)
    assert log.path.read_bytes() == before


def test_an_artifact_is_known_by_its_tensors(log: WindowLog, tiny_llama: LlamaForCausalLM) -> None:
    def fitted(seed: int) -> Artifact:
        text = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(seed))
        return calibrate(tiny_llama, text, "kvquant", bits=3)

    evaluate(tiny_llama, WINDOWS, fitted(0), log=log)
    evaluate(tiny_llama, WINDOWS, fitted(0), log=log)
    with pytest.raises(WindowLogError, match="quantizers"):
        evaluate(tiny_llama, WINDOWS, fitted(1), log=log)


KILLED = """
import sys, time, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.sites import Site
from simquant import evaluate
from simquant.evaluation.window_log import WindowLog

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig.from_pretrained(sys.argv[1])).eval()
sites = [site for layer in range(2) for site in (Site(layer, "key", "pre_rope"), Site(layer, "value"))]
evaluate(
    model, torch.tensor(eval(sys.argv[2])), {site: DynamicAffine(channels=16, bits=4) for site in sites},
    log=WindowLog(Path(sys.argv[3])), progress=lambda batches: (time.sleep(0.5) or batch for batch in batches),
)
"""


def test_a_killed_process_loses_one_window_at_most(log: WindowLog, tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.config.save_pretrained(log.path.parent)
    arguments = [str(log.path.parent), str(WINDOWS.tolist()), str(log.path)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], cwd=Path(__file__).parents[3])
    while process.poll() is None and (not log.path.exists() or log.path.read_bytes().count(b"\n") < 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = log.path.read_bytes().count(b"\n") - 1
    assert 2 <= finished < 5
    passes = n_passes(tiny_llama)
    found = evaluate(tiny_llama, WINDOWS, everywhere(per_token), log=log)
    assert len(passes) == 2 * (5 - finished)
    whole = evaluate(tiny_llama, WINDOWS, everywhere(per_token))
    assert found.loss_nats == pytest.approx(whole.loss_nats, rel=1e-4)  # another process may round otherwise
    assert (found.bits, found.quantized_fraction) == (whole.bits, whole.quantized_fraction)


def test_a_folder_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(WindowLogError, match="got a folder"):
        WindowLog(tmp_path).start({})
