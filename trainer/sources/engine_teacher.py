"""A teacher that an inference engine holds: it scores the sampled completions, so the learners hold no teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmquest_rl.batch import SequenceGroup
from rollout.worker import RolloutWorker
from trainer.cluster.worker_group import WorkerGroup
from trainer.sources.rollouts import engine_logprobs

TEACHER = "teacher"
"""Name of the worker group, in logs and error messages."""


@dataclass(frozen=True)
class EngineTeacher:
    """The workers whose engines hold the teacher."""

    workers: WorkerGroup[RolloutWorker]
    timeout_s: float
    """Time limit for the scores of a step, in seconds."""

    def score(self, groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        """The groups with the token field `ref_logprobs`: the teacher's log-prob of every token at temperature 1.

        Raises:
            ClusterError: the engine does not answer within the time limit, or dies too often.
            ValueError: a group has images, which engines do not score.
        """
        if any(group.images is not None for group in groups):
            raise ValueError("an engine scores text only: for prompts with images set objective.scored_by: learners")
        prompts = [group.prompt if group.reference_prompt is None else group.reference_prompt for group in groups]
        sequences = [
            prompt + completion
            for prompt, group in zip(prompts, groups, strict=True)
            for completion in group.completions
        ]
        found = iter(engine_logprobs(self.workers, sequences, self.timeout_s))
        return [
            group.with_token_field("ref_logprobs", [next(found)[len(prompt) - 1 :] for _ in group.completions])
            for prompt, group in zip(prompts, groups, strict=True)
        ]
