"""The configuration: accepted values, error messages, and that the dumped file is enough to repeat a run."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from trainer.config.load import ConfigError, dump, load_config, parse_config
from trainer.config.renamed_keys import RENAMED, RENAMED_METRICS
from trainer.config.rules import RULES, from_rollouts
from trainer.config.schema import Config
from trainer.config.sections import section_class
from trainer.config.sizes import sizes, sizes_table
from trainer.run.metric_table import METRICS

RL: dict[str, Any] = {
    "name": "a",
    "steps": 4,
    "data": {"task": {"name": "arithmetic"}},
    "rewards": [{"name": "exact_number"}],
    "algorithm": {"name": "grpo", "beta": 0.0},
}
SUPERVISED: dict[str, Any] = {
    "name": "a",
    "steps": 4,
    "objective": {"name": "next_token"},
    "data": {"dataset": {"name": "text"}},
}


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The values with one more key; sections on the way are copied."""
    first, _, rest = key.partition(".")
    return {**values, first: changed(values.get(first, {}), rest, value) if rest else value}


def problems_of(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "file.yaml")
    return caught.value.problems


def test_an_unknown_key_names_its_file_its_path_and_its_neighbours() -> None:
    assert problems_of(changed(RL, "optimizer.learning_rat", 1)) == [
        "file.yaml: optimizer.learning_rat: unknown key; there are: "
        "lr, betas, eps, weight_decay, max_grad_norm, schedule, warmup_steps, min_lr_ratio"
    ]
    assert problems_of(changed(RL, "optimizer.warmup_step", 1)) == [
        "file.yaml: optimizer.warmup_step: unknown key; did you mean warmup_steps?"
    ]
    assert problems_of({**RL, "modle": {}})[0].startswith("file.yaml: modle: unknown key; did you mean model")


def test_an_unknown_key_of_a_component_names_the_components_keys() -> None:
    assert problems_of(changed(RL, "data.task.digit", 3)) == [
        "file.yaml: data.task.digit: unknown key; did you mean digits?"
    ]


def test_an_unknown_component_names_its_neighbours() -> None:
    (problem,) = problems_of(changed(RL, "data.task.name", "arithmetics"))
    assert problem.startswith("file.yaml: data.task: 'arithmetics' is not the name of a task")
    assert "did you mean arithmetic?" in problem
    (problem,) = problems_of(changed(RL, "algorithm.name", "grpoo"))
    assert "grpo" in problem and problem.startswith("file.yaml: algorithm: ")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("steps", "twelve", "file.yaml: steps: expected an integer, found 'twelve'"),
        ("model", 3, "file.yaml: model: expected a section of keys, found 3"),
        ("model.dtype", "half", "file.yaml: model.dtype: expected 'auto', 'float32' or 'bfloat16', found 'half'"),
        ("batch.prompts_per_step", 0, "file.yaml: batch.prompts_per_step: expected greater than 0, found 0"),
        ("optimizer.lr", [1], "file.yaml: optimizer.lr: expected a number, found a list"),
        ("data.task.digits", "two", "file.yaml: data.task.digits: expected an integer, found 'two'"),
        (
            "rollout.sampling.top_p",
            1.5,
            "file.yaml: rollout.sampling.top_p: expected less than or equal to 1, found 1.5",
        ),
        ("cluster", "kubernetes", "file.yaml: cluster.kind: expected 'ray' or 'inline', found 'kubernetes'"),
    ],
)
def test_a_wrong_value_names_file_key_value_and_what_was_expected(key: str, value: Any, expected: str) -> None:
    assert problems_of(changed(RL, key, value)) == [expected]


def test_every_problem_is_listed_at_once() -> None:
    values = changed(changed(changed(RL, "steps", "x"), "model.typ", 1), "data.task.digits", "y")
    problems = problems_of({key: value for key, value in values.items() if key != "name"})
    assert [problem.split(": ")[1] for problem in problems] == ["name", "steps", "model.typ", "data.task.digits"]


