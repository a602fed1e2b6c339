"""The paper recipes at the papers' size: checked as far as a machine without GPUs and network can."""

import json
import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import pytest

from llmquest_rl.models.checkpoint.count import count_parameters
from llmquest_rl.models.checkpoint.load_classifier import check_classifier
from rollout.engine import check_context
from rollout.vllm_limits import check_architecture, read_vllm_shape
from trainer.assemble import learner_request, rollout_requests
from trainer.components import RunComponents
from trainer.config.load import load_config
from trainer.config.rules import build_objective, from_rollouts
from trainer.config.schema import Config
from trainer.config.sizes import sizes
from trainer.pipeline.stages import load_pipeline

CONFIGS = Path(__file__).parents[3] / "configs"
PAPERS = CONFIGS / "papers"
TWINS = sorted((PAPERS / "gpu").glob("*.yaml"))
STAGES = sorted((PAPERS / "gpu" / "stages").glob("*.yaml"))
"""Supervised runs at the same size, whose models some twins start from."""

SHAPES = {
    "Qwen/Qwen2.5-0.5B": "qwen2.5-0.5b",
    "Qwen/Qwen2.5-1.5B": "qwen2.5-1.5b",
    "Qwen/Qwen2.5-32B": "qwen2.5-32b",
    "Qwen/Qwen2.5-Math-1.5B": "qwen2.5-math-1.5b",
    "Qwen/Qwen2.5-Math-7B": "qwen2.5-math-7b",
    "Qwen/Qwen3-30B-A3B-Base": "qwen3-30b-a3b",
    "Qwen/Qwen3-4B-Instruct-2507": "qwen3-4b",
    "Qwen/Qwen3-1.7B-Base": "qwen3-1.7b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-4B-Base": "qwen3-4b",
    "Qwen/Qwen3-8B-Base": "qwen3-8b",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "qwen2.5-1.5b",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": "r1-distill-qwen-14b",
    "huggyllama/llama-7b": "llama-7b",
    "runs/models/hh-sft": "llama-7b",
}
"""File in configs/models with the same layers, by Hub id or exported folder. Other releases may differ in positions."""

DEEPSEEK_MATH = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 30,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 102400,
}
"""config.json of deepseek-ai/deepseek-math-7b-instruct."""

HARDWARE = re.compile(r"^# Hardware: (\d+) NVIDIA GPUs of (\d+) GB\b.*Not run by us", re.MULTILINE)
ARGUMENTS = re.compile(r"^#   ([^:=\n]+): (\S+=.*)$", re.MULTILINE)

by_name = pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hub id to a folder with the model's config.json."""
    made = {}
    for name in [*SHAPES, "deepseek-ai/deepseek-math-7b-instruct"]:
        made[name] = tmp_path_factory.mktemp("shape")
        if name in SHAPES:
            shutil.copy(CONFIGS / "models" / f"{SHAPES[name]}.json", made[name] / "config.json")
        else:
            (made[name] / "config.json").write_text(json.dumps(DEEPSEEK_MATH))
    return made


def hardware(path: Path) -> tuple[int, int]:
    """Number of GPUs and gigabytes of each, as the comment says."""
    found = HARDWARE.search(path.read_text())
    assert found, f"{path.name} must say '# Hardware: 8 NVIDIA GPUs of 80 GB ... Not run by us.'"
    return int(found[1]), int(found[2])


def variants(path: Path) -> dict[str, list[str]]:
    """The arguments that the comment lists, by label; the file itself has none."""
    listed = ARGUMENTS.findall(path.read_text())
    assert listed, f"{path.name} lists no arguments for the paper's other curves"
    return {"the file": []} | {label: shlex.split(arguments) for label, arguments in listed}


@cache
def num_parameters(folder: Path) -> int:
    return count_parameters(folder).total


def teacher_path(config: Config) -> str | None:
    """The Hub id of the objective's teacher, if it has one of its own."""
    teacher = build_objective(config).teacher
    return None if teacher is None else teacher.path


