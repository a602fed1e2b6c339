"""Self-test of `doctor` with a tiny model: samples, grades, learns and syncs the weights, in a few seconds."""

import json
import math
from pathlib import Path

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.algorithms.sequence_groups import make_sequence_groups
from llmquest_rl.models.llama import LlamaConfig
from llmquest_rl.objectives import policy
from llmquest_rl.types import Completion, Group, Problem, Request, Sampling, Score
from rewards.config import GraderConfig, RewardConfig
from rewards.grader import Grader
from rewards.types import GradeItem
from rollout.engine import EngineSetup, RolloutEngine, engine_config, open_engine
from trainer.config.schema import LearnerConfig, OptimizerConfig
from trainer.learner.learner import Learner
from trainer.learner.setup import LearnerSetup

PROMPT = [5, 6, 7, 8]
SAMPLES = 8
SAMPLING = Sampling(max_tokens=8)
LARGEST_GAP = 1e-3
"""Maximum difference between log-probs of engine and learner with equal float32 weights, in nats per token."""


def generate_and_learn(folder: Path) -> str:
    """Sample with the native engine, take one GRPO step, and load the new weights into the engine.

    Raises:
        RuntimeError: the log-probs of engine and learner differ, or the gradient is zero or not finite.
    """
    write_tiny_model(folder)
    engine_setup = EngineSetup(context_tokens=32, max_sequences=SAMPLES)
    engine = open_engine("native", engine_config("native")(), folder, engine_setup)
    algorithm = resolve("grpo", {"beta": 0.0})
    objective = policy.build(policy.Config(), algorithm, SAMPLING)
    setup = LearnerSetup(
        model_path=folder,
        objective=objective,
        optimizer=OptimizerConfig(lr=1e-2),
        learner=LearnerConfig(),
        total_updates=1,
        tokens_per_microbatch=1024,
        folder=folder,
        init="random",
    )
    learner = Learner(setup)
    try:
        engine.load_weights(learner.weights(), 1)
        sequence_groups, _ = make_sequence_groups([_graded(engine)], algorithm, SAMPLING.max_tokens)
        metrics = learner.update([objective.assign_token_weights(sequence_groups)], 1)
        engine.load_weights(learner.weights(), 2)
    finally:
        learner.close()
        engine.close()
    gap, norm = metrics["policy/logp_gap"], metrics["learner/grad_norm"]
    if gap > LARGEST_GAP or not math.isfinite(norm) or norm == 0:
        raise RuntimeError(
            f"the log-probs of engine and learner differ by {gap:.2g} nats per token (limit: {LARGEST_GAP:g}), and "
            f"the gradient norm is {norm:.3g} (it must be finite and above 0)"
        )
    return f"engine and learner agree to {gap:.1e} nats per token, gradient norm {norm:.2f}"


def write_tiny_model(folder: Path) -> None:
    """Write config.json of a tiny Llama, without weights or tokenizer."""
    values = {**LlamaConfig.tiny().to_hf(), "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(values))


def _graded(engine: RolloutEngine) -> Group:
    """Completions of one prompt; the reward is the fraction of even tokens, so that it differs between them."""
    completions = engine.generate([Request(PROMPT, SAMPLES, seed=0)], SAMPLING)[0]
    return Group(Problem("self-test", "", PROMPT, None), completions, [Score(_even_fraction(c)) for c in completions])


def _even_fraction(completion: Completion) -> float:
    return sum(token % 2 == 0 for token in completion.token_ids) / max(1, len(completion.token_ids))


def grade_one() -> str:
    """Grade a right and a wrong answer in a real worker process.

    Raises:
        RuntimeError: the scores are not 1 and 0.
    """
    with Grader([RewardConfig(name="exact_number", function="exact_number")], GraderConfig(processes=1)) as grader:
        scores = grader.grade([GradeItem("1 + 1", "2", "2", {}), GradeItem("1 + 1", "3", "2", {})])
    if [score.value for score in scores] != [1.0, 0.0]:
        raise RuntimeError(f"the answers 2 and 3 to 1 + 1 must have the scores 1 and 0, but have {scores}")
    return "a worker process graded a right answer 1 and a wrong answer 0"
