"""`train --dry-run`: checks the inputs of a run without loading weights or starting Ray."""

from collections.abc import Callable, Iterator

from llmquest_rl.data.check import DataCheck, check_dataset, check_task
from llmquest_rl.types import Completion, Problem, Score
from rewards.grader import Grader
from rewards.types import GradeItem
from rollout.engine import check_engine
from trainer.cli.check_result import CheckResult
from trainer.components import RunComponents
from trainer.config.schema import Config
from trainer.run.tracking import check_trackers
from trainer.sources.eval_metrics import is_correct
from trainer.sources.reward_model_worker import check_reward_model
from trainer.sources.rollouts import grade_item

GRADED_ROWS = 10
"""Number of rows whose gold answers are graded."""
MEASURED_ROWS = 200
"""Number of rows whose lengths are measured."""
SHOWN = 200
"""Characters of each text of an example."""
GOLD_FORMS = ("ANSWER", "\\boxed{ANSWER}", "<answer>ANSWER</answer>", "</think>\\boxed{ANSWER}")
"""Forms of a correct completion, because rewards expect different formats."""


def dry_run(config: Config) -> Iterator[CheckResult]:
    """Run the checks in order of their cost, cheapest first.

    Raises:
        ValueError: the run cannot start; the message names the option or file.
    """
    components = RunComponents(config)
    yield _trackers(components)
    yield _model_files(components)
    yield _tokenizer(components)
    for check in CHECKS[components.objective.source]:
        yield check(components)


def _trackers(components: RunComponents) -> CheckResult:
    check_trackers(components.config.tracking.trackers)
    return CheckResult("trackers", ", ".join(["metrics.jsonl", *components.config.tracking.trackers]))


def _model_files(components: RunComponents) -> CheckResult:
    components.check_model()
    components.check_experts()
    if components.config.model.init == "random":
        return CheckResult("model", f"{components.model_path}: config.json only, weights are random")
    return CheckResult("model", f"{components.model_path}: all tensors are present and have the right shape")


def _tokenizer(components: RunComponents) -> CheckResult:
    renderer = components.texts
    if renderer is None:
        return CheckResult("tokenizer", "none: the model reads only images")
    template = "with a chat template" if renderer.template else "no chat template: prompts stay plain text"
    return CheckResult("tokenizer", f"{len(renderer.tokenizer):,} tokens, {template}")


def _engine(components: RunComponents) -> CheckResult:
    section, setup = components.config.rollout.engine, components.engine_setup
    check_engine(section.name, section.options, components.model_path, setup)
    text = f"{section.name}, context of {setup.context_tokens} tokens, {setup.dtype} ({setup.dtype_reason})"
    return CheckResult("engine", text)


def _prompts(components: RunComponents) -> CheckResult:
    data = components.config.data
    _, check = check_task(components.prompts, MEASURED_ROWS)
    held_out = len(components.prompts.held_out(data.eval_size))
    text = f"{_describe(check)} (limit: {data.max_prompt_tokens}); {held_out} held out"
    return CheckResult("prompts", text, passed=held_out > 0 or data.eval_size == 0)


def _sequences(components: RunComponents) -> CheckResult:
    data = components.config.data
    _, check = check_dataset(components.sequences, MEASURED_ROWS)
    held_out = len(components.sequences.validation(data.eval_size))
    text = f"{_describe(check)} (limit: {components.config.batch.tokens_per_sequence}); {held_out} for validation"
    return CheckResult("sequences", text, passed=held_out > 0 or data.eval_size == 0)


def _example(components: RunComponents) -> CheckResult:
    """The first sequence as the model sees it, with the texts that it learns."""
    renderer = components.texts
    if renderer is None:
        return CheckResult("example", "none: the model reads only images")
    [group], _ = check_dataset(components.sequences, 1)
    lines = [f"{len(group.prompt)} tokens of prompt, which end {renderer.decode(group.prompt)[-SHOWN:]!r}"]
    for ids, mask in zip(group.completions, group.targets, strict=True):
        lines.append(f"{sum(mask)} of {len(ids)} tokens are targets: {renderer.decode(ids)[:SHOWN]!r}")
    return CheckResult("example", "\n    ".join(lines))


def _describe(check: DataCheck) -> str:
    lengths = check.lengths
    dropped = ", ".join(f"{count} {cause}" for cause, count in check.counters.items() if count) or "none dropped"
    return f"{dropped}; {lengths.shortest} to {lengths.longest} tokens, {lengths.mean:.0f} on average"


def _gold_answers(components: RunComponents) -> CheckResult:
    """Grade the gold answers of a few rows with the real graders; one form of each must count as correct."""
    config = components.config
    if not config.rewards:
        return CheckResult("rewards", "none: only reward models score completions")
    problems, _ = check_task(components.prompts, GRADED_ROWS)
    with Grader(config.rewards, config.graders) as grader:
        grader.check(problems[0].columns)
        scores = grader.grade(
            [_as_completion(problem, form, components) for problem in problems for form in GOLD_FORMS]
        )
    deciding, threshold = config.correct_if
    if deciding not in {reward.name for reward in config.rewards}:
        return CheckResult("rewards", f"their arguments are available; the reward model {deciding} decides correctness")
    best = [
        max(scores[i : i + len(GOLD_FORMS)], key=lambda score: is_correct(score, deciding, threshold))
        for i in range(0, len(scores), len(GOLD_FORMS))
    ]
    wrong = [
        f"{problem.id}: the answer {problem.answer!r} gives {_explain(score)}"
        for problem, score in zip(problems, best, strict=True)
        if not is_correct(score, deciding, threshold)
    ]
    if wrong:
        counts = f"{len(wrong)} of {len(problems)}"
        text = f"{deciding}: the gold answers of {counts} rows do NOT score as correct, so check the reward: {wrong[0]}"
        return CheckResult("rewards", text, passed=False)
    text = f"{deciding}: the gold answers of {len(problems)} rows score as correct, e.g. {_explain(best[0])}"
    return CheckResult("rewards", text)


def _reward_models(components: RunComponents) -> CheckResult:
    for setup in components.reward_model_setups:
        check_reward_model(setup)
    found = [f"{setup.config.name}: {setup.model_path}, {setup.dtype}" for setup in components.reward_model_setups]
    return CheckResult("reward models", "; ".join(found) or "none")


def _as_completion(problem: Problem, form: str, components: RunComponents) -> GradeItem:
    text = form.replace("ANSWER", str(problem.answer))
    token_ids = components.renderer.encode(text)
    return grade_item(problem, Completion(token_ids, [0.0] * len(token_ids), text, "stop", 0))


def _explain(score: Score) -> str:
    rewards = ", ".join(f"{name} {value}" for name, value in score.parts.items())
    return f"{score.failure}: {score.detail}" if score.failure else f"{rewards}; total {score.value}"


CHECKS: dict[str, tuple[Callable[[RunComponents], CheckResult], ...]] = {
    "rollout": (_prompts, _engine, _gold_answers, _reward_models),
    "dataset": (_sequences, _example),
}
"""Further checks by the source of the objective's batches."""
