"""Requests of lm-evaluation-harness on a packed cache, with a stand-in for the harness, which need not be installed."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.identity import Identity
from artifacts.sites import Site
from kvgauge.cli.options.common import parsed
from kvgauge.cli.options.harness import add_lm_eval_options
from kvgauge.configuration.harness import HarnessConfig
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading.models import LoadedModel, load_model
from kvgauge.running.lm_eval_adapter import lm_eval_table, run_lm_eval
from kvgauge.running.lm_eval_respondent import Respondent
from kvgauge.terminal.console import Parser, UsageError
from simquant import CachePolicy, NothingQuantizedError, packed_cache

PROMPT = "The pass key is 12345. Remember it: 12345 is the pass key. What is the pass key? The pass key is"
TEXT = "The pass key is 12345."


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(ModelConfig(model="demo", device="cpu", dtype="float32"))


def respondent(loaded: LoadedModel, **changes: Any) -> Respondent:
    fields = {"model": loaded.model, "tokenizer": loaded.tokenizer, "context_tokens": loaded.context}
    return Respondent(**{**fields, **changes})


def quantizers(loaded: LoadedModel, bits: int) -> dict[Site, Quantizer]:
    """Each token's own range, or with 16 bits identities."""
    layers = loaded.layers()
    sites = [site for each in layers for site in (Site(each.layer, "key", "pre_rope"), Site(each.layer, "value"))]
    channels = layers[0].channels
    if bits == 16:
        return {site: Identity(channels=channels) for site in sites}
    return {site: DynamicAffine(channels=channels, bits=bits) for site in sites}


@torch.no_grad()
def log_probs_of(loaded: LoadedModel, ids: list[int], n_scored: int) -> torch.Tensor:
    """The textbook: one pass over everything."""
    log_probs = loaded.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return torch.stack([log_probs[i - 1, ids[i]] for i in range(len(ids) - n_scored, len(ids))])


def test_a_continuation_is_scored_as_in_one_pass_over_the_whole_text(demo: LoadedModel) -> None:
    ids = demo.tokenizer(f"{PROMPT} 12345.").input_ids
    n_scored = len(ids) - len(demo.tokenizer(PROMPT).input_ids)
    expected = float(log_probs_of(demo, ids, n_scored).sum())
    found, greedy = respondent(demo).loglikelihood(PROMPT, " 12345.")
    assert found == pytest.approx(expected, abs=1e-4)
    assert greedy
    assert respondent(demo).loglikelihood(f"{PROMPT} ", "12345.")[0] == pytest.approx(expected, abs=1e-4)
    other, greedy = respondent(demo).loglikelihood(PROMPT, " 99999.")
    assert other < found
    assert not greedy


def test_a_continuation_without_context_follows_the_token_that_begins_texts(demo: LoadedModel) -> None:
    ids = [demo.tokenizer.eos_token_id, *demo.tokenizer("The pass key").input_ids]
    found, _ = respondent(demo).loglikelihood("", "The pass key")
    assert found == pytest.approx(float(log_probs_of(demo, ids, len(ids) - 1).sum()), abs=1e-4)


def test_a_token_that_the_tokenizer_puts_before_texts_stands_there_once(demo: LoadedModel) -> None:
    first = 5

    class Tokenizer:
        bos_token_id, eos_token_id = first, 0

        def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> SimpleNamespace:
            ids = demo.tokenizer(text, verbose=verbose).input_ids
            return SimpleNamespace(input_ids=[first, *ids] if add_special_tokens else ids)

    ids = [first, *demo.tokenizer(f"{PROMPT} 12345.").input_ids]
    n_context = len(demo.tokenizer(PROMPT).input_ids)
    asked = respondent(demo, tokenizer=Tokenizer())
    expected = log_probs_of(demo, ids, len(ids) - 1)
    assert asked.loglikelihood(PROMPT, " 12345.")[0] == pytest.approx(float(expected[n_context:].sum()), abs=1e-4)
    assert asked.loglikelihood("", f"{PROMPT} 12345.")[0] == pytest.approx(float(expected.sum()), abs=1e-3)
    assert asked.loglikelihood_rolling(f"{PROMPT} 12345.") == pytest.approx(float(expected.sum()), abs=1e-3)


def test_a_context_that_is_too_long_loses_its_start(demo: LoadedModel) -> None:
    ids = demo.tokenizer(f"{PROMPT} 12345.").input_ids
    n_scored = len(ids) - len(demo.tokenizer(PROMPT).input_ids)
    found, _ = respondent(demo, context_tokens=16).loglikelihood(PROMPT, " 12345.")
    assert found == pytest.approx(float(log_probs_of(demo, ids[-17:], n_scored).sum()), abs=1e-4)


@pytest.mark.parametrize("continuation", ["", " 12345" * 40])
def test_a_continuation_that_cannot_be_scored_is_refused(demo: LoadedModel, continuation: str) -> None:
    with pytest.raises(UsageError, match="expected a continuation of 1 to 16 tokens; got"):
        respondent(demo, context_tokens=16).loglikelihood(PROMPT, continuation)


