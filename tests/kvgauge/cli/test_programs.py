"""The programs `calibrate` and `evaluate`, called as a user types them, with what they write, print and refuse."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.foreign_files import kvquant_content, kvquant_levels, write_msmodelslim, write_pickle
from helpers.programs import prose, save_model, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

import calib.capture
from artifacts import artifact as artifacts_file
from artifacts import load, save
from artifacts.sites import Site
from calib.text.sketches import window_digests
from kvgauge.cli import artifact, calibrate, evaluate
from kvgauge.loading.rope_stretch import stretch
from kvgauge.terminal.console import UsageError
from kvgauge.terminal.interrupt import remaining_windows
from kvgauge.terminal.outputs import output_folder

REQUIRED = {
    "fp",
    "quantized",
    "loss_nats",
    "loss_nats_stderr",
    "kl_mean",
    "kl_p999",
    "top1_agreement",
    "bits",
    "quantized_fraction",
    "protocol",
    "seconds",
}


@dataclass(frozen=True)
class Ran:
    """What a program left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


Program = Callable[..., Ran]


@pytest.fixture
def type_in(capsys: pytest.CaptureFixture[str]) -> Program:
    """Runs a command line such as `calibrate model --abits 4`; more words may follow, for paths with blanks."""
    programs = {"calibrate": calibrate.main, "evaluate": evaluate.main, "artifact": artifact.main}

    def call(line: str, *more: object) -> Ran:
        name, *words = line.split()
        capsys.readouterr()
        try:
            status = programs[name]([*words, *map(str, more)])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return Ran(status, *capsys.readouterr())

    return call


@pytest.fixture
def works(type_in: Program) -> Program:
    """The same, for command lines that must succeed."""

    def call(line: str, *more: object) -> Ran:
        ran = type_in(line, *more)
        assert ran.status == 0, ran.err
        return ran

    return call


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands below name: models, texts, a 4-bit artifact and statistics; read-only."""
    folder = tmp_path_factory.mktemp("workshop")
    for name, changes in {"model": {}, "other": {"head_dim": 16}, "untokenized": {}}.items():
        save_model(folder / name, **changes)
        if name != "untokenized":
            save_tokenizer(folder / name)
    for seed, name in enumerate(("a.txt", "b.txt", "c.txt")):
        (folder / name).write_text(prose(seed))
    (folder / "records.jsonl").write_text("\n".join(json.dumps({"body": prose(seed, 300)}) for seed in (7, 8)))
    np.save(folder / "ids.npy", np.frombuffer(prose(9).encode(), dtype=np.uint8).astype(np.int64))
    save_bad_input(folder)
    line = (
        "model --dataset a.txt --nsamples 4 --abits 4 --quantizer-path q4.safetensors --save-statistics s.safetensors"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert calibrate.main(line.split()) == 0
        save_partial_artifact(folder)
    return folder


def save_bad_input(folder: Path) -> None:
    (folder / "short.txt").write_text("too short")
    (folder / "latin1.txt").write_bytes("café ".encode("latin1") * 100)
    (folder / "blank.txt").write_text("")
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "junk.safetensors").write_bytes(b"not an artifact at all")
    (folder / "folder").mkdir()
    np.save(folder / "large_ids.npy", np.full(500, 256))


def save_partial_artifact(folder: Path) -> None:
    whole = load(folder / "q4.safetensors")
    some = {site: quantizer for site, quantizer in whole.items() if site.layer == 0}
    manifest = replace(whole.manifest, specs={site: quantizer.spec for site, quantizer in some.items()})
    save(artifacts_file.Artifact(some, manifest), folder / "partial.safetensors")


@pytest.fixture(autouse=True)
def here(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory but for links into the workshop."""
    for item in workshop.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same_bytes(*names: str) -> bool:
    first, *others = (Path(name).read_bytes() for name in names)
    return all(other == first for other in others)


# --- the main job


@pytest.mark.parametrize("suffix", ["safetensors", "pkl"])
def test_calibrate_then_evaluate(suffix: str, works: Program) -> None:
    ran = works(f"calibrate model --dataset a.txt --nsamples 3 --abits 3 --quantizer-path new/q.{suffix}")
    assert f"new/q.{suffix}: 4 sites" in ran.out
    assert f"Next: evaluate model --quantizer-path new/q.{suffix}" in ran.out
    assert "statistics (basic):" in ran.err
    found = works(f"evaluate model --quantizer-path new/q.{suffix} --dataset b.txt --limit 4 --json").json
    assert set(found) >= REQUIRED
    assert found["fp"]["perplexity"] > 1
    assert found["quantized_fraction"] == 1
    assert 3 <= found["bits"]["key"] <= found["bits"]["value"] < 7
    assert "4 windows of 64 tokens" in found["protocol"]


def test_both_file_formats_give_the_same_figures(works: Program) -> None:
    works("calibrate model --dataset a.txt --nsamples 4 --abits 4 --quantizer-path q.pkl")
    assert load("q.pkl").digest == load("q4.safetensors").digest
    first, second = (
        works(f"evaluate model --quantizer-path {name} --dataset b.txt --limit 2 --json").json
        for name in ("q.pkl", "q4.safetensors")
    )
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_the_table_shows_what_json_holds(works: Program) -> None:
    line = "evaluate model --quantizer-path q4.safetensors --dataset b.txt --limit 3"
    found, table = works(line + " --json").json, works(line).out
    assert table.startswith("model on b.txt, q4.safetensors\n")
    assert f"{found['fp']['perplexity']:.4f}" in table
    assert f"{found['loss_nats']:+.5f} nats per token" in table
    assert found["protocol"] in table


