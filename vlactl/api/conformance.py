"""What every plugin must hold to: `vlactl plugins check NAME`, or `check` in an author's tests.

Descriptors, specs and footprints are tried in a process of their own, where it shows which heavy
library they import. An environment is then built in another process and plays one episode twice.
No network is loaded.

Shapes: K actions of a chunk, A dimensions of an action.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from vlactl.api import registry
from vlactl.api.contracts import (
    ChunkResult,
    EnvContext,
    Environment,
    EnvSpec,
    Episode,
    Observation,
)
from vlactl.api.plugins import (
    Descriptor,
    EnvironmentPlugin,
    Finding,
    Footprint,
    FootprintContext,
    ModelPlugin,
    PluginConfig,
    load_object,
)
from vlactl.errors import EnvironmentNotReadyError, UserError

HEAVY = ("torch", "transformers", "mujoco", "gymnasium", "jax")
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_CALL = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from vlactl.api import conformance; getattr(conformance, sys.argv[2])(*sys.argv[3:])"
)
_PROCESS_SECONDS = 120
_ANSWER_SECONDS = 100  # less than the process has, so that it can say what it waited for
_TRIED_LORA_RANK = 8
_EPISODE = Episode(task=0, trial=0, group=0, member=0, seed=1)
_CHUNK_LENGTH = 4
_NUM_CHUNKS = 16


class _Unplayable(Exception):  # noqa: N818 - a verdict on its way to a finding, not an error
    """Why an episode cannot be played on."""


def check(kind: str, name: str, *, play: bool = True) -> list[Finding]:
    """Examine one installed plugin; findings of level "FAIL" break the contract.

    Args:
        kind: "environment", "model", "algorithm" or "sink".
        name: of the plugin.
        play: an environment without a failure so far also plays an episode, which starts its
            simulator.
    """
    try:
        descriptor = registry.find(kind, name)
    except UserError as error:
        return [Finding(level="FAIL", subject="descriptor", detail=error.message, fix=error.hint)]
    findings = [
        Finding(level="ok", subject="descriptor", detail=f"plugin api {descriptor.api_version}"),
        *_check_name(descriptor),
        *_check_config(descriptor),
        *_check_references(descriptor),
        *_check_requirements(descriptor),
        *_in_process("probe", kind, name, subject="import"),
    ]
    playable = isinstance(descriptor, EnvironmentPlugin) and _is_ready(descriptor)
    if play and playable and not failed(findings):
        findings += _in_process("rehearse", kind, name, subject="episode")
    return findings


def failed(findings: list[Finding]) -> bool:
    """Whether one of them breaks the contract."""
    return any(finding.level == "FAIL" for finding in findings)


# --------------------------------------------------------------------------------------------
# Without running the plugin
# --------------------------------------------------------------------------------------------
def _check_name(descriptor: Descriptor) -> Iterator[Finding]:
    if not _NAME.fullmatch(descriptor.name):
        yield Finding(
            level="warn",
            subject="name",
            detail=f'"{descriptor.name}"',
            fix="use lower-case letters, digits and hyphens",
        )
    if not descriptor.summary or "\n" in descriptor.summary:
        yield Finding(level="FAIL", subject="summary", fix="write one line")


def _check_config(descriptor: Descriptor) -> Iterator[Finding]:
    subject = f"config {descriptor.config.__name__}"
    mistakes = [
        f"{model.__name__} {mistake}"
        for model in _models(descriptor.config)
        for mistake in _model_mistakes(model)
    ]
    try:
        defaults = default_config(descriptor)
    except ValidationError as error:
        missing = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        mistakes.append(f"cannot be built from defaults: {missing}")
    else:
        if defaults.name != descriptor.name:
            mistakes.append(f'is called "{defaults.name}"')
    for mistake in mistakes:
        yield Finding(level="FAIL", subject=subject, detail=mistake)
    if not mistakes:
        yield Finding(level="ok", subject=subject, detail="frozen, no unknown keys, has defaults")
    undocumented = [
        name for name, field in descriptor.config.model_fields.items() if not field.description
    ]
    # `name` and the keys of the base classes are documented there; overriding one drops that text.
    undocumented = [name for name in undocumented if name not in _inherited(descriptor.config)]
    if undocumented:
        yield Finding(
            level="warn",
            subject=subject,
            detail=f"keys without a description: {', '.join(undocumented)}",
            fix="Field(..., description=...)",
        )


def _model_mistakes(model: type[BaseModel]) -> Iterator[str]:
    if not model.model_config.get("frozen"):
        yield "is not frozen"
    if model.model_config.get("extra") != "forbid":
        yield "accepts unknown keys"


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A config class and those of its tables."""
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _models(field.annotation)


