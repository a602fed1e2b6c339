"""Likelihood gain: a thought is worth what it adds to the log-prob of the true text (RLP, arXiv:2510.01265).

No verifier is needed. The baseline, the log-prob without a thought, is one number for each position, so it changes no
advantage that compares the thoughts of a position. RLP takes it from a moving average of the policy's weights, and this
reward from the proxy of the task next_token_reasoning, the start model: its value is the gain over that model.
"""

from llmquest_rl.options import Options


class Config(Options):
    """The scale of the gain."""

    per_token: bool = True
    """Divide by the number of the answer's tokens."""
    floor: float | None = None
    """Smallest gain in nats, after the division: a single very unlikely token would otherwise outweigh a whole group;
    null = none."""


def reward(
    config: Config,
    answer_logprob: float | None = None,
    answer_tokens: int = 1,
    plain_logprob: float = 0.0,
) -> float | None:
    """The gain in nats; None if the log-prob has not been computed (`rollout.answer_logprobs`).

    Args:
        config: The options.
        answer_logprob: Log-prob of the true text after the thought.
        answer_tokens: Number of its tokens.
        plain_logprob: Log-prob of the same text without a thought; 0 = the reward is the log-prob itself.
    """
    if answer_logprob is None:
        return None
    gain = (answer_logprob - plain_logprob) / (answer_tokens if config.per_token else 1)
    return gain if config.floor is None else max(gain, config.floor)


EXAMPLES: list[tuple[str, object, float]] = []
"""None: the value depends on columns, not on the text."""