def test_the_default_path_lies_under_runs_and_the_printed_line_works(works: Program) -> None:
    ran = works("calibrate model --recipe kvquant --kbits 3 --vbits 2 --dataset a.txt --nsamples 2")
    path = "runs/model-kvquant/quantizers-k3v2.safetensors"
    assert {str(site): q.spec.bits for site, q in load(path).items() if site.layer == 0} == {
        "layers.0.key.pre_rope": 3,
        "layers.0.value": 2,
    }
    _, line = ran.out.splitlines()[-1].split("Next: ")
    assert line == f"evaluate model --quantizer-path {path}"
    assert "perplexity, quantized" in works(line + " --dataset b.txt --limit 2").out


def test_the_same_command_gives_the_same_bytes(works: Program) -> None:
    for name in ("one", "two"):
        line = "calibrate model --dataset a.txt --nsamples 4 --abits 4"
        works(f"{line} --quantizer-path {name}.safetensors --save-statistics {name}-s.safetensors")
    assert same_bytes("one.safetensors", "two.safetensors", "q4.safetensors")
    assert same_bytes("one-s.safetensors", "two-s.safetensors", "s.safetensors")
    works("calibrate model --dataset a.txt --nsamples 4 --abits 4 --jobs 2 --quantizer-path jobs.safetensors")
    assert same_bytes("one.safetensors", "jobs.safetensors")
    works("calibrate model --dataset a.txt --nsamples 4 --abits 4 --seed 1 --quantizer-path seed.safetensors")
    assert not same_bytes("one.safetensors", "seed.safetensors")


def test_underscores_and_equal_signs_are_accepted(works: Program) -> None:
    works("calibrate model --dataset=a.txt --nsamples=4 --key_bits 4 --value_bits=4 --quantizer_path=my_q.safetensors")
    assert same_bytes("my_q.safetensors", "q4.safetensors")


def test_existing_files_are_replaced_by_force(works: Program) -> None:
    line = "calibrate model --dataset a.txt --nsamples 2 --quantizer-path q.safetensors --save-statistics t.safetensors"
    works(line)
    works(line + " --abits 2 --force")
    assert load("q.safetensors")[Site(0, "value")].spec.bits == 2


def test_sixteen_bits_go_the_same_way_and_quantize_nothing(works: Program) -> None:
    works("calibrate model --dataset a.txt --nsamples 2 --abits 16 --quantizer-path q16.safetensors")
    for line in ("--quantizer-path q16.safetensors", "--quantizer-path q16.safetensors --abits 16", "--abits 16"):
        found = works(f"evaluate model {line} --dataset b.txt --limit 2 --json").json
        assert (found["quantized_fraction"], found["loss_nats"], found["top1_agreement"]) == (0, 0, 1)
        table = works(f"evaluate model {line} --dataset b.txt --limit 2").out
        assert "quantized_fraction: 0\n" in table


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--protocol decode --prefill-tokens 9999", "--prefill-tokens 9999: windows have"),
        ("--protocol cache --chunk-tokens 9999", "--chunk-tokens 9999: windows have"),
    ],
)
def test_steps_longer_than_a_window_are_refused(type_in: Program, flags: str, told: str) -> None:
    """Regression: a report once named a first step of 999 tokens for windows of 64."""
    refused = type_in(f"{EVALUATE} --abits 4 --pertoken k_proj v_proj {flags}")
    assert refused.status == 2
    assert told in refused.err


def test_a_folder_for_results_that_cannot_be_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """Regression: ablate once told of a file in the folder's place as a bare system error."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"--output .*file: cannot make this folder \(.*\); choose another"):
        output_folder(tmp_path / "file")
    assert output_folder(tmp_path / "new" / "folder").is_dir()


def test_force_never_replaces_what_kvgauge_did_not_write(type_in: Program, here: Path) -> None:
    """Regression: --force once overwrote a model's own weights with an artifact."""
    (here / "weights.safetensors").write_bytes((here / "model" / "model.safetensors").read_bytes())
    before = (here / "weights.safetensors").read_bytes()
    refused = type_in(f"{CALIBRATE} --quantizer-path weights.safetensors --force")
    assert refused.status == 2
    assert "was not written by kvgauge" in refused.err
    assert (here / "weights.safetensors").read_bytes() == before


def test_a_model_without_its_weights_is_refused(type_in: Program, here: Path) -> None:
    """Regression: an artifact in place of the weights gave the perplexity of a random model, in silence."""
    (here / "hollow").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (here / "hollow" / name).write_bytes((here / "model" / name).read_bytes())
    (here / "hollow" / "model.safetensors").write_bytes((here / "q4.safetensors").read_bytes())
    refused = type_in("evaluate hollow --abits 4 --dataset b.txt")
    assert refused.status == 1
    assert "hollow" in refused.err


def test_truncated_weights_are_named(type_in: Program, here: Path) -> None:
    """Regression: the error told of an incomplete header, and not of which model."""
    shutil.copytree(here / "model", here / "cut")
    os.truncate(here / "cut" / "model.safetensors", 1000)
    refused = type_in("evaluate cut --abits 4 --dataset b.txt")
    assert refused.status == 1
    assert "cut: no model could be loaded" in refused.err


def test_bits_against_a_sixteen_bit_file_are_a_contradiction(works: Program, type_in: Program) -> None:
    works(f"{CALIBRATE} --abits 16 --quantizer-path exact.pkl")
    refused = type_in(f"{EVALUATE} --quantizer-path exact.pkl --abits 3")
    assert refused.status == 2
    assert "contradict" in refused.err


def test_first_tokens_that_calibration_chooses_are_not_chosen_again(works: Program, type_in: Program) -> None:
    assert "\n  sinks: 0 of at most 8: " in works(f"{CALIBRATE} --nsamples 4 --quantizer-path chosen.pkl").out
    given = works(f"{CALIBRATE} --nsamples 4 --first-few-fp16 1 --quantizer-path given.pkl")
    assert "sinks:" not in given.out
    assert works(f"{EVALUATE} --quantizer-path chosen.pkl --first-few-fp16 auto").out
    refused = type_in(f"{EVALUATE} --quantizer-path given.pkl --first-few-fp16 auto")
    assert refused.status == 2
    assert "given.pkl: --first-few-fp16 auto: calibration chooses, and this file was given 1" in refused.err


