"""`train --dry-run`: everything that can be wrong is looked at, without loading weights or starting Ray."""

from collections.abc import Callable, Iterator

from llmquest_rl.data.check import DataCheck, check_dataset, check_task
from llmquest_rl.types import Completion, Problem, Score
from rewards.grader import Grader
from rewards.types import GradeItem
from rollout.engine import check_engine
from trainer.cli.check_result import Finding
from trainer.components import RunComponents
from trainer.config.schema import Config
from trainer.run.tracking import check_trackers
from trainer.sources.eval_metrics import is_correct
from trainer.sources.generate_and_grade import grade_item
from trainer.sources.reward_model_worker import check_reward_model

GRADED_ROWS = 10
MEASURED_ROWS = 200
GOLD_FORMS = ("ANSWER", "\\boxed{ANSWER}", "<answer>ANSWER</answer>")
"""How a right completion may end: rewards differ in the mark that they want."""


def dry_run(config: Config) -> Iterator[Finding]:
    """Check one thing after the other, from the cheapest to the dearest.

    Raises:
        ValueError: something without which the run cannot start; says what and where.
    """
    parts = RunComponents(config)
    yield _trackers(parts)
    yield _model_files(parts)
    yield _tokenizer(parts)
    for check in CHECKS[parts.objective.source]:
        yield check(parts)


def _trackers(parts: RunComponents) -> Finding:
    check_trackers(parts.config.tracking.trackers)
    return Finding("trackers", ", ".join(["metrics.jsonl", *parts.config.tracking.trackers]))


def _model_files(parts: RunComponents) -> Finding:
    parts.check_model()
    parts.check_experts()
    if parts.config.model.init == "random":
        return Finding("model", f"{parts.model_path}: config.json only, weights are drawn at random")
    return Finding("model", f"{parts.model_path}: every tensor is there, in its right shape")


def _tokenizer(parts: RunComponents) -> Finding:
    renderer = parts.texts
    if renderer is None:
        return Finding("tokenizer", "none: the model reads images alone")
    template = "with a chat template" if renderer.template else "without a chat template: prompts as they are"
    return Finding("tokenizer", f"{len(renderer.tokenizer):,} tokens, {template}")


def _engine(parts: RunComponents) -> Finding:
    section, setup = parts.config.rollout.engine, parts.engine_setup
    check_engine(section.name, section.options, parts.model_path, setup)
    text = f"{section.name}, {setup.context_tokens} tokens of context, {setup.dtype} ({setup.dtype_reason})"
    return Finding("engine", text)


def _prompts(parts: RunComponents) -> Finding:
    data = parts.config.data
    _, check = check_task(parts.prompts, parts.renderer, MEASURED_ROWS)
    held_out = len(parts.prompts.held_out(data.eval_size))
    text = f"{_describe(check)} (allowed: {data.max_prompt_tokens}); {held_out} held out"
    return Finding("prompts", text, passed=held_out > 0 or data.eval_size == 0)


def _sequences(parts: RunComponents) -> Finding:
    data = parts.config.data
    _, check = check_dataset(parts.sequences, MEASURED_ROWS)
    held_out = len(parts.sequences.validation(data.eval_size))
    text = f"{_describe(check)} (allowed: {parts.config.batch.tokens_per_sequence}); {held_out} for validation"
    return Finding("sequences", text, passed=held_out > 0 or data.eval_size == 0)


def _describe(check: DataCheck) -> str:
    lengths = check.lengths
    left_out = ", ".join(f"{count} {cause}" for cause, count in check.counters.items() if count) or "none left out"
    return f"{left_out}; {lengths.shortest} to {lengths.longest} tokens, {lengths.mean:.0f} on average"


def _gold_answers(parts: RunComponents) -> Finding:
    """The gold answers of ten rows, given as completions, through the real graders: one form must be correct."""
    config = parts.config
    if not config.rewards:
        return Finding("rewards", "none: reward models alone judge")
    problems, _ = check_task(parts.prompts, parts.renderer, GRADED_ROWS)
    with Grader(config.rewards, config.graders) as grader:
        grader.check(problems[0].columns)
        scores = grader.grade([_as_completion(problem, form, parts) for problem in problems for form in GOLD_FORMS])
    judge, threshold = config.correct_if
    if judge not in {reward.name for reward in config.rewards}:
        return Finding("rewards", f"their arguments are there; the reward model {judge} decides what is correct")
    best = [
        max(scores[i : i + len(GOLD_FORMS)], key=lambda score: is_correct(score, judge, threshold))
        for i in range(0, len(scores), len(GOLD_FORMS))
    ]
    wrong = [
        f"{problem.id}: the answer {problem.answer!r} gave {_explain(score)}"
        for problem, score in zip(problems, best, strict=True)
        if not is_correct(score, judge, threshold)
    ]
    if wrong:
        text = f"{judge}: the gold answers of {len(wrong)} in {len(problems)} rows do NOT score as correct: {wrong[0]}"
        return Finding("rewards", text, passed=False)
    text = f"{judge}: the gold answers of {len(problems)} rows score as correct, e.g. {_explain(best[0])}"
    return Finding("rewards", text)


def _reward_models(parts: RunComponents) -> Finding:
    for setup in parts.reward_model_setups:
        check_reward_model(setup)
    found = [f"{setup.config.name}: {setup.model_path}, {setup.dtype}" for setup in parts.reward_model_setups]
    return Finding("reward models", "; ".join(found) or "none")


def _as_completion(problem: Problem, form: str, parts: RunComponents) -> GradeItem:
    text = form.replace("ANSWER", str(problem.answer))
    token_ids = parts.renderer.encode(text)
    return grade_item(problem, Completion(token_ids, [0.0] * len(token_ids), text, "stop", 0))


def _explain(score: Score) -> str:
    parts = ", ".join(f"{name} {value}" for name, value in score.parts.items())
    return f"{score.failure}: {score.detail}" if score.failure else f"{parts}; total {score.value}"


CHECKS: dict[str, tuple[Callable[[RunComponents], Finding], ...]] = {
    "rollout": (_prompts, _engine, _gold_answers, _reward_models),
    "dataset": (_sequences,),
}
"""By where the objective's batches come from."""