def test_problems_name_the_file_that_the_value_came_from(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", changed(RL, "model.dtype", "half"))
    child = write(tmp_path / "child.yaml", {"inherit": "base.yaml", "optimizer": {"lr": "fast"}})
    with pytest.raises(ConfigError) as caught:
        load_config(child, ["batch.samples_per_prompt=none"])
    origins = {problem.split(": ")[1]: problem.split(": ")[0] for problem in caught.value.problems}
    assert origins == {
        "model.dtype": str(base),
        "optimizer.lr": str(child),
        "batch.samples_per_prompt": "command line",
    }


def test_inheritance_merges_sections_and_replaces_lists_and_other_components(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", changed(RL, "batch.prompts_per_step", 4))
    child = {
        "inherit": "base.yaml",
        "batch": {"samples_per_prompt": 2},
        "data": {"task": {"name": "reasoning_gym", "dataset": "chain_sum"}},
        "rewards": [{"name": "length", "target_tokens": 3}, {"name": "exact_number", "weight": 0.5}],
    }
    child["rewards"] = [{"name": "exact_number", "weight": 0.5}]
    config = load_config(write(tmp_path / "child.yaml", child))
    assert (config.batch.prompts_per_step, config.batch.samples_per_prompt) == (4, 2)
    assert config.data.task is not None and config.data.task.options.dataset == "chain_sum"
    assert [reward.weight for reward in config.rewards] == [0.5]


def test_only_one_level_of_inheritance(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"inherit": "base.yaml"})
    child = write(tmp_path / "b.yaml", {"inherit": "a.yaml"})
    with pytest.raises(ConfigError, match="only one level is allowed"):
        load_config(child)


def test_overrides_are_yaml_and_reach_list_items(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", RL)
    config = load_config(
        path,
        [
            "optimizer.lr=3e-6",
            "rewards.0.weight=0.25",
            "cluster=inline",
            "rollout.sampling.stop=[a, b]",
            "eval.reward=null",
        ],
    )
    assert config.optimizer.lr == 3e-6
    assert config.rewards[0].weight == 0.25
    assert config.cluster.kind == "inline"
    assert config.rollout.sampling.stop == ("a", "b")
    assert config.eval.reward is None


def test_overriding_a_components_name_drops_the_keys_of_the_old_one(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", changed(RL, "data.task.digits", 3))
    config = load_config(path, ["data.task.name=reasoning_gym", "data.task.dataset=chain_sum"])
    assert config.data.task is not None and config.data.task.name == "reasoning_gym"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "expected KEY=VALUE"),
        ("rewards.3.weight=1", "rewards.3 is neither a section nor an item of a list"),
        ("rewards.3=1", "the list has items 0 to 0, not 3"),
        ("steps.a=1", "steps is neither a section nor an item of a list"),
        ("steps=[1", "is not valid YAML"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match="command line: ") as caught:
        load_config(write(tmp_path / "c.yaml", RL), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "the key 'a' is given twice"),
        ("- 1", "expected lines of `key: value`, found a list"),
        ("a: [", "not a valid YAML file"),
    ],
)
def test_a_file_that_is_no_sound_yaml_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "quickstart.yaml", RL)
    with pytest.raises(ConfigError, match=r"did you mean .*quickstart\.yaml"):
        load_config(tmp_path / "quikstart.yaml")