@pytest.mark.parametrize("context_tokens", [1, 3, 7, 1000])
def test_a_rolling_text_is_predicted_once_each_token_and_last_from_a_full_context(
    demo: LoadedModel, context_tokens: int
) -> None:
    ids = [demo.tokenizer.eos_token_id, *demo.tokenizer(TEXT).input_ids]
    expected, n_done = 0.0, 0
    while n_done < len(ids) - 1:
        n_now = min(context_tokens, len(ids) - 1 - n_done)
        window = ids[: n_done + n_now + 1][-context_tokens - 1 :]
        expected, n_done = expected + float(log_probs_of(demo, window, n_now).sum()), n_done + n_now
    found = respondent(demo, context_tokens=context_tokens).loglikelihood_rolling(TEXT)
    assert found == pytest.approx(expected, abs=1e-3)
    assert respondent(demo).loglikelihood_rolling("") == 0


def test_an_answer_ends_before_its_stop_string_or_at_its_limit(demo: LoadedModel) -> None:
    ask = respondent(demo).generate_until
    long = ask(PROMPT, {"max_gen_toks": 12})
    assert long.startswith(" 12345. ")
    assert ask(PROMPT, {"until": ["pass", "."], "max_gen_toks": 12, "do_sample": False}) == " 12345"
    assert ask(PROMPT, {"until": ".", "max_new_tokens": 12, "temperature": 0.0}) == " 12345"
    assert ask(PROMPT, {"until": ".", "do_sample": False, "temperature": 1.0}) == " 12345", "nothing is drawn"
    assert len(ask(PROMPT, {"max_tokens": 2})) < len(long)
    for drawn in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(UsageError, match="only greedy decoding"):
            ask(PROMPT, drawn)


def replies(respondent: Respondent) -> list[Any]:
    """One of each kind; the second continuation is a single token, of which the first step gives the logits."""
    return [
        respondent.loglikelihood(PROMPT, " 12345.")[0],
        respondent.loglikelihood("", "The")[0],
        respondent.loglikelihood_rolling(PROMPT),
        respondent.generate_until(PROMPT, {"max_gen_toks": 4}),
    ]


EXACT_PREFILL = CachePolicy(sink_tokens=1, exact_prefill=True)


@pytest.mark.parametrize("policy", [CachePolicy(), CachePolicy(residual_tokens=4), EXACT_PREFILL])
def test_a_packed_cache_of_identities_answers_as_the_exact_model(demo: LoadedModel, policy: CachePolicy) -> None:
    *exact, text = replies(respondent(demo))
    with packed_cache(demo.model, quantizers(demo, 16), policy=policy) as new_cache:
        *numbers, packed_text = replies(respondent(demo, new_cache=new_cache))
    assert numbers == pytest.approx(exact, abs=1e-3)
    assert packed_text == text


@pytest.mark.parametrize("policy", [CachePolicy(), EXACT_PREFILL])
def test_what_is_scored_reads_quantized_tokens_also_after_an_exact_prefill(
    demo: LoadedModel, policy: CachePolicy
) -> None:
    exact = replies(respondent(demo))
    with packed_cache(demo.model, quantizers(demo, 2), policy=policy) as new_cache:
        packed = replies(respondent(demo, new_cache=new_cache))
    assert abs(packed[0] - exact[0]) > 0.1
    assert abs(packed[2] - exact[2]) > 0.1


def test_every_request_has_an_empty_cache_of_its_own_that_is_handed_on_afterwards(demo: LoadedModel) -> None:
    made: list[Any] = []
    done: list[Any] = []
    with packed_cache(demo.model, quantizers(demo, 2)) as new_cache:

        def new() -> Any:
            made.append(new_cache())
            return made[-1]

        asked = respondent(demo, new_cache=new, done=done.append)
        assert replies(asked)[0] == asked.loglikelihood(PROMPT, " 12345.")[0]
    assert len(made) == 5
    assert [id(cache) for cache in made] == [id(cache) for cache in done]


# The stand-in: two documents of a task with every kind of request, and results in the harness's own form.

DOCUMENTS = ("12345", "54321")


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def simple_evaluate(model: Any, tasks: list[str], **settings: Any) -> dict[str, Any]:
    assert isinstance(model, StandInLM)
    prompts = [PROMPT.replace("12345", key) for key in DOCUMENTS][: settings["limit"]]
    scores = model.loglikelihood([request(p, f" {key}.") for p, key in zip(prompts, DOCUMENTS, strict=False)])
    whole = model.loglikelihood_rolling([request(prompt) for prompt in prompts])
    texts = model.generate_until([request(prompt, {"until": ["."], "max_gen_toks": 4}) for prompt in prompts])
    right = [float(key in text) for key, text in zip(DOCUMENTS, texts, strict=False)]
    samples = [
        {"doc_id": i, "filter": "none", "acc": right[i], "logprob": scores[i][0], "perplexity": (whole[i], 9)}
        for i in range(len(prompts))
    ]
    figures = {
        "alias": "stand_in",
        "acc,none": sum(right) / len(right),
        "acc_stderr,none": "N/A",
        "logprob,none": sum(score for score, _ in scores) / len(scores),
        "perplexity,none": -sum(whole),
    }
    return {
        "results": {tasks[0]: figures},
        "samples": {tasks[0]: samples},
        "n-samples": {tasks[0]: {"original": len(DOCUMENTS), "effective": len(prompts)}},
    }


