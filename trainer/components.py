"""The components of a run, each built at its first use. No process starts and no weight is read."""

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from llmquest_rl.cached_tensors import content_key, folder_key
from llmquest_rl.data.dataset import DatasetContext
from llmquest_rl.data.images import ImageReader, image_reader
from llmquest_rl.data.open_dataset import open_dataset
from llmquest_rl.data.rows import MalformedRows
from llmquest_rl.data.stream import PromptStream, SequenceGroupStream
from llmquest_rl.data.task import open_task
from llmquest_rl.data.tokenizer import PromptRenderer, load_tokenizer, prompt_renderer
from llmquest_rl.models.base import image_format, reads_text
from llmquest_rl.models.checkpoint.count import count_parameters
from llmquest_rl.models.checkpoint.hub import check_model_files, resolve_model
from llmquest_rl.models.checkpoint.load_classifier import check_classifier
from llmquest_rl.models.checkpoint.load_save import read_shape
from llmquest_rl.objectives import Objective
from rollout.engine import EngineSetup
from rollout.proxy import NativeProxy, open_proxy
from trainer.cluster.hardware import available_cores, choose_dtype
from trainer.config.rules import build_objective, from_rollouts, optimizer_updates
from trainer.config.schema import Config
from trainer.learner.check_teacher import check_teacher
from trainer.learner.critic import check_critic
from trainer.learner.setup import LearnerSetup
from trainer.sources.reward_model_worker import RewardModelSetup

log = logging.getLogger(__name__)