def _inherited(config: type[PluginConfig]) -> set[str]:
    return {
        name
        for base in config.__mro__[1:]
        if issubclass(base, PluginConfig)
        for name in base.model_fields
    }


def _check_references(descriptor: Descriptor) -> Iterator[Finding]:
    for field, reference in _references(descriptor).items():
        if not _REFERENCE.fullmatch(reference):
            yield Finding(
                level="FAIL", subject=field, detail=f'"{reference}"', fix='write "module:function"'
            )


def _references(descriptor: Descriptor) -> dict[str, str]:
    references = {"factory": descriptor.factory}
    if descriptor.checks:
        references["checks"] = descriptor.checks
    if isinstance(descriptor, EnvironmentPlugin):
        references["spec"] = descriptor.spec
        optional = {
            "footprint": descriptor.footprint,
            "bench": descriptor.bench,
            "demonstrator": descriptor.demonstrator,
            "variables": descriptor.variables,
        }
        references |= {field: reference for field, reference in optional.items() if reference}
    if isinstance(descriptor, ModelPlugin):
        references["footprint"] = descriptor.footprint
    return references


def _check_requirements(descriptor: Descriptor) -> Iterator[Finding]:
    for requirement in descriptor.requirements:
        problem = registry.unmet(requirement)
        if problem:
            yield Finding(
                level="warn", subject="requirements", detail=problem, fix=requirement.install
            )


def _is_ready(descriptor: Descriptor) -> bool:
    return not any(map(registry.unmet, descriptor.requirements))


def default_config(descriptor: Descriptor) -> PluginConfig:
    """The plugin's section with nothing but its name set.

    Raises:
        ValidationError: a key has no default.
    """
    return descriptor.config.model_validate({"name": descriptor.name})


# --------------------------------------------------------------------------------------------
# In a process of its own
# --------------------------------------------------------------------------------------------
def _in_process(function: str, kind: str, name: str, *, subject: str) -> list[Finding]:
    """Run `probe` or `rehearse` in a fresh interpreter; if that dies, `subject` has failed."""
    command = [sys.executable, "-c", _CALL, json.dumps(sys.path), function, kind, name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROCESS_SECONDS, check=True
        )
        return [Finding(**value) for value in json.loads(done.stdout.splitlines()[-1])]
    except subprocess.TimeoutExpired:
        detail = f"still running after {_PROCESS_SECONDS} s"
    except subprocess.CalledProcessError as error:
        detail = _last_line(error.stderr) or f"exit code {error.returncode}"
    except (IndexError, ValueError):
        detail = "the process left without a report"
    return [Finding(level="FAIL", subject=subject, detail=detail)]


def _write_report(findings: list[Finding]) -> None:
    """Write findings to stdout as one line of JSON, the last one."""
    fields = ("level", "subject", "detail", "fix")
    report = [{field: getattr(finding, field) for field in fields} for finding in findings]
    sys.stdout.write(f"\n{json.dumps(report)}\n")


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "")


def probe(kind: str, name: str) -> None:
    """Import a descriptor, try its spec or footprint, and report the findings."""
    descriptor = registry.find(kind, name)
    findings = [_imports(f"descriptor {descriptor.config.__module__}")]
    if isinstance(descriptor, EnvironmentPlugin) and _is_ready(descriptor):
        findings += _try("spec", descriptor, _spec_mistakes)
    if isinstance(descriptor, ModelPlugin):
        findings += _try("footprint", descriptor, _footprint_mistakes)
    _write_report(findings)


def _imports(subject: str) -> Finding:
    heavy = [module for module in HEAVY if module in sys.modules]
    if not heavy:
        return Finding(level="ok", subject=subject, detail="imports nothing heavy")
    return Finding(
        level="FAIL",
        subject=subject,
        detail=f"imports {', '.join(heavy)}",
        fix="move the import into the function that needs it",
    )


def _try(
    subject: str, descriptor: Descriptor, mistakes: Callable[[Descriptor], Iterator[str]]
) -> list[Finding]:
    """Findings about a function that the plan calls, so that it too has to be cheap."""
    try:
        found = [
            Finding(level="FAIL", subject=subject, detail=text) for text in mistakes(descriptor)
        ]
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        return [Finding(level="FAIL", subject=subject, detail=detail)]
    return [*found, _imports(subject)]


