"""Next-token reasoning with a real proxy: its rows, its refusals, whole runs, and the command that shows positions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.algorithms.sequence_groups import make_sequence_groups
from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.data.rows import DataError, MalformedRows
from llmquest_rl.data.task import Task, open_task
from llmquest_rl.data.tasks import TASKS, next_token_reasoning
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.models.checkpoint.hub import resolve_model
from llmquest_rl.models.checkpoint.load_save import load_model, new_model, save_model
from llmquest_rl.models.llama import LlamaConfig
from llmquest_rl.models.weight_map import disk_tensors
from llmquest_rl.types import Completion, Group, Problem, Score
from rewards.builtin import likelihood_gain
from rewards.builtin.next_token import Config as Reward
from rewards.builtin.next_token import reward
from rollout.proxy import NativeProxy, open_proxy
from tests.trainer.conftest import Runs, assert_equal_runs, rows
from trainer.cli.main import app
from trainer.components import RunComponents
from trainer.papers.measures import Trained
from trainer.papers.measures.next_token import labels, measure
from trainer.run.tracking import JsonLines
from trainer.sources.answer_logprobs import AnswerScorer
from trainer.sources.next_token_eval import DIFFICULTIES

TEXT = "".join(f"line {n}: {n} times {n} is {n * n}, as anybody knows.\n" for n in range(30))
SUMS = {"name": "arithmetic", "digits": 2, "held_out": 20, "template": "{question}"}
ON_SUMS = {"task": SUMS, "task_rows": 60, "separator": "=", "template": "{context}?"}


@pytest.fixture(scope="module")
def proxy(tiny_model: Path) -> NativeProxy:
    return open_proxy(tiny_model, tiny_model, 1)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Found before the cache is another folder."""
    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQUEST_CACHE", str(tmp_path_factory.getbasetemp() / "scores"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def opened(proxy: NativeProxy, **options: Any) -> Task:
    defaults = {"threshold": 0.0} if options.get("select", "entropy") == "entropy" else {}
    config = next_token_reasoning.Config(**{"document_tokens": 64} | defaults | options)
    return open_task(
        "next_token_reasoning", TASKS.function("next_token_reasoning"), config, 3, MalformedRows(), lambda _: proxy
    )