def test_several_texts_and_their_kinds(works: Program) -> None:
    line = "evaluate model --quantizer-path q4.safetensors --limit 2 --json"
    both = works(line + " --datasets b.txt,c.txt,").json["datasets"]
    assert list(both) == ["b.txt", "c.txt"]
    for name, found in both.items():
        assert {**found, "seconds": 0} == {**works(f"{line} --dataset {name}").json, "seconds": 0}
    assert set(works(line + " --dataset records.jsonl --field body").json) >= REQUIRED
    assert set(works(line + " --dataset ids.npy").json) >= REQUIRED


def test_tokenised_text_needs_no_tokenizer(works: Program) -> None:
    ran = works("calibrate untokenized --dataset ids.npy --nsamples 2 --quantizer-path q.safetensors")
    assert "no tokenizer" in ran.err
    works("evaluate untokenized --dataset ids.npy --limit 2 --quantizer-path q.safetensors")


def test_text_that_was_calibrated_on_is_pointed_out(works: Program) -> None:
    line = "evaluate model --quantizer-path q4.safetensors --json --dataset"
    assert "of the evaluation text was calibrated on" in works(f"{line} a.txt").err
    assert "calibrated on" not in works(f"{line} b.txt --limit 8").err


def test_a_stretched_context(works: Program) -> None:
    line = "model --maxseqlen 100 --seqlen 100 --dataset {} --quantizer-path q.safetensors"
    works("calibrate --nsamples 2 " + line.format("a.txt"))
    found = works("evaluate --limit 2 --json " + line.format("b.txt")).json
    assert "2 windows of 100 tokens" in found["protocol"]


# --- dynamic scales, with the options of the ancestors

SEED_4 = (
    "evaluate model --abits 4 --include-sparse --sparsity-threshold 0.99 --first-few-fp16 1 --perchannel k_proj "
    "--pertoken v_proj --nsamples 2 --seed 1 --clamp --no_flash_attn --verbose --limit 2 --maxseqlen 48 --dataset b.txt"
)


def test_dynamic_mode_takes_every_option_of_seed_4(works: Program) -> None:
    ran = works(SEED_4 + " --json")
    assert "warning: a dynamic scale per channel is not causal" in ran.err
    assert "NOT CAUSAL" in ran.json["protocol"]
    assert "first token exact" in ran.json["protocol"]
    assert ran.json["quantized_fraction"] == 63 / 64
    assert ran.json["bits"]["value"] > 4


def test_dynamic_mode_per_token_is_causal(works: Program) -> None:
    ran = works("evaluate model --abits 4 --pertoken k_proj v_proj --dataset b.txt --limit 2 --json")
    assert "causal" not in ran.err
    assert "NOT CAUSAL" not in ran.json["protocol"]
    assert ran.json["bits"]["key"] == ran.json["bits"]["value"] == 4 + 32 / 16


def test_evaluate_calibrate_is_calibrate(works: Program) -> None:
    works("evaluate model --calibrate --dataset a.txt --nsamples 4 --abits 4 --quantizer-path q.safetensors")
    assert same_bytes("q.safetensors", "q4.safetensors")


# --- statistics: refit, merge, resume


@pytest.mark.parametrize("flags", ["--abits 2", "--recipe kvquant --abits 3 --include-sparse", "--first-few-fp16 2"])
def test_a_refit_from_statistics_is_a_calibration(flags: str, works: Program) -> None:
    works(f"calibrate --from-statistics s.safetensors {flags} --quantizer-path refit.safetensors")
    works(f"calibrate model --dataset a.txt --nsamples 4 {flags} --quantizer-path direct.safetensors")
    assert same_bytes("refit.safetensors", "direct.safetensors")


def test_merged_shards_are_the_whole(works: Program) -> None:
    for number in (1, 2):
        line = (
            f"calibrate model --dataset a.txt --nsamples 4 --shard {number}/2 --save-statistics s{number}.safetensors"
        )
        works(line + f" --quantizer-path q{number}.safetensors")
    works("calibrate --merge s1.safetensors s2.safetensors --abits 4 --quantizer-path merged.safetensors")
    assert same_bytes("merged.safetensors", "q4.safetensors")


def test_a_shard_with_statistics_alone_makes_no_artifact(works: Program, here: Path) -> None:
    # Broke when the shards shared a folder: each one fitted an artifact of its own, and to the same default path.
    for number in (1, 2):
        ran = works(
            f"calibrate model --dataset a.txt --nsamples 4 --shard {number}/2 --save-statistics s{number}.safetensors"
        )
        assert "calibrate --merge" in ran.out
    assert not (here / "runs").exists()
    works("calibrate --merge s1.safetensors s2.safetensors --abits 4 --quantizer-path merged.safetensors")
    assert same_bytes("merged.safetensors", "q4.safetensors")


def test_no_more_jobs_than_cores(works: Program) -> None:
    works("calibrate --from-statistics s.safetensors --jobs 100000 --abits 4 --quantizer-path many.safetensors")
    assert same_bytes("many.safetensors", "q4.safetensors")


class Interrupting:
    """`capture`, until Ctrl-C in the middle of window number `n_windows`, counted from 0."""

    def __init__(self, n_windows: int) -> None:
        self.left, self.capture = n_windows, calib.capture.capture

    def __call__(self, *args: object) -> object:
        vectors = self.capture(*args)
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return vectors


