"""Which policy a command is about: a run, a checkpoint, a model directory or a preset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlactl.config.compose import compose, dump, flatten, load_resolved, override
from vlactl.config.explain import nearest_key
from vlactl.config.layers import Leaf, Override, Tree, as_layer, leaves, nest
from vlactl.config.run import RunConfig
from vlactl.errors import ConfigError
from vlactl.evaluate.results import EVAL_REQUEST, read_request
from vlactl.hub.manifest import (
    CHECKPOINTS,
    MANIFEST,
    list_checkpoints,
    newest_checkpoint,
    read_manifest,
    step_name,
    verify_manifest,
)
from vlactl.hub.models import PATH_KEY, read, with_downloaded
from vlactl.launch.rundir import CONFIG, EXPORTED_CONFIG, MODEL, PLAN

CHECKPOINT = "--checkpoint"
SUITE = "--suite"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySource:
    """A configuration and the weights to use with it.

    Attributes:
        config: of the run or preset.
        checkpoint: directory of a vlactl checkpoint; "" = the weights that the configuration names.
        label: for people.
        step: finished steps of the run that the policy is of; None = of no run.
    """

    config: RunConfig
    checkpoint: str
    label: str
    step: int | None = None


def find_policy(
    checkpoint: Path | None,
    preset: str | None,
    runs: Path,
    overrides: Sequence[Override],
    step: int | None = None,
) -> PolicySource:
    """Resolve what a person named, or the newest run that has a checkpoint.

    Args:
        checkpoint: run, checkpoint or model directory; None = the newest run.
        preset: of a model directory, or alone: the policy that it starts from.
        runs: folder of all runs.
        overrides: of the configuration.
        step: finished steps of the run, 0 = before training; None = its newest checkpoint.

    Raises:
        ConfigError: there is nothing of that kind.
        IntegrityError: it is damaged.
    """
    if step is not None and preset is not None:
        raise ConfigError(
            f"--step {step} is of a run, --preset {preset} of a policy that is in no run",
            hint="name the run: --run runs/NAME/TIME",
        )
    if checkpoint is None and preset is not None:
        return _of_preset(preset, overrides)
    source = _newest(runs, step) if checkpoint is None else _named(checkpoint, preset, step)
    if not overrides:
        return source
    layers = [as_layer(each) for each in overrides]
    try:
        config = override(source.config, layers)
    except ConfigError as error:
        if not _are_for_another(source.config, layers):
            raise
        chosen = f"policy: {source.label}; choose another with --checkpoint or --preset"
        raise ConfigError(error.message, hint=f"{error.hint}\n{chosen}".strip()) from error
    return PolicySource(
        config=config,
        checkpoint=source.checkpoint,
        label=source.label,
        step=source.step,
    )


def _of_preset(preset: str, overrides: Sequence[Override]) -> PolicySource:
    """What a preset starts from."""
    config = compose(preset, overrides).config
    model = dump(config)["model"]
    named = model.get("path") or model.get("checkpoint") or config.model.built_in()
    label = named or f"untrained {preset}"
    return PolicySource(config=with_downloaded(config), checkpoint="", label=label)


def _are_for_another(config: RunConfig, layers: Sequence[Tree]) -> bool:
    """Whether overrides fit no policy like this one: its suite is refused, or it lacks the keys."""
    known = list(flatten(config))
    for layer in layers:
        for key, leaf in leaves(layer):
            if key not in known and not nearest_key(key, known):
                return True
            if leaf.origin == SUITE and not _accepts(config, layer):
                return True
    return False


def _accepts(config: RunConfig, layer: Tree) -> bool:
    try:
        override(config, [layer])
    except ConfigError:
        return False
    return True


def _newest(runs: Path, step: int | None) -> PolicySource:
    folders = [path.parent for path in runs.glob(f"*/*/{CONFIG}")]
    for run in sorted(folders, key=lambda folder: folder.name, reverse=True):
        path, _ = newest_checkpoint(run)
        if path is not None:
            return _of_run(run, path) if step is None else _of_step(run, step)
    raise ConfigError(
        f"there is no run with a checkpoint under {runs}",
        hint="name a policy: --checkpoint RUN_OR_DIRECTORY, or --preset NAME alone\n"
        "train one: vlactl train --preset libero_spatial_tiny_grpo",
    )


def _named(path: Path, preset: str | None, step: int | None) -> PolicySource:
    if (path / EVAL_REQUEST).is_file():
        raise _of_evaluation(path)
    if (path / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{path} holds an adapter, not a whole model",
            hint=f"--preset NAME --set lora.adapter={path} --set lora.rank=(r in {ADAPTER_CONFIG})",
        )
    is_model = any(path.glob("*.safetensors"))
    is_of_run = (path / MANIFEST).is_file() or (path / CONFIG).is_file()
    if preset is not None and is_of_run and not is_model:
        raise ConfigError(f"{path} has a configuration of its own", hint="leave out --preset")
    is_run = not is_model and ((path / CHECKPOINTS).is_dir() or (path / PLAN).is_file())
    if step is not None:
        if not is_run:
            raise ConfigError(f"--step {step}: {path} is not a run", hint="leave out --step")
        return _of_step(path, step)
    if (path / MANIFEST).is_file() and not is_model:
        verify_manifest(path)
        return _of_checkpoint(path)
    if is_run:
        newest, skipped = newest_checkpoint(path)
        if newest is None:
            raise ConfigError(
                f"{path} has no complete checkpoint yet",
                hint="\n".join(skipped) or "a run writes one every checkpoint.every steps",
            )
        return _of_run(path, newest)
    if is_model:
        return _of_model_directory(path, preset)
    raise ConfigError(
        f"{path} is neither a run, nor a checkpoint, nor a directory of safetensors",
        hint="a run directory looks like runs/NAME/2026-01-31T12-00-00",
    )


def _of_evaluation(path: Path) -> ConfigError:
    """Why the folder of an evaluation is refused, and what it measured."""
    policy = read_request(path)["policy"]
    named = policy.get("checkpoint") or policy.get("label")
    return ConfigError(
        f"{path} is an evaluation, not a policy", hint=f"it measured {named}: name that"
    )


def _of_checkpoint(path: Path) -> PolicySource:
    run = path.resolve().parent.parent
    if load_resolved(run / CONFIG).sft.data:
        raise ConfigError(
            f"{path} is of a supervised run, which is measured when it is finished",
            hint=f"name the run: --run {run}",
        )
    return _of_run(run, path)


def _of_run(run: Path, checkpoint: Path) -> PolicySource:
    config = load_resolved(run / CONFIG)
    if config.sft.data:
        return _of_supervised_run(run)
    return PolicySource(
        config=config,
        checkpoint=str(checkpoint.resolve()),
        label=f"{run} {checkpoint.name}",
        step=read_manifest(checkpoint).get("step"),
    )


def _of_supervised_run(run: Path) -> PolicySource:
    """What it has exported, adapters merged: its checkpoints lack the demonstrations' ranges."""
    model = run / MODEL
    if not model.is_dir():
        raise ConfigError(
            f"{run} is not finished: it has no {model} yet",
            hint=f"vlactl sft --resume {run}",
        )
    return _of_model_directory(model, None)