def test_a_row_is_a_position_with_the_text_before_and_behind_it(proxy: NativeProxy, text: Path) -> None:
    task = opened(proxy, path=str(text), select="all", continuation_tokens=5, template="<{context}>")
    found = [task.train.row(i) for i in range(task.train.size or 0)]
    contexts = {str(row.prompt)[1:-1]: row.answer for row in found}
    assert all(context + answer in TEXT and 1 <= len(answer) <= 5 for context, answer in contexts.items())
    assert all(row.columns["boundaries"] == list(range(1, len(row.answer) + 1)) for row in found), (
        "characters are tokens"
    )
    parts = -(-len(TEXT) // 64)
    held_out = {str(task.held_out.row(i).prompt) for i in range(task.held_out.size or 0)}
    assert not held_out & {str(row.prompt) for row in found}
    total = len(found) + len(held_out) + task.counters["dropped_overlapping_rows"]
    assert total == len(TEXT) - parts, "every token but the first of a part"


def test_positions_are_those_above_the_threshold_by_the_proxys_own_logits(proxy: NativeProxy, text: Path) -> None:
    entropies = _entropies(proxy, text)
    threshold = float(np.median(entropies))
    task = opened(proxy, path=str(text), threshold=threshold, held_out_threshold=0.0)
    chosen = [task.train.row(i).columns["token_entropy"] for i in range(task.train.size or 0)]
    assert min(chosen) > threshold
    held_out = [task.held_out.row(i).columns["token_entropy"] for i in range(task.held_out.size or 0)]
    dropped = task.counters["dropped_overlapping_rows"]
    above = sum(entropy > threshold for entropy in entropies) - sum(entropy > threshold for entropy in held_out)
    assert len(chosen) + dropped == above
    half = opened(proxy, path=str(text), select="random", random_share=0.5)
    every = opened(proxy, path=str(text), select="all")
    assert 0.4 < (half.train.size or 0) / (every.train.size or 1) < 0.6


def _entropies(proxy: NativeProxy, text: Path) -> list[float]:
    """Of all positions, from the model's complete distributions."""
    model, found = load_model(proxy.path, torch.float32), []
    for begin in range(0, len(TEXT), 64):
        ids = proxy.tokens(TEXT[begin : begin + 64]).ids
        batch = collate([SequenceGroup([], [[*ids, 0]])])
        with torch.no_grad():
            states = model.hidden(
                batch.tokens, batch.positions, PackedAttention(batch.layout, torch.device("cpu"))
            ).states
            top = model.logits(states)[:-1].double().topk(16).values.log_softmax(-1)
        found += (-(top.exp() * top).sum(-1)).tolist()
    return found


def test_questions_with_answers_are_predicted_in_the_answer_alone(proxy: NativeProxy, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": f"{n} + 1", "a": str(n + 1)}) + "\n" for n in range(100, 140)))
    columns = {"question": "q", "answer": "a"}
    task = opened(proxy, path=str(path), columns=columns, separator="=", select="all", template="{context}")
    prompts = {str(task.train.row(i).prompt) for i in range(task.train.size or 0)}
    assert all(len(prompt.partition("=")[2]) < 3 for prompt in prompts) and all("=" in prompt for prompt in prompts)
    sums = opened(proxy, **ON_SUMS, select="all")
    first = sums.train.row(0)
    assert str(first.prompt).endswith("=?") and first.answer == str(eval(str(first.prompt)[:-2]))
    assert first.columns["plain_logprob"] < 0


def test_no_context_and_no_boundary_is_inside_a_character(smollm2: Path, tmp_path: Path) -> None:
    """With the tokenizer of a real model, whose tokens are bytes; a character may be several of them."""
    shape = tmp_path / "shape"
    shape.mkdir()
    for file in smollm2.glob("tokenizer*"):
        shutil.copy(file, shape)
    config = replace(LlamaConfig.tiny(), vocab_size=49152, hidden_size=16, intermediate_size=16)
    (shape / "config.json").write_text(json.dumps(config.to_hf()))
    save_model(shape, disk_tensors(new_model(shape, torch.float32)), tmp_path / "model")
    text = " ".join(f"Zeile {n}: \u4f60\u597d \U0001f9ec\U0001f1e9\U0001f1ea {n}é\u0f40." for n in range(20))
    (tmp_path / "text.txt").write_text(text)
    proxy = open_proxy(tmp_path / "model", tmp_path / "model", 1)
    task = opened(proxy, path=str(tmp_path / "text.txt"), select="all", template="{context}", continuation_tokens=6)
    found = [task.train.row(i) for i in range(task.train.size or 0)]
    assert len(found) > 100
    for row in found:
        assert str(row.prompt) + row.answer in text
        parts = [row.answer.encode()[:end].decode() for end in row.columns["boundaries"]]
        assert all(
            reward(f"</think>\\boxed{{{part}}}", row.answer, Reward(), row.columns["boundaries"]) for part in parts
        )
    assert any(row.answer.startswith(" ") for row in found), "the leading space is kept"
    assert any(row.columns["boundaries"][0] > 3 for row in found), "a character of several tokens comes first"


def test_a_masked_span_is_shown_as_a_gap(proxy: NativeProxy, text: Path) -> None:
    task = opened(proxy, path=str(text), predict="masked_span", span_tokens=3, select="all", template="{context}")
    row = task.train.row(5)
    before, _, behind = str(row.prompt).partition("[MASK]")
    assert before + row.answer + behind in TEXT and len(row.answer) == 3 and row.columns["boundaries"] == [3]
    assert "plain_logprob" not in row.columns and "next_id" not in task.held_out.row(0).columns


def test_no_position_above_the_threshold_is_told_with_the_entropies(proxy: NativeProxy, text: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"no position of the training text is chosen; .*\d+ positions in nats: .*% above 0.5, .*100% up to .*Low",
    ):
        opened(proxy, path=str(text), threshold=5.0)
    with pytest.raises(DataError, match="no position of the held-out text"):
        opened(proxy, path=str(text), held_out_threshold=5.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either `path` or `task`"),
        ({"path": "a.txt", "task": SUMS}, "either `path` or `task`"),
        ({"path": "a.txt", "template": "predict!"}, "v0, v6, gap, or contain {context}"),
        ({"task": {"name": "arithmetik"}}, "did you mean arithmetic"),
        ({"path": "a.txt", "select": "random", "threshold": 2.0}, "`threshold` is read with `select: entropy` only"),
        ({"path": "a.txt", "span_tokens": 9}, "`span_tokens` is read with `predict: masked_span` only"),
        ({"path": "a.txt", "select": "hard"}, "'entropy', 'random' or 'all'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next_token_reasoning.Config(**options)


def test_unusable_text_and_scores_of_another_text_are_refused(proxy: NativeProxy, tmp_path: Path, text: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        opened(proxy, path=str(tmp_path / "missing.txt"))
    short = tmp_path / "short.txt"
    short.write_text("ab")
    with pytest.raises(DataError, match="1 distinct questions cannot be split"):
        opened(proxy, path=str(short))
    file = tmp_path / "scores.safetensors"
    opened(proxy, path=str(text), scores_file=file)
    text.write_text(TEXT + "more.\n")
    with pytest.raises(ValueError, match="scores.safetensors was made with another text"):
        opened(proxy, path=str(text), scores_file=file)
    with pytest.raises(DataError, match="needs the tokenizer of a run"):
        next_token_reasoning.load(next_token_reasoning.Config(path=str(text)), 0, MalformedRows())


def test_a_proxy_with_another_tokenizer_is_refused(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="another tokenizer than the model that is trained: it reads 'line 0"):
        opened(open_proxy(other, tiny_model, 1), path=str(text))
    assert opened(open_proxy(tiny_model, tiny_model, 1), path=str(text)).train.size


def test_scores_are_computed_once(proxy: NativeProxy, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(proxy, path=str(text))
    monkeypatch.setattr("rollout.proxy.load_model", None)
    again = opened(proxy, path=str(text))
    assert [first.train.row(i) for i in range(9)] == [again.train.row(i) for i in range(9)]


def with_task(runs: Runs, **options: Any) -> None:
    runs.values["data"]["task"] = {"name": "next_token_reasoning", **ON_SUMS, "threshold": 0.0, **options}
    runs.values["data"]["chat_template"] = "none"
    del runs.values["data"]["system_prompt"]
    runs.values["data"]["eval_size"] = 8
    runs.values["eval"]["at_start"] = True


def test_a_run_measures_held_out_positions_by_difficulty_and_resumes_exactly(runs: Runs) -> None:
    with_task(runs)
    runs.values["rewards"] = [{"name": "next_token"}, *runs.values["rewards"]]
    run = runs.train()
    first, last = rows(run)[0], rows(run)[-1]
    assert first["step"] == 0 and first["eval/problems"] == 8 == first["eval/positions_easy"]
    assert first["eval/accuracy_easy"] == first["eval/accuracy"]
    assert set(first) >= {f"eval/{name}" for name in ("argmax", *(f"argmax_{d}" for d in DIFFICULTIES))}
    assert first["eval/argmax"] == _own_argmax(runs)
    assert last["step"] == 3 and last["reward/next_token"] == 0.0 and last["learner/grad_norm"] > 0
    half = runs.train("steps=2", "name=half")
    assert_equal_runs(runs.train("name=half", resume=half), run, 3)


def _own_argmax(runs: Runs) -> float:
    """By the learner's model, from the plain text alone."""
    components = RunComponents(runs.config())
    model = load_model(components.model_path, torch.float32)
    hits = []
    for problem in components.prompts.held_out(8):
        context = str(problem.prompt).removesuffix("?")
        ids = components.renderer.encode(context)
        vocab = len(components.renderer.tokenizer)
        batch = collate([SequenceGroup(ids, [[token] for token in range(vocab)])])
        with torch.no_grad():
            best = int(model(batch).logprobs.argmax())
        hits.append(components.renderer.encode(problem.answer)[0] == best)
    return sum(hits) / len(hits)


def test_a_recipe_measures_all_models_on_the_same_positions(runs: Runs, tiny_model: Path) -> None:
    with_task(runs)
    runs.values["rewards"] = [{"name": "next_token"}, *runs.values["rewards"]]
    run, config = runs.train("steps=2", "eval.every=0"), runs.config()
    measured = measure(Trained(0, tiny_model, {"RPT": config}, {"RPT": run}))
    assert set(measured) == labels(["RPT"]) and len(measured) == 4
    hard = [rows[-1] for rows in measured.values()]
    assert {(row["step"], row["entropy above"]) for row in hard} == {(1.5, 1.5)}
    assert measured["start model, argmax"][0]["hit rate"] == _own_argmax(runs)
    assert measured["start model, argmax"][0]["GFLOP"] == 0
    logged = JsonLines(run / "metrics.jsonl").read()
    weights = sum(parameter.numel() for parameter in load_model(tiny_model, torch.float32).parameters())
    work = sum(weights * (2 * row["rollout/tokens"] + 6 * row["learner/tokens"]) for row in logged) / 1e9
    assert measured["RPT, thinking"][0]["GFLOP"] == pytest.approx(work)


def test_the_likelihood_of_the_text_behind_a_thought_is_a_reward(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """RLP: the log-probs are those of the learner's own model, and the baseline changes no advantage."""
    with_task(runs)
    runs.values["rewards"] = [{"name": "likelihood_gain"}]
    runs.values["eval"]["threshold"] = 0.0
    with pytest.raises(ValueError, match="answer_logprobs"):
        runs.config()
    runs.values["rollout"]["answer_logprobs"] = {"after": "e", "before": " so "}
    seen: list[tuple[list[int], int, float]] = []
    add = AnswerScorer.add

    def noting(self: AnswerScorer, items: Any, pairs: Any, logprobs: Any) -> Any:
        made = add(self, items, pairs, logprobs)
        seen.extend(
            (*self.sequence(*pair), item.columns["answer_logprob"]) for pair, item in zip(pairs, made, strict=True)
        )
        return made

    monkeypatch.setattr(AnswerScorer, "add", noting)
    run = runs.train("steps=1", "optimizer.warmup_steps=0", "eval.every=0")
    assert rows(run)[-1]["reward/likelihood_gain"] < 0 < rows(run)[-1]["learner/grad_norm"]
    model = load_model(runs.values["model"]["path"], torch.float32)
    assert len(seen) == 16
    for ids, count, logprob in seen:
        with torch.no_grad():
            known = model(collate([SequenceGroup(ids[:-count], [ids[-count:]])])).logprobs.sum()
        assert float(known) == pytest.approx(logprob, abs=1e-4)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_the_baseline_of_a_position_changes_no_advantage(name: str) -> None:
    """So the gradient of RLP is the same with the frozen proxy as with a moving average of the policy."""

    def advantages(plain: float) -> list[list[float]]:
        completions = [Completion([1, 2], [-1.0, -1.0], "", "stop", 0) for _ in range(4)]
        config, logprobs = likelihood_gain.Config(), (-1.0, -2.5, -0.3, -4.0)
        gains = [likelihood_gain.reward(config, logprob, 1, plain) for logprob in logprobs]
        group = Group(Problem("a", "a", [1], "a"), completions, [Score(gain) for gain in gains])
        [made], _ = make_sequence_groups([group], resolve(name), 8)
        return made.token_fields["advantages"]

    assert np.allclose(advantages(-2.0), advantages(0.0), atol=1e-9) and np.std(advantages(0.0)) > 0.1


def test_a_thought_ends_at_its_first_mark(runs: Runs, tiny_model: Path) -> None:
    with_task(runs)
    runs.values["rewards"] = [{"name": "next_token"}]
    runs.values["rollout"]["answer_logprobs"] = {"before": "\\boxed{"}
    components = RunComponents(runs.config())
    problem = components.prompts.take(1)[0]
    scorer = AnswerScorer(components.config.rollout.answer_logprobs, components.renderer)  # type: ignore[arg-type]
    encode, decode = components.renderer.encode, components.renderer.decode
    for text, thought in (("hm</think>\\boxed{1}</think>", "hm</think>"), ("hm", "hm</think>"), ("", "</think>")):
        completion = Completion([*encode(text), 1], [0.0] * (len(text) + 1), text, "stop", 0)
        ids, count = scorer.sequence(problem, completion)
        assert decode(ids) == f"{problem.prompt}{thought}\\boxed{{{problem.answer}" and count == len(problem.answer)


def test_groups_without_a_correct_completion_have_no_advantage(runs: Runs) -> None:
    with_task(runs)
    runs.values["rewards"] = [{"name": "next_token", "weight": 0.0}, *runs.values["rewards"]]
    runs.values["batch"]["equalize_wrong_groups"] = True
    metrics = rows(runs.train("steps=1", "optimizer.warmup_steps=0", "eval.every=0"))[-1]
    assert metrics["reward/zero_std_group_share"] == 1.0 and metrics["reward/mean"] == 0.0
    assert metrics["reward/low_characters"] > 0


def test_dynamic_sampling_begins_at_its_step(runs: Runs) -> None:
    runs.values["algorithm"] = {"name": "grpo", "beta": 0.0, "dynamic_sampling": True}
    runs.values["batch"]["dynamic_sampling_from"] = 2
    logged = [row for row in rows(runs.train("eval.every=0")) if row["step"]]
    assert ["rollout/rounds" in row for row in logged] == [False, True, True]
    runs.values["algorithm"] = {"name": "grpo", "beta": 0.0}
    with pytest.raises(ValueError, match="there is no dynamic sampling"):
        runs.config()


def test_the_command_shows_text_with_its_entropies(runs: Runs, text: Path) -> None:
    with_task(runs)
    runs.values["data"]["task"] = {"name": "next_token_reasoning", "path": str(text), "document_tokens": 64}
    result = CliRunner().invoke(app, ["positions", str(runs.write()), "--texts", "1", "--table"])
    assert result.exit_code == 0, result.output
    assert "line 0: 0 times 0 is 0" in result.output and "held-out text: entropies of the" in result.output
    runs.values["data"]["task"] = SUMS
    refused = CliRunner().invoke(app, ["positions", str(runs.write())])
    assert "only the task next_token_reasoning has positions; data.task is arithmetic" in str(refused.exception)
