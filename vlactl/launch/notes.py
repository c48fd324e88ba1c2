"""What a person should know of a configuration: keys without effect, states used twice."""

from __future__ import annotations

from vlactl.api.contracts import EnvSpec
from vlactl.config.run import RunConfig, Section


def idle_keys(config: RunConfig, *, can_offload: bool) -> list[str]:
    """One line for each; `can_offload` where ranks hold something that rollouts do not use."""
    needs = config.algorithm.needs()
    has_values, warmup = needs.values != "none", needs.critic_warmup_steps
    lora, evaluation, train = config.lora, config.eval, config.train
    idle = {
        f"optim.value_lr has no effect: {config.algorithm.name} has no value head": (
            not has_values and _is_set(config.optim, "value_lr")
        ),
        f"the policy is not trained: the critic is warmed up for {warmup} steps, and "
        "train.max_steps is no more": warmup >= train.max_steps,
        "lora.alpha and lora.targets have no effect while lora.rank is 0": (
            lora.rank == 0 and (_is_set(lora, "alpha") or _is_set(lora, "targets"))
        ),
        "eval.temperature and eval.top_k have no effect on greedy evaluations": (
            evaluation.greedy
            and (_is_set(evaluation, "temperature") or _is_set(evaluation, "top_k"))
        ),
        "train.offload = always has no effect: no GPU holds what rollouts do not use": (
            train.offload == "always" and not can_offload
        ),
        "the optimizer works in bfloat16: without train.sharding there are no float32 weights": (
            train.dtype == "bfloat16"
            and lora.rank == 0
            and train.master_weights
            and not train.sharding
        ),
    }
    return [text for text, applies in idle.items() if applies]


def shares_states(config: RunConfig, spec: EnvSpec) -> bool:
    """Whether states are trained and measured on alike, where there are more than the benchmark's.

    Without states of one's own for training that is the benchmark's usual protocol.
    """
    for task in spec.tasks:
        if task.num_trials > len(task.eval_trials):
            trained = set(config.rollout.trials or range(task.num_trials))
            return not trained.isdisjoint(config.eval.trials or task.eval_trials)
    return False


def _is_set(section: Section, key: str) -> bool:
    return bool(getattr(section, key) != type(section).model_fields[key].default)