def _spec_mistakes(descriptor: Descriptor) -> Iterator[str]:
    assert isinstance(descriptor, EnvironmentPlugin)
    spec = load_object(descriptor.spec)(default_config(descriptor))
    if not isinstance(spec, EnvSpec):
        yield f"returns a {type(spec).__name__}, not an EnvSpec"
        return
    if not spec.cameras or any(min(size) < 1 for size in spec.cameras.values()):
        yield "cameras: at least one, each with a height and a width"
    if spec.action_dim < 1 or spec.max_episode_steps < 1 or spec.control_hz <= 0:
        yield "action_dim, max_episode_steps and control_hz must be positive"
    if spec.state_dim < 0:
        yield "state_dim must not be negative"
    yield from _task_mistakes(spec)


def _task_mistakes(spec: EnvSpec) -> Iterator[str]:
    if not spec.tasks:
        yield "tasks: at least one"
    if [task.index for task in spec.tasks] != list(range(len(spec.tasks))):
        yield "tasks: indices must be 0, 1, 2, ... in this order"
    if len({task.name for task in spec.tasks}) != len(spec.tasks):
        yield "tasks: names must be unique"
    for task in spec.tasks:
        if task.num_trials < 1 or not task.instruction:
            yield f'task "{task.name}": needs an instruction and at least one trial'
        if not 1 <= len(task.eval_trials) <= task.num_trials:
            yield f'task "{task.name}": num_eval_trials must lie between 1 and num_trials'


def _footprint_mistakes(descriptor: Descriptor) -> Iterator[str]:
    assert isinstance(descriptor, ModelPlugin)
    footprint = load_object(descriptor.footprint)
    for lora_rank in (0, _TRIED_LORA_RANK):
        size = footprint(default_config(descriptor), FootprintContext(lora_rank=lora_rank))
        if not isinstance(size, Footprint):
            yield f"returns a {type(size).__name__}, not a Footprint"
        elif not 0 < size.trainable <= size.parameters:
            yield f"trainable parameters for lora rank {lora_rank}: {size.trainable}"
        elif size.bytes_per_parameter <= 0 or size.activation_bytes < 0:
            yield "bytes_per_parameter must be positive, activation_bytes not negative"


# --------------------------------------------------------------------------------------------
# An episode, in another process
# --------------------------------------------------------------------------------------------
def rehearse(kind: str, name: str) -> None:
    """Play one episode twice with an environment of default configuration; report the findings."""
    _write_report([_rehearsal(registry.find(kind, name))])


def _rehearsal(descriptor: Descriptor) -> Finding:
    try:
        factory = registry.load_factory(descriptor)
    except EnvironmentNotReadyError as error:
        return Finding(level="FAIL", subject="factory", detail=error.message)
    try:
        num_steps, mistakes = _play_twice(descriptor, factory)
    except EnvironmentNotReadyError as error:
        detail = f"not checked: {error.message}"
        return Finding(level="warn", subject="episode", detail=detail, fix=error.hint)
    except UserError as error:
        return Finding(level="FAIL", subject="episode", detail=error.message, fix=error.hint)
    except _Unplayable as reason:
        return Finding(level="FAIL", subject="episode", detail=str(reason))
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        return Finding(level="FAIL", subject="episode", detail=detail)
    if mistakes:
        return Finding(level="FAIL", subject="episode", detail="; ".join(mistakes))
    detail = f"{num_steps} steps, played twice with the same results"
    return Finding(level="ok", subject="episode", detail=detail)


def _play_twice(descriptor: Descriptor, factory: Callable[..., Any]) -> tuple[int, list[str]]:
    """Number of control steps, and what is wrong with the first play or else with its repeat."""
    assert isinstance(descriptor, EnvironmentPlugin)
    config = default_config(descriptor)
    spec = load_object(descriptor.spec)(config)
    context = EnvContext(num_slots=1, cameras=tuple(spec.cameras)[:1], final_observations=True)
    environment = factory(config, context)
    try:
        first = _play(environment, spec)
        mistakes = list(dict.fromkeys(_episode_mistakes(first, spec)))
        if not mistakes:
            mistakes = list(_differences(first, _play(environment, spec)))
    finally:
        environment.close()
    return _num_steps(first), mistakes