ONE_SAMPLE = {"prompts_per_step": 1, "samples_per_prompt": 1}
WHITENED: dict[str, Any] = {**RL, "algorithm": {"name": "reinforce_pp"}}
REPLAYED = changed(changed(RL, "batch.epochs_per_step", 2), "algorithm.routing_replay", True)
REINFORCE = changed(RL, "algorithm.name", "reinforce")
UNBIASED = ("algorithm.kl_unbiased", True, "algorithm.kl_unbiased")
MASKED = ("algorithm.top_entropy_fraction", 0.2, "algorithm.top_entropy_fraction")
BROKEN = [
    (RL, "data.task", None, "data.task"),
    (SUPERVISED, "data.dataset", None, "data.dataset"),
    (RL, "rewards", [], "rewards"),
    (RL, "rewards", [{"name": "exact_number"}, {"name": "exact_number"}], "rewards"),
    (RL, "rewards", [{"name": "likelihood_gain"}], "rollout.answer_logprobs"),
    (RL, "reward_models", [{"name": "exact_number", "path": "judge"}], "reward_models"),
    (RL, "batch.samples_per_prompt", 1, "batch.samples_per_prompt"),
    (changed(RL, "algorithm.name", "dr_grpo"), "batch.samples_per_prompt", 1, "batch.samples_per_prompt"),
    (
        changed(REINFORCE, "batch.samples_per_prompt", 1),
        "algorithm.length_penalty",
        "relative",
        "algorithm.length_penalty",
    ),
    (REINFORCE, "algorithm.normalization", "valid_groups", "algorithm.normalization"),
    (WHITENED, "batch", ONE_SAMPLE, "batch.prompts_per_step"),
    (changed(RL, "algorithm.name", "pass_at_k"), "batch.samples_per_prompt", 4, "algorithm.pass_k"),
    (changed(RL, "algorithm.name", "reinforce"), "algorithm.dynamic_sampling", True, "algorithm.dynamic_sampling"),
    (RL, "batch.dynamic_sampling_from", 5, "batch.dynamic_sampling_from"),
    (RL, "algorithm.credit", "future_kl", "algorithm.credit"),
    (RL, "rewards", [{"name": "likelihood_gain"}], "rollout.answer_logprobs"),
    (changed(RL, "algorithm.name", "rloo"), "batch.minibatches_per_step", 2, "algorithm.surrogate"),
    (changed(RL, "algorithm.name", "opo"), "batch.epochs_per_step", 2, "algorithm.surrogate"),
    (changed(RL, "algorithm.name", "rloo"), "algorithm.old_policy", "engine", "algorithm.old_policy"),
    (changed(RL, "algorithm.beta", 0.1), "algorithm.kl", "k1", "algorithm.kl"),
    (RL, "algorithm.kl_unbiased", True, "algorithm.kl_unbiased"),
    (RL, "algorithm.credit", "future_kl", "algorithm.credit"),
    (changed(changed(RL, "algorithm.beta", 0.1), "algorithm.kl", "k2"), *UNBIASED),
    (changed(changed(RL, "algorithm.beta", 0.1), "algorithm.kl", "abs"), *UNBIASED),
    (RL, "algorithm.normalization", "batch_std", "algorithm.normalization"),
    *((changed(RL, "algorithm.name", name), *MASKED) for name in ("gspo", "luspo", "gmpo")),
    (changed(RL, "algorithm.name", "gspo"), "algorithm.is_correction", "token_mask", "algorithm.is_correction"),
    (RL, "algorithm.ref_sync_interval", 4, "algorithm.ref_sync_interval"),
    (RL, "algorithm.routing_replay", True, "algorithm.routing_replay"),
    (REPLAYED, "algorithm.old_policy", "engine", "algorithm.routing_replay"),
    (RL, "batch.minibatches_per_step", 3, "batch.minibatches_per_step"),
    (SUPERVISED, "batch.minibatches_per_step", 5, "batch.minibatches_per_step"),
    (RL, "batch.tokens_per_microbatch", 700, "batch.tokens_per_microbatch"),
    (RL, "rollout.sampling.temperature", 0, "rollout.sampling.temperature"),
    (RL, "optimizer.warmup_steps", 4, "optimizer.warmup_steps"),
    (RL, "learner.offload", "optimizer", "learner.offload"),
    (RL, "learner", {"offload": "parameters", "zero_stage": 2}, "learner.offload"),
    (RL, "learner", {"processes": 2}, "cluster.kind"),
    (RL, "data.eval_size", 0, "eval.every"),
    (RL, "eval.reward", "format", "eval.reward"),
    (RL, "eval.every", 0, "checkpoint.best_metric"),
    (RL, "checkpoint", {"max_kl": 1.0}, "checkpoint.max_kl"),
]


