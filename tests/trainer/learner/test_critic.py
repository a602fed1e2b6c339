"""The critic of PPO in the learner: against plain PyTorch, over processes, in checkpoints."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.batch import TokenBatch, collate
from llmquest_rl.models.checkpoint.load_classifier import new_classifier
from llmquest_rl.models.checkpoint.load_save import new_model, save_model
from llmquest_rl.models.weight_map import disk_tensors
from llmquest_rl.objectives import CriticOptions
from llmquest_rl.objectives.policy import Policy
from llmquest_rl.optim.groups import decay_groups
from llmquest_rl.optim.schedules import lr_factor
from tests.trainer.learner.learner_cases import (
    OPTIMIZER,
    Case,
    make_folder,
    make_setup,
    minibatches,
    run_group,
    run_steps,
    whole_weights,
)
from trainer.cluster.worker_group import free_port
from trainer.config.schema import LearnerConfig
from trainer.learner.critic import check_critic
from trainer.learner.learner import Learner

pytestmark = pytest.mark.slow

PPO = Policy(resolve("ppo", {"beta": 0.1}), 0.9, 12, critic=CriticOptions(lr=2e-2))
OF_CRITIC = {"policy/value", "policy/return", "policy/value_loss", "policy/explained_variance", "policy/loss"}


@contextmanager
def opened(folder: Path, **changes: Any) -> Iterator[Learner]:
    with closing(Learner(make_setup(folder, objective=PPO, **changes))) as learner:
        yield learner


def critic_weights(learner: Learner) -> dict[str, Tensor]:
    assert learner.critic is not None
    return {name: weight.detach().clone() for name, weight in learner.critic.model.named_parameters()}


def plain(model: nn.Module, lr: float) -> torch.optim.AdamW:
    groups = decay_groups(model.named_parameters(), OPTIMIZER.weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)


def test_equals_plain_pytorch(tmp_path: Path) -> None:
    """Policy and critic after two steps of four updates each, computed with torch alone."""
    folder = make_folder(tmp_path / "model")
    model, reference = (new_model(folder, torch.float32) for _ in range(2))
    critic = new_classifier(folder, ("value",), torch.float32)
    nn.init.zeros_(critic.get_submodule("score").weight)
    optimizers = [(model, plain(model, OPTIMIZER.lr), OPTIMIZER.lr), (critic, plain(critic, 2e-2), 2e-2)]

    def prepared(batch: TokenBatch) -> TokenBatch:
        with torch.no_grad():
            old, ref = (m(batch, temperature=0.9).logprobs for m in (model, reference))
            values = critic(batch).values[:, 0]
        added = {"old_logprobs": old, "ref_logprobs": ref, "values": values}
        batch = replace(batch, token_fields={**batch.token_fields, **added})
        return PPO.with_shared_values([batch], lambda sums: None)[0]

    update = 0
    for step in range(2):
        batches = [prepared(collate(groups)) for groups in minibatches(step)]
        for batch in batches * 2:
            for trained, optimizer, lr in optimizers:
                loss = PPO.loss(model, batch) if trained is model else PPO.value_loss(critic, batch)
                for group in optimizer.param_groups:
                    group["lr"] = lr * lr_factor("cosine", update, 20, warmup=2)
                optimizer.zero_grad()
                loss.value.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(trained.parameters(), 0.5)
                optimizer.step()
            update += 1
    with opened(folder, tokens_per_microbatch=60) as learner:
        logged = run_steps(learner, Case([], 1, 0), 0)
        ours = critic_weights(learner)
        for name, weight in learner.model.named_parameters():
            torch.testing.assert_close(weight, model.get_parameter(name), rtol=1e-4, atol=1e-5)
    for name, weight in critic.named_parameters():
        torch.testing.assert_close(ours[name], weight.detach(), rtol=1e-4, atol=1e-5)
    assert logged["learner/critic_skipped_updates"] == 0


def test_the_critic_learns_its_returns(tmp_path: Path) -> None:
    """The same rewards again and again: the values explain them."""
    with opened(make_folder(tmp_path / "model")) as learner:
        logged = [learner.update(minibatches(0), 2) for _ in range(8)]
    assert logged[-1]["policy/explained_variance"] > logged[0]["policy/explained_variance"] + 0.2
    assert logged[-1]["policy/value_loss"] < logged[0]["policy/value_loss"]


def test_resume_is_exact(tmp_path: Path) -> None:
    """Weights and the optimizer state of the critic, in a new process group."""
    folder, saved = make_folder(tmp_path / "model"), tmp_path / "saved"
    saved.mkdir()
    with opened(folder) as learner:
        learner.update(minibatches(0), 2)
        learner.save(saved)
        first, expected = learner.update(minibatches(1), 2), critic_weights(learner)
    with opened(folder) as learner:
        learner.load(saved)
        second = learner.update(minibatches(1), 2)
        for name, weight in critic_weights(learner).items():
            assert torch.equal(weight, expected[name]), name
    assert {name: first[name] for name in OF_CRITIC} == {name: second[name] for name in OF_CRITIC}


def test_a_checkpoint_without_a_critic_is_refused(tmp_path: Path) -> None:
    folder, saved = make_folder(tmp_path / "model"), tmp_path / "saved"
    saved.mkdir()
    with closing(Learner(make_setup(folder))) as learner:
        learner.save(saved)
    with opened(folder) as learner, pytest.raises(ValueError, match="has no critic"):
        learner.load(saved)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Advantages are whitened over both, parameters are partitioned; saved, trained, loaded and trained again: bit for
    bit."""
    folder = make_folder(tmp_path / "model")
    two = LearnerConfig(processes=2, zero_stage=3, timeout_s=60)
    setup = make_setup(folder, objective=PPO, tokens_per_microbatch=60, learner=two)
    [result], [other] = run_group(Case([setup], 2, free_port("127.0.0.1"), save_to=tmp_path / "saved"))
    with opened(folder) as learner:
        metrics, weights = run_steps(learner, Case([], 1, 0), 0), whole_weights(learner)
    assert result[1] == other[1], "both processes report the same metrics"
    for name, weight in weights.items():
        assert (result[0][name] - weight).norm() / weight.norm() < 1e-4, name
    for name in OF_CRITIC | {"learner/critic_grad_norm"}:
        assert result[1][name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


def test_a_critic_with_another_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    check_critic(tiny_model, other)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="objective.critic.path: .*another tokenizer"):
        check_critic(tiny_model, other)


def test_a_reward_model_keeps_its_head(tmp_path: Path) -> None:
    """A scorer begins with its own values, any other model with values of 0."""
    folder, scorer = make_folder(tmp_path / "model"), tmp_path / "scorer"
    values = new_classifier(folder, ("helpful",), torch.float32, seed=1)
    scorer.mkdir()
    save_model(folder, disk_tensors(values), scorer, config_fields=values.config_fields)
    for path, is_zero in ((None, True), (scorer, False)):
        with opened(folder, critic_path=path) as learner:
            assert bool((critic_weights(learner)["score.weight"] == 0).all()) == is_zero
            assert (learner.update(minibatches(0), 1)["policy/value"] == 0) == is_zero
