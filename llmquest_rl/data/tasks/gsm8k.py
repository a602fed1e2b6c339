"""GSM8K, grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168): `table` with GSM8K's columns and answers."""

from llmquest_rl.data.rows import MalformedRows
from llmquest_rl.data.task import Task
from llmquest_rl.data.tasks import table


class Config(table.Config):
    """The options of `table`; by default the Hub's split `train` is trained on and `test` is evaluated."""

    path: str = "openai/gsm8k"
    """A Hub id, or a file with the rows to train on."""
    subset: str | None = "main"
    """Hub only: the data set's configuration name."""
    held_out_split: str | None = "test"
    """Hub only: the split to evaluate on. For files give `held_out_path`."""
    columns: table.Columns = table.Columns(prompt="question", answer="answer")
    """The column mapping."""
    template: str = "{prompt}\nThink step by step, then give the final number in \\boxed{}."
    """The prompt; `{prompt}` is the question."""
    answer_after: str | None = "####"
    """GSM8K writes the number after its worked solution and this mark."""
    answer_remove: str = ","
    """Characters taken out of the gold answer: thousands separators."""


def load(config: Config, seed: int, malformed: MalformedRows) -> Task:
    """Open the task; see `table.read_task`."""
    return table.read_task("gsm8k", config, seed, malformed)