def _play(environment: Environment, spec: EnvSpec) -> list[ChunkResult]:
    """Results of `begin` and of each chunk of zeros, until the episode ends or was long enough."""
    actions_KA = np.zeros((_CHUNK_LENGTH, spec.action_dim))
    environment.begin(0, _EPISODE)
    results = [_answer(environment, "begin")]
    while _expects_actions(results[-1]) and len(results) <= _NUM_CHUNKS:
        environment.advance(0, actions_KA)
        results.append(_answer(environment, "advance"))
    return results


def _answer(environment: Environment, call: str) -> ChunkResult:
    events = environment.wait(1, _ANSWER_SECONDS)
    if not events:
        raise _Unplayable(f"{call}: no event from wait(1, {_ANSWER_SECONDS})")
    result = events[0].result
    if result is None:
        raise _Unplayable(f"{call}: {_last_line(events[0].failure) or 'failed without a reason'}")
    return result


def _expects_actions(result: ChunkResult) -> bool:
    return result.observation is not None and result.outcome is None


def _num_steps(results: list[ChunkResult]) -> int:
    return sum(np.size(result.rewards) for result in results)


def _episode_mistakes(results: list[ChunkResult], spec: EnvSpec) -> Iterator[str]:
    start, *chunks = results
    if not _expects_actions(start):
        yield "begin: must give an observation and no outcome"
    yield from (f"begin: {mistake}" for mistake in _result_mistakes(start, 0, spec))
    for chunk in chunks:
        if chunk.observation is None:
            asked = "" if chunk.outcome is None else ", as EnvContext.final_observations asks"
            yield f"advance: an observation is missing{asked}"
        yield from (f"advance: {text}" for text in _result_mistakes(chunk, _CHUNK_LENGTH, spec))
    outcome, num_steps = results[-1].outcome, _num_steps(results)
    if outcome is not None and outcome.num_steps != num_steps:
        yield f"outcome: num_steps is {outcome.num_steps}, rewards came for {num_steps}"
    if outcome is None and num_steps >= spec.max_episode_steps:
        yield f"no outcome after max_episode_steps ({spec.max_episode_steps})"


def _result_mistakes(result: ChunkResult, num_actions: int, spec: EnvSpec) -> Iterator[str]:
    # Only the end of an episode cuts a chunk short.
    num_executed = num_actions
    if result.outcome is not None:
        num_executed = min(max(np.size(result.rewards), 1), num_actions)
    yield from _array_mistakes("rewards", result.rewards, "float32", (num_executed,))
    if result.observation is not None:
        yield from _observation_mistakes(result.observation, spec)


def _observation_mistakes(observation: Observation, spec: EnvSpec) -> Iterator[str]:
    camera, (height, width) = next(iter(spec.cameras.items()))
    if list(observation.images) == [camera]:
        shape = (height, width, 3)
        yield from _array_mistakes(
            f'picture "{camera}"', observation.images[camera], "uint8", shape
        )
    else:
        yield f"pictures of {list(observation.images)}, asked for {[camera]}"
    yield from _array_mistakes("state", observation.state, "float32", (spec.state_dim,))
    instruction = spec.tasks[_EPISODE.task].instruction
    if observation.instruction != instruction:
        yield f'instruction "{observation.instruction}", that of the task is "{instruction}"'


def _array_mistakes(name: str, value: object, dtype: str, shape: tuple[int, ...]) -> Iterator[str]:
    if not isinstance(value, np.ndarray):
        yield f"{name} is a {type(value).__name__}, not an array"
    elif value.dtype != dtype or value.shape != shape:
        yield f"{name} is {value.dtype} {list(value.shape)}, not {dtype} {list(shape)}"


def _differences(first: list[ChunkResult], second: list[ChunkResult]) -> Iterator[str]:
    again = _traces(second)
    for what, values in _traces(first).items():
        if len(values) != len(again[what]) or not all(map(np.array_equal, values, again[what])):
            yield f"other {what} when the same episode is played again"


def _traces(results: list[ChunkResult]) -> dict[str, list[np.ndarray]]:
    """What has to repeat, in order."""
    observations = [result.observation for result in results if result.observation is not None]
    return {
        "rewards": [result.rewards for result in results],
        "states": [observation.state for observation in observations],
        "pictures": [image for seen in observations for image in seen.images.values()],
    }