def learner_gb(config: Config, parameters: int, teacher: int = 0) -> float:
    """Peak gigabytes of weights and optimizer state on a learner's GPU, while it loads or while it trains.

    Every learner loads the complete model in bfloat16 and keeps the complete reference, a copy of the model or a
    teacher with that many parameters. Gradients, master weights and the two averages of AdamW are float32 and
    partitioned. A critic is a second model of this size.
    """
    weights, objective = 2e-9 * parameters, build_objective(config)
    reference = 2e-9 * (teacher or parameters) * objective.needs_reference
    kept = weights / config.learner.processes if config.learner.zero_stage == 3 else weights
    trained = kept + 16e-9 * parameters / config.learner.processes
    critic = 0 if objective.critic is None else trained
    return reference + critic + max(weights, trained)


def test_every_recipe_has_a_twin() -> None:
    assert {path.stem for path in TWINS} == {path.stem for path in PAPERS.glob("*.yaml")}


@by_name
def test_the_comment_says_what_whose_and_on_what(path: Path) -> None:
    first, second, *rest = path.read_text().splitlines()
    assert first.startswith("# ") and first.endswith("."), "one sentence that says what it shows"
    assert second.startswith(("# Paper: ", "# Source: "))
    assert any(line.startswith("# Ours: ") for line in rest), "what is not the paper's"
    gpus, _ = hardware(path)
    config = load_config(path)
    assert config.name == f"{path.stem.replace('_', '-')}-gpu"
    assert {what: number for what, number, _ in sizes(config)}["GPUs"] == str(gpus)


@by_name
def test_it_and_its_variants_fit_their_gpus(path: Path, folders: dict[str, Path]) -> None:
    gpus, gigabytes = hardware(path)
    for label, arguments in variants(path).items():
        config = load_config(path, arguments)
        samples = from_rollouts(config)
        requests = [learner_request(config), *(rollout_requests(config) if samples else ())]
        assert sum(r.count * r.gpus for r in requests) <= gpus, label
        parameters = num_parameters(folders[config.model.path])
        teacher = teacher_path(config)
        of_teacher = 0 if teacher is None else num_parameters(folders[teacher])
        assert learner_gb(config, parameters, of_teacher) < 0.75 * gigabytes, f"{label}: activations need the rest"
        if not samples:
            continue
        share = config.rollout.engine.options.model_dump()["gpu_memory_utilization"]
        assert 2e-9 * parameters < 0.75 * share * gigabytes, f"{label}: keys and values need the rest"


@by_name
def test_it_and_its_variants_assemble_with_their_models_shape(path: Path, folders: dict[str, Path]) -> None:
    for label, arguments in variants(path).items():
        config = load_config(path, arguments)
        folder, teacher, critic = folders[config.model.path], teacher_path(config), build_objective(config).critic
        changes = [f"model.path={folder}"] + ([] if teacher is None else [f"objective.teacher={folders[teacher]}"])
        changes += [f"objective.critic.path={folder}"] if critic is not None and critic.path is not None else []
        parts = RunComponents(load_config(path, [*arguments, *changes]))
        parts.check_experts()
        setup = parts.learner_setup(folder)
        assert (setup.device, setup.dtype) == ("cuda", "bfloat16"), label
        if parts.objective.source == "dataset":
            continue
        shape = read_vllm_shape(folder)
        check_architecture(folder, shape)
        check_context(folder, shape["max_position_embeddings"], parts.engine_setup)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_the_stages_before_fit_their_gpus_and_assemble(path: Path, folders: dict[str, Path]) -> None:
    lines = path.read_text().splitlines()
    assert lines[1].startswith("# Paper: ") and "Ours: " in path.read_text()
    gpus, gigabytes = hardware(path)
    config = load_config(path)
    assert config.name == path.stem.replace("_", "-") and f"runs/{config.name} " in path.read_text()
    assert config.learner.processes * config.cluster.gpus_per_learner == gpus
    folder = folders[config.model.path]
    assert learner_gb(config, num_parameters(folder)) < 0.75 * gigabytes
    parts = RunComponents(load_config(path, [f"model.path={folder}"]))
    assert parts.objective.source == "dataset"
    assert parts.learner_setup(folder).dtype == "bfloat16"
    if parts.objective.labels:
        check_classifier(folder, parts.objective.labels)