class StandInLM:
    pass


class TaskManager:
    def __init__(self, include_path: str | None) -> None:
        assert include_path is None

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name == "stand_in"]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.api.model": {"LM": StandInLM},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def arguments(*words: str) -> HarnessConfig:
    parser = Parser("evaluate")
    add_lm_eval_options(parser)
    return parsed(HarnessConfig, parser.parse_args(words))


@pytest.mark.usefixtures("harness")
def test_both_models_are_compared_by_task_and_metric(demo: LoadedModel) -> None:
    result = run_lm_eval(arguments("--lm-eval", "stand_in"), demo, quantizers(demo, 2), CachePolicy(sink_tokens=1))
    found = result["tasks"]["stand_in"]
    assert found.keys() == {"acc,none", "logprob,none", "perplexity,none"}
    assert found["acc,none"]["n"] == 2
    assert found["acc,none"]["fp"] == 1
    assert found["acc,none"]["fp_stderr"] is None
    logprob = found["logprob,none"]
    assert logprob["quantized"] < logprob["fp"] - 0.1
    assert logprob["difference"] == pytest.approx(logprob["quantized"] - logprob["fp"])
    assert logprob["difference_stderr"] > 0
    assert "difference" not in found["perplexity,none"], "it is no mean over documents"
    assert 0 < result["quantized_fraction"] < 1, "the sink of each text is exact"
    assert "packed cache" in result["protocol"]
    table = lm_eval_table(result)
    assert f"stand_in, acc,none, n = 2: 1.0000 -> {found['acc,none']['quantized']:.4f}, difference" in table
    assert result["protocol"] in table


@pytest.mark.usefixtures("harness")
def test_a_limit_of_one_document_gives_no_standard_error_of_the_difference(demo: LoadedModel) -> None:
    asked = arguments("--lm-eval", "stand_in", "--lm-eval-limit", "1")
    found = run_lm_eval(asked, demo, quantizers(demo, 2), CachePolicy())["tasks"]["stand_in"]
    assert found["acc,none"]["n"] == 1
    assert "difference" not in found["acc,none"]


@pytest.mark.usefixtures("harness")
def test_a_run_in_which_no_token_is_quantized_is_refused(demo: LoadedModel) -> None:
    asked = arguments("--lm-eval", "stand_in", "--lm-eval-limit", "1")
    with pytest.raises(NothingQuantizedError, match="no token was quantized"):
        run_lm_eval(asked, demo, quantizers(demo, 2), CachePolicy(residual_tokens=500))
    exact = run_lm_eval(asked, demo, quantizers(demo, 16), CachePolicy())["tasks"]["stand_in"]["logprob,none"]
    assert exact["quantized"] == pytest.approx(exact["fp"], abs=1e-3)


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lm-eval", "stand_in,other"], "the harness has no task other; list them"),
        (["--lm-eval", ","], "the harness has no task ','; list them"),
        (["--lm-eval", "stand_in", "--lm-eval-fewshot", "-1"], "expected a number from 0; got -1"),
    ],
)
def test_what_the_harness_does_not_have_is_refused(demo: LoadedModel, words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_lm_eval(arguments(*words), demo, quantizers(demo, 2), CachePolicy())


def test_without_the_harness_the_error_says_how_to_get_it(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="pip install lm-eval"):
        run_lm_eval(arguments("--lm-eval", "gsm8k"), demo, quantizers(demo, 2), CachePolicy())


@pytest.mark.usefixtures("harness")
def test_a_model_without_tokenizer_is_refused(demo: LoadedModel) -> None:
    with pytest.raises(UsageError, match="no tokenizer"):
        run_lm_eval(
            arguments("--lm-eval", "stand_in"), LoadedModel(demo.model, None, None), quantizers(demo, 2), CachePolicy()
        )


def test_a_task_of_the_harness_itself_runs(demo: LoadedModel, tmp_path: Path) -> None:
    """Where it is installed: a task of two local documents, without the hub."""
    pytest.importorskip("lm_eval")
    rows = [{"question": PROMPT, "choices": ["12345.", "99999."], "answer": 0}] * 2
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "two_keys.yaml").write_text(
        f"""
task: two_keys
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    asked = arguments("--lm-eval", "two_keys", "--lm-eval-include", str(tmp_path))
    found = run_lm_eval(asked, demo, quantizers(demo, 8), CachePolicy())["tasks"]["two_keys"]["acc,none"]
    assert (found["n"], found["fp"], found["quantized"], found["difference"]) == (2, 1, 1, 0)