@pytest.mark.parametrize(("values", "key", "value", "broken"), BROKEN)
def test_rules_across_fields(values: dict[str, Any], key: str, value: Any, broken: str) -> None:
    parse_config({**values, "cluster": "inline"})
    problems = problems_of(changed({**values, "cluster": "inline"}, key, value))
    assert [problem.split(": ")[1] for problem in problems] == [broken]


def test_every_rule_has_a_configuration_that_breaks_it() -> None:
    assert {rule.key for rule in RULES} <= {broken for *_, broken in BROKEN}


@pytest.mark.parametrize(
    ("row", "key", "value", "reader"),
    [
        ("grpo", "tau_negative", 2.0, "surrogate: soft_gate,"),
        ("sapo", "clip_high", 0.3, "surrogate: binary_kl or binary_tv or clip or clipped_weight or geometric_clip"),
        ("cispo", "dual_clip", 9.0, "surrogate: clip,"),
        ("dr_grpo", "kl", "k2", "a beta above 0"),
        ("dr_grpo", "kl_in", "reward", "a beta above 0"),
        ("rloo", "ratio", "sequence", "a surrogate that has a ratio"),
        ("grpo", "length_weight", 0.5, "length_penalty: soft_overlong or relative"),
        ("grpo", "pass_k", 2, "advantage: pass_at_k"),
        ("grpo", "overlong_buffer", 0.5, "length_penalty: soft_overlong"),
        ("dppo", "tis_cap", 5.0, "old_policy: learner, a tis_cap and a correction that bounds the ratio"),
        ("kpop", "tis_cap", 5.0, "old_policy: learner, a tis_cap and a correction that bounds the ratio"),
    ],
)
def test_numbers_that_nothing_reads_are_refused(row: str, key: str, value: Any, reader: str) -> None:
    values = changed(RL, "algorithm.name", row)
    (problem,) = problems_of(changed(values, f"algorithm.{key}", value))
    assert problem.startswith(f"file.yaml: algorithm: {key} is read only with {reader}")
    same = getattr(parse_config(values).algorithm, key)
    parse_config(changed(values, f"algorithm.{key}", same))  # as a saved configuration has it


def test_what_turns_a_correction_off_is_no_such_number() -> None:
    for row in ("dppo", "grpo"):
        parse_config(changed(changed(RL, "algorithm.name", row), "algorithm.tis_cap", None))
    without = changed(RL, "algorithm.tis_cap", None)
    assert "is_correction is read only with" in problems_of(changed(without, "algorithm.is_correction", "reject"))[0]