def _of_step(run: Path, step: int) -> PolicySource:
    """A run's policy after so many steps; its configuration knows the one before the first."""
    config = load_resolved(run / CONFIG)
    if config.sft.data:
        raise ConfigError(
            f"--step {step}: {run} is a supervised run, which is measured when it is finished",
            hint="leave out --step; what it started from: vlactl eval --preset NAME",
        )
    if step == 0:
        return PolicySource(config=config, checkpoint="", label=f"{run} before training", step=0)
    path = run / CHECKPOINTS / step_name(step)
    if not path.is_dir():
        steps = ", ".join(str(number) for number, _ in list_checkpoints(run)) or "none"
        raise ConfigError(
            f"{run} has no checkpoint of step {step}",
            hint=f"it has: {steps}; --step 0 is the policy before training",
        )
    verify_manifest(path)
    return _of_run(run, path)


def _of_model_directory(path: Path, preset: str | None) -> PolicySource:
    """Weights in the published layout; an export says which configuration they belong to."""
    here = [nest(PATH_KEY, Leaf(str(path.resolve()), CHECKPOINT))]
    if preset is None and (path / EXPORTED_CONFIG).is_file():
        config = override(load_resolved(path / EXPORTED_CONFIG), here)
        return PolicySource(config=config, checkpoint="", label=str(path))
    if preset is None:
        raise ConfigError(
            f"{path} holds weights only: which preset do they belong to?",
            hint="add --preset NAME; `vlactl presets list` shows them",
        )
    if download := read(path):  # it speaks the dialect of what was downloaded
        here.append(nest("model.checkpoint", Leaf(download.repo, CHECKPOINT)))
    config = compose(preset, here).config
    return PolicySource(config=config, checkpoint="", label=str(path))
