"""Log-probs of gold answers after sampled thoughts, for rewards without a verifier.

The engine that samples also scores: it has the current policy's weights. A thought is the completion up to a mark, and
the gold answer follows it (RLP, arXiv 2510.01265).
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llmquest_rl.data.tokenizer import PromptRenderer
from llmquest_rl.types import Completion, Problem
from rewards.types import GradeItem
from trainer.config.schema import AnswerLogprobs

Logprobs = Callable[[Sequence[list[int]]], list[list[float]]]
"""Log-prob of each token of sequences given those before it: `[sequences][len - 1]`."""


@dataclass(frozen=True, slots=True)
class AnswerScorer:
    """Makes the sequences of thoughts and answers, and reads the answers' log-probs."""

    options: AnswerLogprobs
    renderer: PromptRenderer

    def add(
        self, items: Sequence[GradeItem], pairs: Sequence[tuple[Problem, Completion]], logprobs: Logprobs
    ) -> list[GradeItem]:
        """The items with the columns `answer_logprob` (in nats, summed over the answer) and `answer_tokens`.

        Args:
            items: One for each completion.
            pairs: The problem and the completion of each item.
            logprobs: Scores sequences with the engine.
        """
        sequences = [self.sequence(*pair) for pair in pairs]
        known = logprobs([ids for ids, _ in sequences])
        added = [
            {"answer_logprob": sum(values[len(values) - count :]), "answer_tokens": count}
            for values, (_, count) in zip(known, sequences, strict=True)
        ]
        return [replace(item, columns=item.columns | own) for item, own in zip(items, added, strict=True)]

    def sequence(self, problem: Problem, completion: Completion) -> tuple[list[int], int]:
        """Token ids of the prompt, the thought and the answer, and the number of the answer's tokens."""
        encode, options = self.renderer.encode, self.options
        thought, ended = self._thought(completion.token_ids)
        between = encode(("" if ended else options.after) + options.before)
        answer = encode(str(problem.answer))[: max(1, options.max_tokens - len(between))]
        return [*problem.prompt_ids, *thought, *between, *answer], len(answer)

    def _thought(self, ids: list[int]) -> tuple[list[int], bool]:
        """The sampled tokens up to the first mark that ends the thought, and whether there is one."""
        special = set(self.renderer.tokenizer.all_special_ids)
        kept = ids[:-1] if ids and ids[-1] in special else ids
        if self.options.after not in self.renderer.decode(kept):
            return kept, False
        return kept[: bisect_left(range(len(kept)), True, key=lambda stop: self._has_mark(kept[:stop]))], True

    def _has_mark(self, ids: list[int]) -> bool:
        return self.options.after in self.renderer.decode(ids)