RLHF = PAPERS / "gpu" / "rloo_vs_grpo.yaml"
FINE_TUNING, REWARD_MODEL = (PAPERS / "gpu" / "stages" / f"hh_{name}.yaml" for name in ("sft", "reward_model"))


def test_the_stages_of_rlhf_read_and_write_one_form() -> None:
    """Chat template and system prompt agree between the stages, and each starts from the export of the one before."""
    rlhf, fine_tuned, reward_model = map(load_config, (RLHF, FINE_TUNING, REWARD_MODEL))
    assert rlhf.model.path == reward_model.model.path == f"runs/models/{fine_tuned.name}"
    [preferred] = rlhf.reward_models
    assert preferred.path == f"runs/models/{reward_model.name}"
    assert {c.data.chat_template for c in (rlhf, fine_tuned, reward_model)} == {preferred.chat_template} == {"none"}
    assert {c.data.system_prompt for c in (rlhf, fine_tuned, reward_model)} == {preferred.system_prompt} == {None}
    longest = rlhf.data.max_prompt_tokens + rlhf.rollout.sampling.max_tokens
    assert longest <= reward_model.batch.tokens_per_sequence == fine_tuned.batch.tokens_per_sequence


def test_the_pipeline_of_these_stages_has_their_numbers() -> None:
    """It is one command for the three files; its last stage has another algorithm."""
    stages = load_pipeline(CONFIGS / "rlhf_8gpu.yaml")
    rlhf, fine_tuned, reward_model = map(load_config, (RLHF, FINE_TUNING, REWARD_MODEL))
    assert stages["hh-sft"] == fine_tuned
    model = reward_model.model.model_copy(update={"path": "stage:hh-sft"})
    assert stages["hh-reward-model"] == reward_model.model_copy(update={"model": model})
    policy = stages["rlhf-8gpu"]
    same = ("steps", "data", "batch", "rollout", "optimizer", "learner", "cluster")
    assert {key: getattr(policy, key) for key in same} == {key: getattr(rlhf, key) for key in same}
    assert policy.reward_models[0].model_copy(update={"path": rlhf.reward_models[0].path}) == rlhf.reward_models[0]
    gpus, _ = hardware(CONFIGS / "rlhf_8gpu.yaml")
    assert all({name: value for name, value, _ in sizes(config)}["GPUs"] == str(gpus) for config in stages.values())


def test_the_stages_of_rlhf_read_the_rows_of_hh(tmp_path: Path) -> None:
    """Dahoas/full-hh-rlhf has dialogues as texts; training sees the same tokens as rollouts."""
    before = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Say"
    rows = [{"prompt": f"{before} {n}.\n\nAssistant:", "chosen": f" {n}.", "rejected": " No."} for n in range(8)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({**row, "response": row["chosen"]}) + "\n" for row in rows))

    def components(path: Path, option: str) -> RunComponents:
        return RunComponents(load_config(path, ["model.path=smollm2-135m-instruct", f"data.{option}.path={file}"]))

    rlhf = components(RLHF, "task")
    prompts = {tuple(problem.prompt_ids): problem.prompt for problem in rlhf.prompts.take(7)}
    assert set(prompts.values()) < {row["prompt"] for row in rows}
    assert {rlhf.renderer.decode(ids) for ids in prompts} == set(prompts.values()), "plain text"
    eos = rlhf.renderer.tokenizer.eos_token
    replies = {row["prompt"]: (f"{row['chosen']}{eos}", f"{row['rejected']}{eos}") for row in rows}
    for group in components(FINE_TUNING, "dataset").sequences.take(7):
        prompt = rlhf.renderer.decode(group.prompt)
        assert [rlhf.renderer.decode(ids) for ids in group.completions] == [replies[prompt][0]]
        assert prompts.get(tuple(group.prompt), prompt) == prompt
    for pair in components(REWARD_MODEL, "dataset").sequences.take(7):
        chosen, rejected = (rlhf.renderer.decode([*pair.prompt, *ids[:-1]]) for ids in pair.completions)
        prompt = next(prompt for prompt in replies if chosen.startswith(prompt))
        assert (chosen, rejected) == tuple(prompt + reply for reply in replies[prompt])