class RunComponents:
    """The components of one run: objective, tokenizer, data, and the setups of its workers."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def objective(self) -> Objective:
        return build_objective(self.config)

    @cached_property
    def model_path(self) -> Path:
        return resolve_model(self.config.model.path)

    @cached_property
    def reference_path(self) -> Path | None:
        """The folder of the objective's teacher; None if the reference is a copy of the initial model."""
        teacher = self.objective.teacher
        return None if teacher is None or teacher.path is None else resolve_model(teacher.path)

    @cached_property
    def critic_path(self) -> Path | None:
        """The folder of the model that the critic begins with; None = the model that is trained, or there is none."""
        critic = self.objective.critic
        return None if critic is None or critic.path is None else resolve_model(critic.path)

    def check_model(self) -> None:
        """Check that every weight is there, without reading one, and that the model fits the objective.

        Raises:
            ValueError: a file or a tensor is missing or truncated (the message names it), the objective needs a
                classifier and the model cannot be turned into one, or its teacher has another tokenizer.
        """
        config = self.config
        if config.model.init == "pretrained":
            check_model_files(self.model_path)
        if self.reference_path is not None:
            longest = config.batch.tokens_per_sequence
            if from_rollouts(config):
                longest = config.data.max_prompt_tokens + config.rollout.sampling.max_tokens
            check_teacher(self.reference_path, self.model_path, longest)
        if self.objective.labels:
            check_classifier(self.model_path, self.objective.labels)
        if self.objective.critic is not None:
            check_critic(self.model_path, self.critic_path)

    def check_experts(self) -> None:
        """Check that a model whose expert routing is to be replayed has experts.

        Raises:
            ValueError: it has none; the message names the architecture and the remedy.
        """
        if not self.objective.routing_replay:
            return
        count = count_parameters(self.model_path)
        if count.active == count.total:
            raise ValueError(
                f"algorithm.routing_replay: in {count.architecture} ({self.model_path}) every token passes through "
                "every weight, so there is no choice of experts to replay: set it to false, or train a mixture of "
                "experts"
            )

    @cached_property
    def renderer(self) -> PromptRenderer:
        data = self.config.data
        tokenizer = load_tokenizer(self.model_path)
        return prompt_renderer(tokenizer, data.system_prompt, data.chat_template, self.image_reader)

    @property
    def texts(self) -> PromptRenderer | None:
        """The prompt renderer; None for a model that reads images only."""
        return self.renderer if reads_text(read_shape(self.model_path)[1]) else None

    @cached_property
    def image_reader(self) -> ImageReader | None:
        _, shape = read_shape(self.model_path)
        images = image_format(shape)
        return None if images is None else image_reader(self.model_path, images)

    @cached_property
    def prompts(self) -> PromptStream:
        data = self.config.data
        assert data.task is not None, "a configuration rule requires a task for objectives that learn from rollouts"
        malformed = MalformedRows(data.malformed_rows)
        section, seed = data.task, self.config.seed
        task = open_task(section.name, section.function, section.options, seed, malformed, self.open_proxy)
        hint = None if self.objective.teacher is None else self.objective.teacher.hint
        return PromptStream(task, self.renderer, seed, data.max_prompt_tokens, data.long_prompts, hint)

    def open_proxy(self, reference: str | None) -> NativeProxy:
        """Open a proxy model for a task that scores text; None = the model of this run before its training.

        Raises:
            ValueError: the model does not exist, or it is the model of this run, whose weights are random.
        """
        if reference is None and self.config.model.init == "random":
            raise ValueError(
                "a model with random weights cannot tell which tokens are hard: name a `proxy` in data.task"
            )
        path = self.model_path if reference is None else resolve_model(reference)
        return open_proxy(path, self.model_path, threads(None, 1))

    @cached_property
    def sequences(self) -> SequenceGroupStream:
        data = self.config.data
        assert data.dataset is not None, "a configuration rule requires a data set for supervised objectives"
        malformed = MalformedRows(data.malformed_rows)
        context = DatasetContext(
            self.texts,
            self.config.batch.tokens_per_sequence,
            self.config.seed,
            malformed,
            data.long_prompts,
            self.objective.labels,
            self.image_reader,
            (self.objective.pooling if self.objective.labels else None) or "eos",
        )
        return SequenceGroupStream(
            open_dataset(data.dataset.name, data.dataset.function, data.dataset.options, context), self.config.seed
        )

    def reference_keys(self) -> dict[str, str]:
        """Keys of what the reference's log-probs depend on, besides the sequences: the model and the chat template."""
        config = self.config
        dtype, _ = self.dtype(config.model.dtype, config.cluster.gpus_per_learner, "learner")
        drawn = str(config.seed) if config.model.init == "random" else ""
        template = content_key(self.renderer.template or "", config.data.system_prompt or "")
        return {"model": content_key(folder_key(self.model_path), dtype, drawn), "chat template": template}

    def teacher_keys(self) -> dict[str, str]:
        """Keys of what a teacher's distributions depend on, besides the sequences: its files and its arithmetic."""
        assert self.reference_path is not None, "a configuration rule requires a teacher"
        dtype, _ = self.dtype(self.config.model.dtype, self.config.cluster.gpus_per_learner, "learner")
        return {"teacher": content_key(folder_key(self.reference_path), dtype)}

    def dtype(self, configured: str, gpus: float, purpose: str) -> tuple[str, str]:
        """The configured dtype, or for `auto` the one that suits the device and the purpose, with the reason."""
        if configured != "auto":
            return configured, "configured"
        dtype, reason = choose_dtype("cuda" if gpus else "cpu", purpose)
        log.info("dtype of the %s: %s, because %s", purpose, dtype, reason)
        return str(dtype).removeprefix("torch."), reason

    def learner_setup(self, folder: Path) -> LearnerSetup:
        """The setup of every learner process."""
        config, gpus = self.config, self.config.cluster.gpus_per_learner
        return LearnerSetup(
            model_path=self.model_path,
            objective=self.objective,
            optimizer=config.optimizer,
            learner=config.learner,
            total_updates=optimizer_updates(config),
            tokens_per_microbatch=config.batch.tokens_per_microbatch,
            folder=folder,
            critic_path=self.critic_path,
            init=config.model.init,
            dtype=self.dtype(config.model.dtype, gpus, "learner")[0],  # type: ignore[arg-type]
            device="cuda" if gpus else "cpu",
            gradient_checkpointing=config.model.gradient_checkpointing,
            seed=config.seed,
            reference_path=self.reference_path,
            threads=threads(config.cluster.cpus_per_learner, config.learner.processes),
        )

    @cached_property
    def reward_model_setups(self) -> list[RewardModelSetup]:
        """The setup of each reward model's processes."""
        config, gpus = self.config, self.config.cluster.gpus_per_reward_model
        return [
            RewardModelSetup(
                config=model,
                model_path=resolve_model(model.path),
                dtype=self.dtype(model.dtype, gpus, "learner")[0],  # type: ignore[arg-type]
                device="cuda" if gpus else "cpu",
                threads=threads(config.cluster.cpus_per_reward_model, model.workers),
            )
            for model in config.reward_models
        ]

    @cached_property
    def engine_setup(self) -> EngineSetup:
        """The setup of every rollout worker's engine."""
        config, gpus = self.config, self.config.cluster.gpus_per_rollout_worker
        dtype, reason = self.dtype(config.rollout.dtype, gpus, "engine")
        completion = max(config.rollout.sampling.max_tokens, config.eval.max_tokens or 0)
        answer = 0 if config.rollout.answer_logprobs is None else config.rollout.answer_logprobs.max_tokens
        at_once = config.batch.prompts_per_step * config.batch.samples_per_prompt
        return EngineSetup(
            context_tokens=config.data.max_prompt_tokens + completion + answer,
            max_sequences=-(-at_once // config.rollout.workers),
            dtype=dtype,  # type: ignore[arg-type]
            dtype_reason=reason,
            threads=threads(config.cluster.cpus_per_rollout_worker, config.rollout.workers),
            device="cuda" if gpus else "cpu",
            seed=config.seed,
        )

    @property
    def teacher_engine_setup(self) -> EngineSetup:
        """The setup of the engine that holds a teacher. A hint may make its prompts longer than the student's."""
        setup, teacher = self.engine_setup, self.objective.teacher
        hint = self.config.data.max_prompt_tokens if teacher is not None and teacher.hint is not None else 0
        return replace(setup, context_tokens=setup.context_tokens + hint)


def threads(cpus_each: float | None, count: int) -> int:
    """CPU threads of one process: its cores if configured, else an equal share of all, because phases take turns."""
    return max(1, int(cpus_each)) if cpus_each is not None else max(1, available_cores() // count)