@pytest.mark.parametrize("key", ["beta", "positive_weight", "entropy_bonus", "length_weight"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_weights_are_finite(key: str, value: float) -> None:
    (problem,) = problems_of(changed(RL, f"algorithm.{key}", value))
    assert problem.startswith(f"file.yaml: algorithm.{key}: expected ")


@pytest.mark.parametrize("values", [RL, SUPERVISED, changed(RL, "algorithm.clip_high", 0.3)])
def test_the_resolved_configuration_is_enough_to_run_again(values: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(values)
    saved = tmp_path / "config.yaml"
    saved.write_text(dump(config))
    again = load_config(saved)
    assert dump(again) == dump(config)
    assert again.algorithm == config.algorithm
    assert again.data.task is None or again.data.task.options == config.data.task.options  # type: ignore[union-attr]


def test_a_preset_fills_the_cells_and_any_of_them_can_be_replaced() -> None:
    config = parse_config({**RL, "algorithm": {"name": "dapo", "clip_low": 0.1}})
    assert (config.algorithm.aggregation, config.algorithm.clip_high, config.algorithm.clip_low) == (
        "token_mean",
        0.28,
        0.1,
    )


def test_a_users_function_is_a_task_and_its_parameters_are_its_options(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def rows(seed, count: int, hard: bool = False):\n    return []\n")
    config = parse_config(changed(RL, "data.task", {"name": f"{file}:rows", "count": 3}))
    assert config.data.task is not None and config.data.task.options.model_dump() == {"count": 3, "hard": False}
    assert problems_of(changed(RL, "data.task", {"name": f"{file}:rows"})) == [
        "file.yaml: data.task.count: required key is missing"
    ]
    (problem,) = problems_of(changed(RL, "data.task", {"name": f"{file}:row"}))
    assert "row" in problem
    (problem,) = problems_of(changed(RL, "data.task", {"name": f"{tmp_path}/nothing.py:rows"}))
    assert "there is no file" in problem


def test_sizes_follow_from_the_configuration() -> None:
    batch = {"prompts_per_step": 6, "samples_per_prompt": 4, "minibatches_per_step": 3, "epochs_per_step": 2}
    config = parse_config(
        {
            **RL,
            "batch": batch,
            "rollout": {"sampling": {"max_tokens": 10}},
            "data": {**RL["data"], "max_prompt_tokens": 50},
        }
    )
    numbers = {what: number for what, number, _ in sizes(config)}
    assert numbers["completions per step"] == "24"
    assert numbers["sampled tokens per step"] == "<= 240"
    assert numbers["prompts sampled per step"] == "<= 6"
    assert numbers["tokens computed per epoch"] == f"<= {6 * 50 + 240}"
    assert numbers["completions per update"] == "8"
    assert numbers["optimizer updates per step"] == "6"
    assert numbers["optimizer updates in the run"] == "24"
    assert "rollout workers" not in {what for what, *_ in sizes(parse_config(SUPERVISED))}


def test_dynamic_sampling_asks_more_prompts() -> None:
    batch = {"prompts_per_step": 5, "samples_per_prompt": 4, "oversampling": 1.3, "max_rounds": 3}
    values = {**RL, "batch": batch, "algorithm": {"name": "dapo"}, "rollout": {"sampling": {"max_tokens": 10}}}
    numbers = {what: number for what, number, _ in sizes(parse_config(values))}
    assert numbers["completions per step"] == "20"
    assert numbers["prompts sampled per step"] == "<= 21"
    assert numbers["sampled tokens per step"] == "<= 840"


def test_gpus_are_counted_for_what_the_run_starts() -> None:
    cluster = {"gpus_per_rollout_worker": 1, "gpus_per_learner": 0.5}
    values = {"cluster": cluster, "rollout": {"workers": 3}, "learner": {"processes": 2}}
    gpus = {
        name: dict((what, n) for what, n, _ in sizes(parse_config({**base, **values})))["GPUs"]
        for name, base in (("rl", RL), ("sft", SUPERVISED))
    }
    assert gpus == {"rl": "4", "sft": "1"}


def test_the_table_of_sizes_is_printed_whole() -> None:
    console = Console(width=100, record=True)
    console.print(sizes_table(parse_config(RL)))
    assert "128" in console.export_text()


def test_the_objective_says_where_batches_come_from() -> None:
    assert from_rollouts(parse_config(RL))
    assert not from_rollouts(parse_config(SUPERVISED))


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_told_its_new_name(old: str, new: str) -> None:
    assert problems_of(changed(RL, old, 1)) == [f"file.yaml: {old}: this key is now called {new}"]


@pytest.mark.parametrize(("old", "new"), RENAMED_METRICS.items())
def test_an_old_metric_is_told_its_new_name(old: str, new: str) -> None:
    [problem] = problems_of(changed(RL, "checkpoint.best_metric", old))
    assert f"checkpoint.best_metric: this metric is now called {new}" in problem
    assert new in METRICS


@pytest.mark.parametrize("new", RENAMED.values())
def test_a_new_key_exists(new: str) -> None:
    section, _, key = new.partition(".")
    assert key in section_class(Config.model_fields[section]).model_fields  # type: ignore[union-attr]