@pytest.mark.parametrize("n_windows", [0, 2])
def test_an_interrupted_run_goes_on(
    n_windows: int, type_in: Program, works: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "calibrate model --dataset a.txt --nsamples 4 --abits 4 --quantizer-path q.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(calib.capture, "capture", Interrupting(n_windows))
        ran = type_in(line + " --save-statistics half.safetensors")
    assert ran.status == 130
    assert f"{n_windows} of 4 windows are in half.safetensors" in ran.err
    assert "--resume half.safetensors --force" in ran.err
    assert not list(here.glob("q.safetensors*")) + list(here.glob(".*"))
    ran = works(line + " --save-statistics half.safetensors --resume half.safetensors --force")
    assert f"{n_windows} windows are in half.safetensors, {4 - n_windows} remain" in ran.err
    assert same_bytes("q.safetensors", "q4.safetensors")
    assert same_bytes("half.safetensors", "s.safetensors")


def test_ctrl_c_waits_for_the_window_at_hand(type_in: Program, works: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "calibrate model --dataset a.txt --nsamples 4 --abits 4 --quantizer-path q.safetensors"
    capture, before = calib.capture.capture, signal.getsignal(signal.SIGINT)

    def pressed_during(*args: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return capture(*args)

    with monkeypatch.context() as patch:
        patch.setattr(calib.capture, "capture", pressed_during)
        ran = type_in(line + " --save-statistics half.safetensors")
    assert ran.status == 130
    assert "finishing the current window" in ran.err
    assert "1 of 4 windows are in half.safetensors" in ran.err
    assert signal.getsignal(signal.SIGINT) == before
    works(line + " --save-statistics half.safetensors --resume half.safetensors --force")
    assert same_bytes("q.safetensors", "q4.safetensors")


def test_a_window_that_was_drawn_twice_is_gone_on_with_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """Both were dropped where one was in the statistics, as a short text gives them."""
    one, other = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    windows = torch.stack([one, other, one, one])
    done: Any = SimpleNamespace(windows=window_digests(windows[:1]) * 2)
    assert torch.equal(remaining_windows(windows, done, Path("s")), torch.stack([other, one]))
    assert "2 windows are in s, 2 remain" in capsys.readouterr().err


def test_an_interrupt_without_statistics_leaves_nothing(
    type_in: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(here.rglob("*"))
    monkeypatch.setattr(calib.capture, "capture", Interrupting(1))
    ran = type_in("calibrate model --dataset a.txt --nsamples 4 --quantizer-path q.safetensors")
    assert ran.status == 130
    assert "--save-statistics FILE" in ran.err
    assert sorted(here.rglob("*")) == before


# --- what only prints


def test_recipes_are_printed_with_the_flags_in_them(works: Program, here: Path) -> None:
    text = works("calibrate --recipe kvquant --abits 3 --vbits 2 --include-sparse --print-recipe").out
    Path("mine.yaml").write_text(text)
    assert works("calibrate --recipe mine.yaml --print-recipe").out == text
    assert "fraction: 0.01" in text
    listed = works("calibrate --list-recipes").out
    assert {row.split()[0] for row in listed.splitlines()} >= {"default", "kvquant", "kvquant-rank"}


def test_sites_are_listed(works: Program) -> None:
    rows = works("calibrate model --list-sites").out.splitlines()
    assert [row.split()[:2] for row in rows] == [["0", "applied"], ["1", "applied"]]
    assert all("2 x 8" in row and "k_proj v_proj q_proj" in row for row in rows)


# --- padded rows


def test_a_padded_file_gives_the_figures_of_its_text(
    works: Program, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: the padding of .npy rows was scored, perplexity 953 instead of 4.5."""
    save_model(here / "padding")
    save_tokenizer(here / "padding", pad_token="~")
    pad = PreTrainedTokenizerFast.from_pretrained(here / "padding").pad_token_id
    rows = np.load("ids.npy")[:400].reshape(5, 80)
    np.save("rows.npy", rows)
    np.save("padded.npy", np.pad(rows, ((0, 0), (0, 48)), constant_values=pad))
    line = "evaluate padding --abits 4 --json --dataset"
    whole, padded = works(f"{line} rows.npy"), works(f"{line} padded.npy")
    assert {**whole.json, "seconds": 0} == {**padded.json, "seconds": 0}
    assert "padded.npy: padding left out, 240 tokens of 5 of 5 rows" in caplog.text


# --- start tokens


def test_windows_that_begin_as_prompts_do(works: Program, type_in: Program, here: Path) -> None:
    """Regression: nothing put the start token before calibration windows, without which a tenth more is lost."""
    save_model(here / "chat")
    save_tokenizer(here / "chat", bos_token="!")
    start = PreTrainedTokenizerFast.from_pretrained(here / "chat").bos_token_id
    line = "calibrate chat --dataset a.txt --nsamples 4 --abits 3"
    works(f"{line} --bos --quantizer-path begun.safetensors --save-statistics s-begun.safetensors")
    works(f"{line} --quantizer-path plain.safetensors --save-statistics s-plain.safetensors")
    begun, plain = (load(f"{name}.safetensors").manifest for name in ("begun", "plain"))
    assert (begun.corpus.start_token, plain.corpus.start_token) == (start, None)
    assert (begun.corpus.seqlen, begun.corpus.n_tokens) == (plain.corpus.seqlen, plain.corpus.n_tokens)
    assert "start_token" not in plain.to_json()["corpus"]
    assert f"each begun with the start token, {start}" in works("artifact inspect begun.safetensors").out
    assert "start token" not in works("artifact inspect plain.safetensors").out

    for number in (1, 2):
        works(f"{line} --bos --shard {number}/2 --save-statistics part{number}.safetensors")
    works("calibrate --merge part1.safetensors part2.safetensors --abits 3 --quantizer-path merged.safetensors")
    works("calibrate --from-statistics s-begun.safetensors --abits 3 --quantizer-path again.safetensors")
    assert same_bytes("begun.safetensors", "again.safetensors")
    assert load("merged.safetensors").manifest.corpus == begun.corpus
    for command, told in (
        (
            "calibrate --merge part1.safetensors s-plain.safetensors --quantizer-path m.safetensors",
            "differ in start_token",
        ),
        (f"{line} --bos --resume s-plain.safetensors --force --quantizer-path m.safetensors", "--bos"),
        (
            "calibrate --from-statistics s-begun.safetensors --bos --quantizer-path m.safetensors",
            "--bos has no effect with --from-statistics; remove it",
        ),
        ("calibrate model --dataset a.txt --bos", "--bos: the model's tokenizer has no start token"),
        ("evaluate model --dataset b.txt --abits 4 --bos", "--bos: the model's tokenizer has no start token"),
        ("evaluate chat --dataset b.txt --abits 4 --bos --tasks synthetic", "--bos: no effect without a loss on text"),
    ):
        refused = type_in(command)
        assert refused.status in (1, 2)
        assert told in refused.err, refused.err


def test_an_evaluation_begins_its_windows_too_and_says_where_calibration_did_not(works: Program, here: Path) -> None:
    save_model(here / "chat")
    save_tokenizer(here / "chat", bos_token="!")
    works("calibrate chat --dataset a.txt --nsamples 4 --bos --quantizer-path begun.safetensors")
    line = "evaluate chat --dataset b.txt --limit 3 --quantizer-path begun.safetensors"
    own, other = works(f"{line} --bos --json"), works(f"{line} --json")
    assert own.json["start_token"] == PreTrainedTokenizerFast.from_pretrained(here / "chat").bos_token_id
    assert own.json["n_targets"] == other.json["n_targets"] == 3 * 63
    assert own.json["fp"] != other.json["fp"]
    assert "start token" not in own.err
    assert "windows of the calibration begin with the start token, those evaluated do not" in other.err
    assert works(f"{line} --bos --stride 16 --json").json["n_targets"] == 62 + 2 * 16
    assert "windows begun with token" in works(f"{line} --bos").out


# --- checkpoints


def edited_model(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None], **config: object) -> Path:
    """A copy of the model with other weights, and other entries in its config.json."""
    shutil.copytree("model", folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", PT)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **config}))
    return folder


PT = {"format": "pt"}
UP = "model.layers.{}.mlp.up_proj.weight"


def quantize(weights: dict[str, torch.Tensor], dtype: torch.dtype, suffix: str) -> None:
    for layer in range(2):
        name = UP.format(layer)
        weights[name + suffix] = weights[name].abs().amax() / 100
        weights[name] = (weights[name] / weights[name + suffix]).to(dtype)


def move(weights: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in [name for name in weights if old in name]:
        weights[name.replace(old, new)] = weights[name].clone()


UNFIT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], list[str]]] = {
    "float8": (lambda w: quantize(w, torch.float8_e4m3fn, "_scale"), ["2 tensors", UP.format(0) + "_scale"]),
    "int8": (lambda w: quantize(w, torch.int8, "_scale_inv"), ["weights are quantized", "quantization_config"]),
    "a bias": (
        lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        ["1 weights in its files have no place in LlamaForCausalLM", "q_proj.bias", "save_pretrained"],
    ),
    "a norm": (
        lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
        ["no place in LlamaForCausalLM", "q_norm.weight"],
    ),
    "a layer more": (lambda w: move(w, ".layers.1.", ".layers.2."), ["9 weights", "model.layers.2."]),
    "another shape": (
        lambda w: w.update({"model.embed_tokens.weight": torch.ones(200, 32)}),
        ["1 weights have other shapes", "model.embed_tokens.weight: [200, 32], expected [256, 32]"],
    ),
    "a weight less": (lambda w: w.pop("model.norm.weight"), ["1 weights are missing", "model.norm.weight"]),
}


@pytest.mark.parametrize("name", UNFIT)
def test_weights_that_do_not_belong_to_the_model_are_refused(name: str, type_in: Program, here: Path) -> None:
    """Regression: scales beside float8 and int8 weights were dropped, and the perplexity of garbage was printed."""
    edit, words = UNFIT[name]
    edited_model(here / "unfit", edit)
    refused = type_in("evaluate unfit --abits 4 --dataset b.txt --limit 1")
    assert refused.status == 1, refused.err
    assert [word for word in ["evaluate: unfit: ", *words] if word not in refused.err] == [], refused.err
    assert len(refused.err.splitlines()) == 1


SPARE: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "tables": lambda w: w.update({f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in (0, 1)}),
    "masks": lambda w: w.update(
        {
            "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
            "model.layers.0.attn.attention.bias": torch.ones(9, 9),
        }
    ),
    "a tower": lambda w: w.update({"model.vision_tower.layers.0.weight": torch.ones(4)}),
    "a head": lambda w: w.update({"v_head.summary.weight": torch.ones(1, 32)}),
    "prediction": lambda w: w.update({"mtp.layers.0.weight": torch.ones(4)}),
    "scales of the cache": lambda w: w.update({"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}),
}


@pytest.mark.parametrize("name", SPARE)
def test_weights_that_a_language_model_can_do_without_are_left_out(name: str, works: Program, here: Path) -> None:
    edited_model(here / "spare", SPARE[name])
    own, other = (works(f"evaluate {m} --abits 4 --dataset b.txt --limit 1 --json") for m in ("model", "spare"))
    assert own.json["fp"] == other.json["fp"]
    assert ("left out" in other.err) == (name not in ("tables", "masks"))


def test_tied_weights_are_whole(works: Program, here: Path) -> None:
    save_model(here / "tied", tie_word_embeddings=True)
    save_tokenizer(here / "tied")
    works("evaluate tied --abits 4 --dataset b.txt --limit 1")
    weights = load_file(here / "tied" / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, here / "tied.st", PT)
    os.replace(here / "tied.st", here / "tied" / "model.safetensors")
    works("evaluate tied --abits 4 --dataset b.txt --limit 1")


def test_what_is_no_whole_model_is_told_by_name(type_in: Program, here: Path) -> None:
    """Regression: adapters and models with code of their own were said to need config.json."""
    (here / "lora").mkdir()
    (here / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}')
    edited_model(here / "strange", lambda w: None, model_type="strange", auto_map={"AutoConfig": "conf.StrangeConfig"})
    (here / "strange" / "conf.py").write_text("raise SystemExit('code of a model was run')")
    for name, words in (
        ("lora", ["adapter (adapter_config.json) of owner/base", "merge_and_unload().save_pretrained"]),
        ("strange", ["model type 'strange'", "auto_map", "never run"]),
        ("model/model.safetensors", ["is a file", "pass model"]),
    ):
        refused = type_in(f"calibrate {name} --dataset a.txt")
        assert refused.status == 1
        assert [word for word in words if word not in refused.err] == [], refused.err
        assert len(refused.err.splitlines()) == 1
        assert "needs config.json" not in refused.err


def test_code_that_lies_beside_a_known_model_is_not_run(works: Program, here: Path) -> None:
    edited_model(here / "coded", lambda w: None, auto_map={"AutoModelForCausalLM": "code.Model"})
    (here / "coded" / "code.py").write_text("raise SystemExit('code of a model was run')")
    works("evaluate coded --abits 4 --dataset b.txt --limit 1")


# --- longer contexts


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
}
LOCAL = "model.rotary_emb.sliding_attention_inv_freq"


def frequencies(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    buffers = AutoModelForCausalLM.from_config(config).named_buffers()
    return {name: buffer for name, buffer in buffers if name.endswith("inv_freq") and "original" not in name}


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gpt_neox", "gemma3_text", "olmo3", "modernbert-decoder", "gemma4_text"]
)
def test_stretching_divides_the_frequencies_of_every_layer_that_sees_the_context(kind: str) -> None:
    """Regression: RoPE with a set for each type of layer was left as it was, and ModernBERT was a TypeError."""
    config = CONFIG_MAPPING[kind](**SMALL, head_dim=8)
    own = frequencies(config)
    stretch(config, 64)
    assert all(torch.equal(own[name], table) for name, table in frequencies(config).items())
    stretch(config, 150)
    assert config.max_position_embeddings == 150
    stretched = frequencies(config)
    assert set(stretched) == set(own)
    for name, table in stretched.items():
        torch.testing.assert_close(table * (1 if name == LOCAL else 3), own[name])


def test_a_linear_factor_is_multiplied() -> None:
    """Regression: stretching a model that is stretched already forgot its own factor."""
    plain, config = (LlamaConfig(**SMALL) for _ in range(2))
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    stretch(config, 128)
    for name, table in frequencies(config).items():
        torch.testing.assert_close(table * 8, frequencies(plain)[name])


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (OPTConfig(max_position_embeddings=64), "opt has no RoPE to scale"),
        (GPT2Config(n_positions=64), "at most its 64 tokens"),
        (BloomConfig(), "bloom has no limit on positions"),
        (FalconConfig(alibi=True, max_position_embeddings=64), "falcon has no limit on positions"),
        (
            LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "scaled already, by 'dynamic' to 64 tokens",
        ),
    ],
)
def test_what_cannot_be_stretched_is_refused(config: PreTrainedConfig, told: str) -> None:
    """Regression: learned positions were an AttributeError, and other scalings were replaced by a linear one."""
    before = config.to_dict()
    with pytest.raises(UsageError, match=f"--maxseqlen 100: .*{told}"):
        stretch(config, 100)
    assert config.to_dict() == before


# --- files of other tools

CALIBRATE = "calibrate model --dataset a.txt"
EVALUATE = "evaluate model --dataset b.txt --limit 2"


@pytest.fixture
def kvquant(here: Path) -> Path:
    """A KVQuant file for the model."""
    return write_pickle(here / "kvquant.pickle", kvquant_content((kvquant_levels(3),)))


def test_a_kvquant_file_is_evaluated_as_it_is(kvquant: Path, works: Program) -> None:
    ran = works(f"{EVALUATE} --abits 3 --nuq --include_sparse --quantizer-path kvquant.pickle --json")
    assert ran.json["quantized_fraction"] == 1
    assert 3 < ran.json["bits"]["key"] < 16
    for words in ("note: kvquant.pickle", "thresholds of calibration tokens", "a file of KVQuant"):
        assert words in ran.err
    assert "assumed none, values beyond" not in ran.err


def test_a_converted_file_gives_the_same_figures_and_takes_no_more_flags(
    kvquant: Path, works: Program, type_in: Program
) -> None:
    ran = works("artifact convert kvquant.pickle q.safetensors --include-sparse --first-few-fp16 2")
    assert "note: kvquant.pickle" in ran.err
    direct = works(f"{EVALUATE} --include-sparse --first-few-fp16 2 --quantizer-path kvquant.pickle --json").json
    converted = works(f"{EVALUATE} --quantizer-path q.safetensors --json").json
    assert {**direct, "seconds": 0} == {**converted, "seconds": 0}
    works("artifact inspect q.safetensors")
    refused = type_in(f"{EVALUATE} --quantizer-path q.safetensors --abits 4")
    assert refused.status == 2
    assert "comes from another tool and fixes its quantizers" in refused.err


def test_msmodelslim_is_evaluated_as_it_is(here: Path, works: Program) -> None:
    write_msmodelslim(here / "slim", torch.bfloat16)
    ran = works(f"{EVALUATE} --quantizer-path slim --json")
    assert ran.json["bits"]["key"] == 8
    assert "note: slim: keys are quantized after RoPE" in ran.err


FOREIGN_WRONG = [
    ("{0} --quantizer-path ranges.pickle", 1, ["layers.0.key.pre_rope", "Add --abits N"]),
    ("{0} --quantizer-path kvquant.pickle --abits 4", 1, ["--abits 4 was given", "8 levels"]),
    ("{0} --quantizer-path kvquant.pickle --recipe kvquant", 2, ["from another tool", "remove --recipe"]),
    ("{0} --quantizer-path wide.pickle", 1, ["(64, 16)", "32 channels", "another model"]),
    ("artifact convert kvquant.pickle q4.safetensors", 2, ["q4.safetensors exists"]),
    ("artifact convert kvquant.pickle q.json", 1, [".safetensors or .pkl"]),
    ("artifact convert q4.safetensors q.pkl --abits 4", 2, ["is an artifact, which records its bits"]),
    ("artifact convert junk.safetensors q.pkl", 1, ["expected a safetensors file or a pickle"]),
]


@pytest.mark.parametrize(("line", "status", "words"), FOREIGN_WRONG, ids=[line for line, _, _ in FOREIGN_WRONG])
def test_wrong_use_of_foreign_files_gets_a_clear_answer(
    line: str, status: int, words: list[str], type_in: Program, here: Path, kvquant: Path
) -> None:
    write_pickle(here / "ranges.pickle", kvquant_content())
    content = kvquant_content((kvquant_levels(3),))
    for name in [name for name in content if "k_proj" in name]:
        upper, lower, levels = content[name]
        content[name] = (torch.cat([upper, upper], 1), torch.cat([lower, lower], 1), levels)
    write_pickle(here / "wide.pickle", content)
    ran = type_in(line.format(EVALUATE))
    assert ran.status == status, ran.err
    assert [word for word in words if word not in ran.err] == [], ran.err
    assert "Traceback" not in ran.err


# --- wrong input: the command, its exit status, and what the message must say

WRONG: list[tuple[str, int, list[str]]] = [
    # contradictions
    (f"{EVALUATE} --quantizer-path q4.safetensors --abits 3", 2, ["contradict", "bits: the file has 4", "line 3"]),
    (f"{EVALUATE} --quantizer-path q4.safetensors --abits 16", 2, ["contradict", "identity"]),
    (f"{EVALUATE} --quantizer-path q4.safetensors --stage post_rope", 2, ["stage: the file has pre_rope"]),
    (f"{EVALUATE} --quantizer-path q4.safetensors --include-sparse", 2, ["outliers: the file has None"]),
    (f"{EVALUATE} --abits 4 --first-few-fp16 auto", 1, ["sink_tokens: auto is chosen from calibration statistics"]),
    (f"{EVALUATE} --quantizer-path q4.safetensors --recipe kvquant", 2, ["recipe: the file has default", "kvquant"]),
    (f"{EVALUATE} --abits 4 --perchannel k_proj --pertoken k_proj", 2, ["both name key"]),
    (
        f"{CALIBRATE} --from-statistics s.safetensors --merge s.safetensors",
        2,
        ["--from-statistics and --merge", "cannot be combined"],
    ),
    (f"{CALIBRATE} --from-statistics s.safetensors", 2, ["MODEL has no effect with --from-statistics; remove it"]),
    ("calibrate --merge s.safetensors --nsamples 8", 2, ["--nsamples has no effect with --merge; remove it"]),
    ("calibrate --from-statistics s.safetensors --save-statistics s2.pkl", 2, ["--save-statistics has no effect"]),
    (f"{CALIBRATE} --resume s.safetensors --seed 5", 2, ["windows are not of this run", "--seed"]),
    # sizes
    (f"{CALIBRATE} --seqlen 65", 2, ["--seqlen 65", "context of 64 tokens", "--seqlen 64"]),
    (f"{EVALUATE} --abits 4 --seqlen 65", 2, ["context of 64 tokens", "--maxseqlen 65"]),
    (f"{CALIBRATE} --seqlen 1", 2, ["at least 2"]),
    (f"{CALIBRATE} --nsamples 0", 2, ["--nsamples", "integer from 1", "'0'"]),
    (f"{CALIBRATE} --nsamples many", 2, ["--nsamples", "'many'"]),
    (f"{EVALUATE} --abits 4 --batch-size -1", 2, ["--batch-size"]),
    (f"{CALIBRATE} --jobs 0", 2, ["--jobs", "integer from 1"]),
    (f"{CALIBRATE} --abits 9", 2, ["--abits", "invalid choice"]),
    (f"{CALIBRATE} --shard 5/4", 2, ["--shard", "I from 1 to N", "5/4"]),
    (f"{CALIBRATE} --nsamples 2 --shard 3/4", 2, ["--shard 3/4: no window is left of 2", "at most 2"]),
    (f"{EVALUATE} --abits 4 --include-sparse --sparsity-threshold 0.2", 2, ["fraction of values quantized", "0.2"]),
    (f"{CALIBRATE} --first-few-fp16 9", 1, ["sink_tokens", "less than or equal to 8", "9"]),
    (f"{EVALUATE} --abits 4 --first-few-fp16 8 --seqlen 8", 1, ["no token was quantized", "first 8 tokens exact"]),
    # text
    ("calibrate model --dataset large_ids.npy", 1, ["token ids from 0 to 255", "go from 256 to 256", "another model?"]),
    (
        "evaluate model --abits 4 --dataset large_ids.npy",
        1,
        ["large_ids.npy", "from 0 to 255", "448 outside"],
    ),
    ("calibrate model --dataset latin1.txt", 1, ["latin1.txt", "UTF-8", "0xe9", "iconv"]),
    ("calibrate model --dataset short.txt", 1, ["short.txt", "65 tokens", "got 9", "--seqlen"]),
    ("evaluate model --abits 4 --dataset short.txt", 1, ["64 tokens", "got 9"]),
    ("calibrate model --dataset blank.txt", 1, ["blank.txt", "0 bytes"]),
    ("calibrate model --dataset folder", 1, ["folder", "got a directory"]),
    ("calibrate model --dataset nowhere.txt", 1, ["nowhere.txt", "demo, wikitext2, ptb, c4, kjv, self or a file"]),
    ("calibrate model --dataset wikitext", 1, ["did you mean wikitext2?"]),
    ("calibrate model --dataset wikitext2", 1, ["Salesforce/wikitext", "local file", "--dataset path/to/"]),
    ("evaluate model --abits 4", 1, ["wikitext2", "local file"]),
    ("calibrate model --dataset records.jsonl", 1, ["records.jsonl, line 1", "field 'text'"]),
    ("calibrate untokenized --dataset a.txt", 2, ["no tokenizer", "ids.npy"]),
    # output
    (f"{CALIBRATE} --quantizer-path q4.safetensors", 2, ["q4.safetensors exists", "--force"]),
    (f"{CALIBRATE} --quantizer-path q.pkl --save-statistics s.safetensors", 2, ["s.safetensors exists", "--force"]),
    (f"{CALIBRATE} --quantizer-path q.bin", 1, ["q.bin", ".safetensors or .pkl"]),
    (f"{CALIBRATE} --save-statistics s.json", 1, ["s.json", ".safetensors or .pkl"]),
    (f"{CALIBRATE} --quantizer-path folder", 1, ["folder", ".safetensors or .pkl"]),
    (f"{CALIBRATE} --quantizer-path a.txt/q.pkl", 2, ["a.txt/q.pkl: cannot write to", "a.txt: not a folder"]),
    (f"{CALIBRATE} --quantizer-path q.pkl --save-statistics ./q.pkl", 2, ["both name q.pkl"]),
    # artifacts
    (f"{EVALUATE} --quantizer-path folder", 1, ["folder", "got a directory"]),
    (f"{EVALUATE} --quantizer-path pointer.safetensors", 1, ["git-lfs pointer", "git lfs pull"]),
    (f"{EVALUATE} --quantizer-path junk.safetensors", 1, ["expected a safetensors file or a pickle"]),
    (f"{EVALUATE} --quantizer-path s.safetensors", 1, ["format kvgauge.artifact", "kvgauge.statistics"]),
    (f"{EVALUATE} --quantizer-path model/model.safetensors", 1, ["without kvgauge metadata", "model weights"]),
    (f"{EVALUATE} --quantizer-path nowhere.safetensors", 2, ["no such file", "none under runs/", "calibrate MODEL"]),
    (f"{EVALUATE} --quantizer-path partial.safetensors", 1, ["for every layer", "layers.1.key", "layers.1.value"]),
    (
        "evaluate other --dataset b.txt --quantizer-path q4.safetensors",
        1,
        ["another model", "[4, 2, 8]", "[4, 2, 16]"],
    ),
    (f"{EVALUATE} --maxseqlen 100 --quantizer-path q4.safetensors", 1, ["another model", "rope", "linear"]),
    ("evaluate model --dataset b.txt", 2, ["--quantizer-path", "--abits", "none under runs/"]),
    # models
    ("evaluate --quantizer-path q4.safetensors", 2, ["evaluate MODEL --quantizer-path"]),
    ("evaluate folder --abits 4", 1, ["folder: no model could be loaded", "config.json"]),
    ("evaluate smolm2 --abits 4", 1, ["smolm2: no model could be loaded", "Did you mean smollm2?"]),
    ("calibrate nobody/nothing --dataset a.txt", 1, ["nobody/nothing: no model", "local folder"]),
    # recipes and statistics
    (f"{CALIBRATE} --recipe kvquent", 1, ["'kvquent'", "Did you mean kvquant?"]),
    (f"{CALIBRATE} --recipe mine.yaml", 1, ["mine.yaml", "no such file"]),
    (f"{EVALUATE} --recipe default --abits 4", 1, ["a basis is fitted", "calibrate"]),
    ("calibrate --from-statistics s.safetensors --stage post_rope", 1, ["post_rope", "pre_rope", "Calibrate again"]),
    ("calibrate --from-statistics q4.safetensors", 1, ["kvgauge.statistics"]),
    ("calibrate --from-statistics nowhere.safetensors", 1, ["nowhere.safetensors: cannot be read"]),
    ("calibrate --merge s.safetensors s.safetensors", 1, ["4 of 4 windows", "the same shard twice?"]),
    ("calibrate model --bogus", 2, ["--bogus", "See calibrate --help"]),
    ("calibrate model --data a.txt", 2, ["--data"]),
    (f"{CALIBRATE} --device gpu", 2, ["--device gpu: expected cpu, cuda"]),
    ("calibrate nowhere-model --dataset nowhere.txt", 1, ["nowhere.txt: expected demo"]),
]


@pytest.mark.parametrize(("line", "status", "words"), WRONG, ids=[line for line, _, _ in WRONG])
def test_wrong_input_gets_a_clear_answer(
    line: str, status: int, words: list[str], type_in: Program, here: Path
) -> None:
    before = sorted(here.rglob("*"))
    ran = type_in(line)
    assert ran.status == status, ran.err
    assert [word for word in words if word not in ran.err] == [], ran.err
    assert "Traceback" not in ran.err + ran.out
    assert ran.out == ""
    assert sorted(here.rglob("*")) == before


def test_a_missing_artifact_lists_those_there_are(type_in: Program, works: Program) -> None:
    works(f"{CALIBRATE} --nsamples 2 --abits 2")
    for line in (f"{EVALUATE} --quantizer-path nowhere.safetensors", EVALUATE):
        ran = type_in(line)
        assert ran.status == 2
        assert "  runs/model-default/quantizers-k2v2.safetensors" in ran.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("line", [CALIBRATE, f"{EVALUATE} --abits 4"])
def test_a_device_that_is_not_there(line: str, type_in: Program) -> None:
    ran = type_in(line + " --device cuda")
    assert ran.status == 2
    assert "this torch sees no CUDA device; use --device cpu" in ran.err


def test_debug_shows_the_traceback(type_in: Program) -> None:
    ran = type_in("calibrate model --dataset short.txt --debug")
    assert ran.status == 1
    assert "Traceback (most recent call last)" in ran.err
    assert ran.err.splitlines()[-1].startswith("calibrate: short.txt: ")
